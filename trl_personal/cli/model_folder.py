"""Where a trained model is: a local folder, or a repository on the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download


SMALL_FILES = ["config.json", "adapter_config.json", "training_settings.json", "user_model/*"]


def check_model_name(name: str) -> None:
    """
    Tell a mistyped path from a name on the hub, which is always `owner/name`.

    Raises:
        `FileNotFoundError`: if `name` is no folder and cannot be on the hub.
    """
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"There is no folder {name}. Give one that training wrote, or a name on the hub, `owner/name`."
        )


def folder_without_weights(name: str) -> Path:
    """`name` itself if it is a folder; else a folder with the user model and the configs of the repository."""
    check_model_name(name)
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=SMALL_FILES))
