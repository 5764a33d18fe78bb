"""Training in several processes, through the launcher of accelerate."""

import os
import subprocess
import sys
from argparse import Namespace
from importlib import resources
from pathlib import Path

import torch
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .wrong_flags import flags_of_dpo, unknown_arguments


MODULE = "trl_personal.cli"


def needs_launcher(launch_arguments: list[str]) -> bool:
    """Whether training needs processes, or settings of accelerate, other than this one's."""
    return bool(launch_arguments) or torch.cuda.device_count() > 1 or os.path.isfile(default_config_file)


def parse_launch_arguments(launch_arguments: list[str], worker_command: list[str]) -> Namespace:
    """
    What `accelerate launch` makes of `launch_arguments` (`--accelerate_config` included) for a worker that is
    `python -m trl_personal.cli` with `worker_command`.

    Raises:
        `ValueError`: if accelerate does not know one of them either.
    """
    argv = [*resolve_accelerate_config(launch_arguments), "--module", MODULE, *worker_command]
    arguments, unknown = launch_command_parser().parse_known_args(argv)
    if arguments.training_script != MODULE:  # the value of an unknown option
        unknown.append(arguments.training_script)
    if unknown:
        raise ValueError(unknown_arguments(unknown, flags_of_dpo()))
    return arguments


def resolve_accelerate_config(launch_arguments: list[str]) -> list[str]:
    """
    `--accelerate_config X` as accelerate's `--config_file`, where X is a file or one of TRL's configurations.

    Raises:
        `ValueError`: if X is neither.
    """
    if "--accelerate_config" not in launch_arguments[:-1]:
        return launch_arguments
    index = launch_arguments.index("--accelerate_config")
    name = launch_arguments[index + 1]
    folder = resources.files("trl.accelerate_configs")
    if not Path(name).is_file() and not folder.joinpath(f"{name}.yaml").is_file():
        known = sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))
        raise ValueError(f"--accelerate_config {name} is neither a file nor one of TRL's configurations, {known}.")
    path = name if Path(name).is_file() else str(folder.joinpath(f"{name}.yaml"))
    return ["--config_file", path, *launch_arguments[:index], *launch_arguments[index + 2 :]]


def launch(arguments: Namespace) -> int:
    """Run the workers; returns the exit code. A worker that fails has said why."""
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:
            sys.stderr.write(f"The training process was ended by signal {-error.returncode}.\n")
        return max(error.returncode, 1)
    except ChildFailedError:
        return 1
    return 0
