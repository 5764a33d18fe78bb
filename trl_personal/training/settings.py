"""The settings of a training, as JSON beside the model: what an evaluation needs to score pairs as the training did."""

import json
import logging
import math
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..files import read_json, write_atomically
from ..models.loading import cached
from .config import PersonalizedDPOConfig


logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_settings.json"
ARGUMENTS_FILE = "training_args.bin"  # pickled by transformers, and never read here
FORMAT_VERSION = 1
SCORING = (  # settings that change a margin, a metric or a column
    *("beta", "max_length", "truncation_mode", "ld_alpha", "loss_type", "loss_weights", "label_smoothing"),
    *("f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "pad_token", "pad_to_multiple_of"),
    *("user_id_column", "user_profile_column", "user_profile_template", "bf16", "fp16"),
)
TRAINING = (  # settings of a training that is to be as long and as large
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_steps", "num_train_epochs", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "disable_dropout"),
)


def write_training_settings(folder: Path, args: Any) -> None:
    """Write `training_settings.json`: the settings in `args` that matter to score pairs or to train again in the same way."""
    settings = {name: _as_json(getattr(args, name)) for name in (*SCORING, *TRAINING) if hasattr(args, name)}
    content = {"format_version": FORMAT_VERSION, "num_processes": args.world_size, "settings": settings}
    write_atomically(folder / SETTINGS_FILE, (json.dumps(content, indent=2, default=str) + "\n").encode())


def scoring_settings(args: Any) -> dict[str, Any]:
    """The settings in `args` that change a margin, a metric or a column."""
    return {name: _as_json(getattr(args, name)) for name in SCORING if hasattr(args, name)}


def read_training_settings(name: str | Path) -> dict[str, Any]:
    """
    The settings in the `training_settings.json` of a folder or a repository; empty without the file. The number of
    processes counts as gradient accumulation: one process then sees the same batches.

    A folder of an earlier version has a pickle instead, which is not read: unpickling may run code.

    Raises:
        `ValueError`: if the file is damaged, or of a newer format.
    """
    path = cached(str(name), SETTINGS_FILE, {})
    if path is None:
        if (Path(name) / ARGUMENTS_FILE).is_file():
            logger.warning(
                "%s has no %s: an earlier version trained it, and wrote its settings in a pickle, which is not read. Give "
                "those that differ from TRL's defaults: `--beta`, `--max_length`, `--user_id_column`, or `settings=`.",
                name,
                SETTINGS_FILE,
            )
        return {}
    return check_settings_file(Path(path))


def check_settings_file(path: Path) -> dict[str, Any]:
    """
    The settings in a `training_settings.json`, each of the type that `PersonalizedDPOConfig` declares.

    Raises:
        `ValueError`: if not.
    """
    content = read_json(path)
    settings, num_processes = content.get("settings"), content.get("num_processes")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {content.get('format_version')!r:.200}, this version of trl_personal reads "
            f"{FORMAT_VERSION}. Upgrade, or remove the file and give its settings yourself."
        )
    if not isinstance(settings, dict) or type(num_processes) is not int or num_processes < 1:
        raise ValueError(
            f"{path} must hold `settings` and `num_processes`. Remove it, and give its settings yourself."
        )
    hints = get_type_hints(PersonalizedDPOConfig)
    found = {}
    for name in (*SCORING, *TRAINING):
        if name not in settings:
            continue
        value = _from_json(settings[name])
        if not _fits(value, hints[name]):
            raise ValueError(
                f"`{name}` in {path} must be of type {hints[name]}, got {value!r:.200}. Remove the file, and give its "
                "settings yourself."
            )
        found[name] = value
    if num_processes > 1 and "gradient_accumulation_steps" in found:
        found["gradient_accumulation_steps"] *= num_processes
    return found


def _as_json(value: Any) -> Any:
    """Enumerations as their values; infinity, which JSON does not have and `max_grad_norm` may be, as a text."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and value in ({"float": "inf"}, {"float": "-inf"}, {"float": "nan"}):
        return float(value["float"])
    return value


def _fits(value: Any, hint: Any) -> bool:
    """
    Whether a value from JSON is of a type, as annotated.

    ```python
    >>> _fits(1, float), _fits(True, float), _fits(None, int | None), _fits(["a"], list[str]), _fits([1], list[str])
    (True, False, True, True, False)
    ```
    """
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if get_args(hint):  # a union
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
