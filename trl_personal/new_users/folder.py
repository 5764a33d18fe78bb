"""Users who join the folder of a trained model, or are refined there: only files in its `user_model/` change."""

from pathlib import Path
from typing import Any

from ..models.folder_users import write_known_users
from ..models.known_users import known_users
from ..models.saving import USER_MODEL_FOLDER, get_base_model
from ..user_models.base import read_user_model_config


def write_users(model: Any, folder: str | Path) -> None:
    """
    Put the users of a model into the folder that it was loaded from: ids, rows, how they came in, and their config,
    which comes last. What the config says of the language model stays, and so do all files of that.

    Raises:
        `FileNotFoundError`, `ValueError`: if the folder has no user model.
    """
    folder = Path(folder)
    config = read_user_model_config(folder / USER_MODEL_FOLDER)
    write_known_users(folder, known_users(get_base_model(model)), config)
