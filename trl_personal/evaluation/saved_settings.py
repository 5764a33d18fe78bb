"""What a trained folder still knows of its training: settings, without running code that comes with it, and the log."""

import logging
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..files import checkpoints_newest_first, read_json


logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.bin"  # pickled by transformers
STATE_FILE = "trainer_state.json"
TRUSTED_PACKAGES = ("accelerate", "transformers", "trl", "trl_personal")
SCORING = (  # what changes a margin, a metric or a column
    *("beta", "max_length", "truncation_mode", "ld_alpha", "loss_type", "loss_weights", "label_smoothing"),
    *("f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "pad_token", "pad_to_multiple_of"),
    *("user_id_column", "user_profile_column", "user_profile_template", "bf16", "fp16"),
)
TRAINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_steps", "num_train_epochs", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "disable_dropout"),
)


def read_training_settings(folder: str | Path) -> dict[str, Any]:
    """
    The settings in `training_args.bin` that matter to score pairs or to train again in the same way; empty without the file.

    It is unpickled with nothing but the data classes and enumerations of the libraries that write it, so a foreign folder
    cannot run code. The number of processes counts as gradient accumulation: one process then sees the same batches.

    Raises:
        `ValueError`: if the file cannot be read, or holds anything else.
    """
    path = Path(folder) / ARGUMENTS_FILE
    if not path.is_file():
        return {}
    try:
        needed = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([_trusted(name) for name in needed]):
            found = vars(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}). Remove it, and give its settings yourself."
        ) from error
    settings = {name: found[name] for name in (*SCORING, *TRAINING) if name in found}
    num_processes = getattr(found.get("distributed_state"), "num_processes", 1)
    if num_processes > 1 and "gradient_accumulation_steps" in settings:
        settings["gradient_accumulation_steps"] *= num_processes
    return settings


def _trusted(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in TRUSTED_PACKAGES:
        raise ValueError(f"it holds a {name}, which no training arguments do")
    found = getattr(import_module(module), attribute)
    if not isinstance(found, type) or not (issubclass(found, (Enum, PartialState)) or is_dataclass(found)):
        raise ValueError(f"it holds {name}, which is neither a data class nor an enumeration")
    return found


def read_log_history(folder: str | Path) -> list[dict[str, Any]]:
    """What the trainer logged, from `trainer_state.json` in the folder or its last checkpoint; empty if there is none."""
    for place in (Path(folder), *checkpoints_newest_first(Path(folder))):
        if (place / STATE_FILE).is_file():
            return read_json(place / STATE_FILE).get("log_history", [])
    return []
