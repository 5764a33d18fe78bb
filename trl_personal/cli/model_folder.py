"""Where a trained model is: a local folder, or a repository on the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download


SMALL_FILES = ["config.json", "adapter_config.json", "training_settings.json", "user_model/*"]


def check_model_name(name: str, is_base: bool = False) -> None:
    """
    Tell a mistyped path from a name on the hub, which is always `owner/name`; some base models are older than that rule.

    Raises:
        `FileNotFoundError`: if `name` is no folder and cannot be on the hub.
    """
    slashes = (0, 1) if is_base else (1,)
    if not Path(name).is_dir() and (name.count("/") not in slashes or not name or name.startswith((".", "/", "~"))):
        what = "holds a model" if is_base else "training wrote"
        raise FileNotFoundError(
            f"There is no folder {name}. Give one that {what}, or a name on the hub, `owner/name`."
        )


def folder_without_weights(name: str) -> Path:
    """`name` itself if it is a folder; else a folder with the user model and the configs of the repository."""
    check_model_name(name)
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=SMALL_FILES))
