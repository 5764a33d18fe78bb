"""`trl-personal dpo`: what `trl dpo` does, for preferences that belong to users."""

import gc
import traceback
from argparse import Action, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import set_seed
from transformers.utils import is_torch_xla_available
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from yaml import YAMLError

from .. import PersonalizedDPOConfig, PersonalizedDPOTrainer
from .arguments import PROG, ColumnArguments
from .launch import launch, needs_launcher, parse_launch_arguments
from .model_folder import check_model_name
from .preferences import check_dataset_name, load_preferences, select_split
from .words import in_flags


DESCRIPTION = """\
Train a language model on the preferences of users. The arguments are those of `trl dpo`, after the settings of users;
the dataset has one more column, `user_id`. `--config FILE.yaml` reads arguments from a file.
Arguments of `accelerate launch` (--num_processes, --multi_gpu, ...) and `--accelerate_config` go to accelerate.
Without an accelerator, `--use_cpu true --bf16 false` is the default.
"""


DATACLASSES: Any = (ScriptArguments, PersonalizedDPOConfig, ModelConfig, DatasetMixtureConfig, ColumnArguments)


USAGE = f"{PROG} dpo --model_name_or_path MODEL --dataset_name DATASET [--output_dir FOLDER] [settings]"
NEEDED = ("model_name_or_path", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
NAMES_OF_VALUES: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Each flag once, without its spelling with hyphens."""

    def _format_action_invocation(self, action: Action) -> str:
        flags = [flag for flag in action.option_strings if "-" not in flag[2:]] or list(action.option_strings)
        if action.nargs == 0:
            return ", ".join(flags)
        default = NAMES_OF_VALUES.get(action.type, "VALUE")
        return f"{', '.join(flags)} {self._format_args(action, default)}"


class _Parser(TrlParser):
    def format_help(self) -> str:
        """What a user of this package comes for first; then the arguments of `trl dpo`."""
        formatter = self._get_formatter()
        formatter.add_usage(USAGE, (), ())
        formatter.add_text(self.description)
        users = _names_of(PersonalizedDPOConfig) - _names_of(DPOConfig)
        columns = _names_of(ColumnArguments)
        actions = self._actions
        sections = {
            "settings of users": [action for action in actions if action.dest in users],
            "columns of the data": [action for action in actions if action.dest in columns],
            "model and data": [action for action in actions if action.dest in NEEDED],
            "other arguments of trl dpo": [a for a in actions if a.dest not in {*users, *columns, *NEEDED}],
        }
        for title, listed in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(listed)
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """As in argparse, without the usage of hundreds of options."""
        flags = {flag[2:]: flag[2:] for flag in self._option_string_actions if flag.startswith("--")}
        self.exit(2, f"{self.prog}: error: {in_flags(message, flags)}\nSee `{self.prog} --help`.\n")


def run_dpo(options: Namespace) -> int:
    """Train as `options.arguments` say, in this process or through accelerate's launcher; returns the exit code."""
    parser = make_parser()
    *settings, remaining = parse(parser, options.arguments)
    try:
        launch_arguments = parse_launch_arguments(remaining, _worker_command(options))
    except ValueError as error:
        parser.error(str(error))
    check_dataset_name(None if settings[3].datasets else settings[0].dataset_name)
    check_model_name(str(settings[2].model_name_or_path), is_base=True)
    if not options.no_launch and needs_launcher(remaining):
        return launch(launch_arguments)
    train(*settings)
    return 0


def make_parser() -> TrlParser:
    """TRL's parser of `trl dpo`, with our config in place of `DPOConfig`."""
    parser = _Parser(
        DATACLASSES,
        prog=f"{PROG} dpo",
        description=DESCRIPTION,
        formatter_class=_Formatter,
    )
    parser.set_defaults(**machine_defaults())
    return parser


def machine_defaults() -> dict[str, bool]:
    """Defaults that let a machine without an accelerator train; TRL's own refuse to."""
    if torch.accelerator.is_available() or is_torch_xla_available():
        return {}
    return {"use_cpu": True, "bf16": False}


def parse(parser: TrlParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """
    The settings in `argv` and in its YAML file, one object per dataclass, and the list of arguments that are none of them.

    Raises:
        `SystemExit`: with code 2, if they are wrong or the model or the dataset is missing.
    """
    args = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if args and args[-1] == "--config":
        parser.error("argument --config: expected one argument")
    try:
        parsed = parser.parse_args_and_config(args, return_remaining_strings=True)
    except (ValueError, TypeError, OSError, YAMLError) as error:
        parser.error(" ".join(str(error).split()))
    script_args, _, model_args, dataset_args, *_ = parsed
    if model_args.model_name_or_path is None:
        parser.error("the following argument is required: --model_name_or_path (a folder, or a name on the hub)")
    if script_args.dataset_name is None and not dataset_args.datasets:
        parser.error(
            "the following argument is required: --dataset_name (a file, a folder, or a name on the hub), or `datasets` in "
            "the file of --config"
        )
    return parsed


def train(
    script_args: ScriptArguments,
    training_args: PersonalizedDPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    columns: ColumnArguments,
) -> None:
    """Load, train, save, and push if asked to."""
    set_seed(training_args.seed)  # each process draws the same `test_split_size` rows
    dataset = load_preferences(
        script_args,
        dataset_args,
        columns,
        user_id_column=training_args.user_id_column,
        user_profile_column=training_args.user_profile_column,
    )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **dict(training_args.model_init_kwargs or {}),  # type: ignore[arg-type]
    }
    evaluates = training_args.eval_strategy != "no"
    name = str(model_args.model_name_or_path)
    with _no_folder_is_told(name):
        trainer = PersonalizedDPOTrainer(
            model=name,
            args=training_args,
            train_dataset=select_split(dataset, script_args.dataset_train_split, "train"),
            eval_dataset=select_split(dataset, script_args.dataset_test_split, "test") if evaluates else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    if script_args.ignore_bias_buffers:  # as in `trl dpo`
        buffers = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers  # type: ignore[assignment]
    with _traceback_in(Path(trainer.args.output_dir or "."), training_args.process_index):
        trainer.train(resume_from_checkpoint=_checkpoint(training_args))
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    group = torch.distributed.GroupMember.WORLD if torch.distributed.is_available() else None
    trainer.end()
    # DDP must not hold the last reference to the group: it would end gloo's thread while that one waits for the GIL
    del trainer
    gc.collect()
    del group


def _checkpoint(training_args: PersonalizedDPOConfig) -> str | bool | None:
    """`--resume_from_checkpoint true` takes the last one, as `True` does in Python and in YAML."""
    checkpoint = training_args.resume_from_checkpoint
    return True if str(checkpoint).lower() == "true" else checkpoint


@contextmanager
def _no_folder_is_told(name: str) -> Iterator[None]:
    """A model that is nowhere is perhaps a mistyped folder, which the hub cannot know."""
    try:
        yield
    except OSError as error:
        if not Path(name).is_dir():
            error.add_note(f"(There is no folder {name}, so it was looked up on the hub.)")
        raise


@contextmanager
def _traceback_in(folder: Path, process_index: int) -> Iterator[None]:
    """Keep the traceback of an error in `folder`: a run of days is not repeated to see it."""
    try:
        yield
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"traceback_{process_index}.txt"
        path.write_text(traceback.format_exc())
        error.add_note(f"(Traceback in {path})")
        raise


def _worker_command(options: Namespace) -> list[str]:
    """The arguments of `trl-personal` in each process that accelerate starts."""
    flags = ["--debug"] if options.debug else []
    modules = [part for name in options.import_module for part in ("--import_module", name)]
    return [*flags, *modules, "--no_launch", "dpo", *options.arguments]


def _names_of(dataclass: Any) -> set[str]:
    return {field.name for field in fields(dataclass)}
