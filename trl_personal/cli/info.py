"""`trl-personal info`: what a trained model is, without loading the language model."""

import math
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from .. import UserVocab, __version__
from ..files import read_json, weight_files
from ..models.loading import check_fingerprints
from ..models.saving import USER_MODEL_FOLDER
from ..terminal import json_line, printable
from ..user_models.base import WEIGHTS_FILE, read_user_model_config
from .arguments import PROG
from .model_folder import folder_without_weights


PACKAGES = ("trl", "transformers", "peft", "torch")
INTERNAL = ("language_model_files", "bos_token_id")  # entries of the user model's config that are no setting of it


def run_info(arguments: Namespace) -> None:
    """Write what is known of `arguments.model` to the standard output."""
    folder = folder_without_weights(arguments.model)
    information = {"model": arguments.model, **describe(folder)}
    user_ids = list(UserVocab.from_pretrained(folder / USER_MODEL_FOLDER)) if arguments.list_users else []
    if arguments.format == "json":
        users = {"users": user_ids} if arguments.list_users else {}
        sys.stdout.write(json_line(information | users, indent=2) + "\n")
        return
    Console().print(as_table(information))
    sys.stdout.writelines(f"{printable(user_id)}\n" for user_id in user_ids)


def describe(folder: Path) -> dict[str, Any]:
    """
    What the files in `folder` say.

    Raises:
        `ValueError`: if it has no user model, or a file of it is damaged.
    """
    user_folder = folder / USER_MODEL_FOLDER
    if not user_folder.is_dir():
        raise ValueError(
            f"{folder} has no `{USER_MODEL_FOLDER}/` folder, so it is not a personalized model. Train one with "
            f"`{PROG} dpo`."
        )
    config = read_user_model_config(user_folder)
    return {
        **{name: value for name, value in config.items() if name not in INTERNAL},
        "user_model_parameters": count_parameters(user_folder / WEIGHTS_FILE),
        "user_model_bytes": _num_bytes(user_folder, {path.name for path in user_folder.iterdir()}),
        **_describe_language_model(folder),
        "weights_match": weights_match(folder, config),
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


def count_parameters(path: Path) -> int:
    """
    Numbers in a safetensors file, from its header.

    Raises:
        `FileNotFoundError`: if it is missing. `ValueError`: if it is cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}.")
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}). The file is cut off, or is not safetensors.") from error


def weights_match(folder: Path, config: dict[str, Any]) -> bool | None:
    """Whether the language model's files are those the user model was saved with; `None` if they are not here."""
    if not weight_files(folder):
        return None
    try:
        check_fingerprints(folder, config)
    except ValueError:
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
    if name == "weights_match":
        return "yes" if value else "no: the folder holds parts of two saves"
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _num_bytes(folder: Path, names: set[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)
