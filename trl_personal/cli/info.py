"""`trl-personal info`: what a trained model is, without loading the language model."""

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .. import UserVocab, __version__
from ..files import read_json, weight_files
from ..models.folder_checks import (
    BASE_FILES_ENTRY,
    LM_FILES_ENTRY,
    base_model_files,
    check_base_model,
    check_fingerprints,
    read_adapter_config,
)
from ..models.loading import find_user_model, load_user_model
from ..models.saving import USER_MODEL_FOLDER
from ..terminal import json_line, print_whole, printable
from ..training.settings import SETTINGS_FILE, check_settings_file
from ..user_models import USER_MODELS
from ..user_models.base import FILES_ENTRY, WEIGHTS_FILE, read_header, read_user_model_config
from .arguments import PROG
from .model_folder import folder_without_weights


PACKAGES = ("trl", "transformers", "peft", "torch")
# entries of the user model's config that are no setting of it
INTERNAL = (LM_FILES_ENTRY, BASE_FILES_ENTRY, FILES_ENTRY, "bos_token_id")


def run_info(arguments: Namespace) -> None:
    """Write what is known of `arguments.model` to the standard output."""
    folder = folder_without_weights(arguments.model)
    information = {"model": arguments.model, **describe(folder)}
    user_ids = list(UserVocab.from_pretrained(folder / USER_MODEL_FOLDER)) if arguments.list_users else []
    if arguments.format == "json":
        users = {"users": user_ids} if arguments.list_users else {}
        sys.stdout.write(json_line(information | users, indent=2) + "\n")
        return
    print_whole(as_table(information))
    sys.stdout.writelines(f"{printable(user_id)}\n" for user_id in user_ids)


def describe(folder: Path) -> dict[str, Any]:
    """
    What the files in `folder` say.

    Raises:
        `ValueError`: if it has no user model, or a file of it is damaged.
    """
    user_folder = find_user_model(str(folder))
    if user_folder is None:
        raise ValueError(
            f"{folder} has no `{USER_MODEL_FOLDER}/` folder, so it is not a personalized model. Train one with "
            f"`{PROG} dpo`."
        )
    config = read_user_model_config(user_folder)
    return {
        **{name: value for name, value in config.items() if name not in INTERNAL},
        "user_model_parameters": sum(
            math.prod(shape) for shape, _ in read_header(user_folder / WEIGHTS_FILE).values()
        ),
        "user_model_bytes": _num_bytes(user_folder, {path.name for path in user_folder.iterdir()}),
        **_describe_language_model(folder),
        "user_model_matches": is_right(load_user_model, user_folder) if config["kind"] in USER_MODELS else None,
        "weights_match": is_right(check_fingerprints, folder, config) if weight_files(folder) else None,
        "base_model_matches": base_model_matches(folder, config),
        "training_settings": check_settings_file(path) if (path := folder / SETTINGS_FILE).is_file() else None,
        "versions": {"trl_personal": __version__, **{name: version(name) for name in PACKAGES}},
    }


def _describe_language_model(folder: Path) -> dict[str, Any]:
    is_adapter = (folder / "adapter_config.json").is_file()
    config = read_json(folder / ("adapter_config.json" if is_adapter else "config.json"))
    base_model = config.get("base_model_name_or_path") if is_adapter else (config.get("architectures") or [None])[0]
    return {
        "language_model": "adapter" if is_adapter else "full",
        "base_model": base_model,
        "language_model_bytes": _num_bytes(folder, weight_files(folder)) or None,
        "saved_with": {
            name: config[key]
            for name, key in (("transformers", "transformers_version"), ("peft", "peft_version"))
            if key in config
        },
    }


def base_model_matches(folder: Path, config: dict[str, Any]) -> bool | None:
    """Whether an adapter's base model is the one it was saved with; `None` for a full model, or a base that is not here."""
    if not config.get(BASE_FILES_ENTRY):
        return None
    adapter = read_adapter_config(folder)
    name, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    if not base_model_files(name, revision):
        return None
    return is_right(check_base_model, folder, config, name, revision)


def is_right(check: Callable[..., object], *arguments: Any) -> bool:
    """Whether a check passes."""
    try:
        check(*arguments)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"{printable(str(error))}\n")
        return False
    return True


def as_table(information: dict[str, Any]) -> Table:
    """Two columns; sizes in units, one row per package."""
    table = Table(show_header=False, box=None)
    for name, value in information.items():
        table.add_row(
            Text(name.replace("_bytes", "_size").replace("_", " "), style="bold"),
            Text(printable(_as_text(name, value))),
        )
    return table


def _as_text(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if name.endswith("_bytes"):
        return decimal(value)
    if isinstance(value, bool):
        return "yes" if value else "no: the folder holds parts of two saves, or files that were edited"
    if name == "training_settings":
        return f"{len(value)}, listed by --format json"
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _num_bytes(folder: Path, names: set[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)
