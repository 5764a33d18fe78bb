"""Users who join the folder of a trained model, or are refined there: only files in its `user_model/` change."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files import staged_folder
from ..models.saving import USER_MODEL_FOLDER, get_base_model
from ..user_models.base import CONFIG_FILE, FILES_ENTRY, read_user_model_config


def write_users(model: Any, folder: str | Path) -> None:
    """
    Put the users of a model into the folder that it was loaded from: `users.json`, the rows, and their config, which comes
    last. What the config says of the language model stays, and so do all files of that.

    Raises:
        `FileNotFoundError`, `ValueError`: if the folder has no user model.
    """
    folder, causal_lm = Path(folder), get_base_model(model)
    config: Mapping[str, Any] = read_user_model_config(folder / USER_MODEL_FOLDER)
    own = {"format_version", "kind", FILES_ENTRY, *(field.name for field in fields(causal_lm.user_model.config))}
    with staged_folder(folder, last=CONFIG_FILE) as staging:
        users = staging / USER_MODEL_FOLDER
        causal_lm.user_vocab.save_pretrained(users)
        causal_lm.user_model.save_files(users, **{name: value for name, value in config.items() if name not in own})
