"""Reads and writes the users in the folder of a model, without its language model."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files import staged_folder
from ..user_models.base import CONFIG_FILE, FILES_ENTRY
from ..users import JOINED_FILE
from .joined import read_joined, write_joined
from .known_users import KnownUsers
from .loading import find_user_model, load_user_model
from .saving import USER_MODEL_FOLDER


def load_known_users(folder: Path) -> tuple[KnownUsers, dict[str, Any]]:
    """
    The users in the folder of a model, whose language model is not loaded, and the entries of their config file.

    Raises:
        `ValueError`: if there is no `user_model/` folder, or a file in it is damaged or not the one that was saved.
    """
    user_folder = find_user_model(str(folder)) if folder.is_dir() else None
    if user_folder is None:
        raise ValueError(
            f"{folder} is no folder with a `{USER_MODEL_FOLDER}/` in it, so it is not a personalized model. Name the folder "
            "that training wrote."
        )
    user_model, user_vocab, config = load_user_model(user_folder)
    return KnownUsers(user_model, user_vocab, read_joined(user_folder, config)), config


def write_known_users(folder: Path, users: KnownUsers, config: Mapping[str, Any]) -> None:
    """
    Put other users into the folder of a model: the files in `user_model/`, each as a whole, its config last. What `config`
    says of the language model stays.
    """
    with staged_folder(folder, last=CONFIG_FILE) as staging:
        write_user_files(staging / USER_MODEL_FOLDER, users, config)
    if not users.joined:
        (folder / USER_MODEL_FOLDER / JOINED_FILE).unlink(missing_ok=True)


def write_user_files(folder: Path, users: KnownUsers, config: Mapping[str, Any]) -> None:
    """The files of users, for a `user_model/` folder whose config had the entries `config`."""
    own = {"format_version", "kind", FILES_ENTRY, *(field.name for field in fields(users.user_model.config))}
    users.user_vocab.save_pretrained(folder)
    write_joined(folder, users.joined)
    users.user_model.save_files(folder, **{name: value for name, value in config.items() if name not in own})
