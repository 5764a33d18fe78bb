"""Loads a language model together with its user model."""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from ..files import fingerprint
from ..user_models import UserModel
from ..user_models.base import CONFIG_FILE, read_user_model_config
from ..users import UserVocab
from .attach import attach_user_model, check_vocab
from .saving import USER_MODEL_FOLDER, get_base_model


HUB_PULL_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class AutoPersonalizedModelForCausalLM:
    """
    Loads a language model with its user model, from a folder or repository that [`PersonalizedDPOTrainer`] or
    `model.save_pretrained` wrote.

    ```python
    model = AutoPersonalizedModelForCausalLM.from_pretrained("out")
    inputs = tokenizer(["The plan", "Dear all"], padding=True, padding_side="left", return_tensors="pt")
    model.generate(**inputs, user_ids=["alice", "bob"])
    ```
    """

    def __init__(self) -> None:
        raise OSError(
            "AutoPersonalizedModelForCausalLM is made with "
            "`AutoPersonalizedModelForCausalLM.from_pretrained(pretrained_model_name_or_path)`."
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel | PeftModel:
        """
        The language model itself (`GPTJForCausalLM`, `PeftModelForCausalLM`, ...), with the user model attached (see
        [`attach_user_model`]) and in evaluation mode.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): The folder or the repository on the hub that holds the model.
            **kwargs: Arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`], such as `dtype`, `device_map`,
                `quantization_config`, `revision`; for an adapter they go to the base model, and `is_trainable` to PEFT.

        Raises:
            `ValueError`: if there is no `user_model/`, if one of its files is cut off, foreign or of a newer format, if
                it does not fit the language model, or if the weights beside it are not those it was saved with.
        """
        name = str(pretrained_model_name_or_path)
        hub_kwargs = {key: kwargs[key] for key in HUB_PULL_ARGUMENTS if key in kwargs}
        folder = find_user_model(name, **hub_kwargs)
        if folder is None:
            raise ValueError(
                f"{name} has no `{USER_MODEL_FOLDER}/` folder, so it is not a personalized model. Load a plain language model "
                "with `AutoModelForCausalLM`, or train one with `PersonalizedDPOTrainer`."
                + (
                    ""
                    if Path(name).is_dir()
                    else " (There is no local folder of that name, and no repository was found or reached.)"
                )
            )
        user_model, user_vocab, config = load_user_model(folder)
        model = load_language_model(name, **kwargs)
        check_fingerprints(folder.parent, config)
        template = config.get("user_profile_template")
        attach_user_model(model, user_model, user_vocab, config.get("bos_token_id"), template)
        return model


def find_user_model(name: str, **hub_kwargs: Any) -> Path | None:
    """The `user_model/` folder of a local folder or a hub repository; `None` if it has none."""
    if Path(name).is_dir():
        folder = Path(name) / USER_MODEL_FOLDER
        return folder if folder.is_dir() else None
    if _cached(name, f"{USER_MODEL_FOLDER}/{CONFIG_FILE}", hub_kwargs) is None:
        return None
    return Path(snapshot_download(name, allow_patterns=f"{USER_MODEL_FOLDER}/*", **hub_kwargs)) / USER_MODEL_FOLDER


def load_user_model(folder: Path) -> tuple[UserModel, UserVocab, dict[str, Any]]:
    """
    The user model in a `user_model/` folder, its vocabulary, and the entries of its config file.

    Raises:
        `ValueError`: if the vocabulary has another number of users than the table; or as [`UserModel.from_pretrained`].
    """
    user_model = UserModel.from_pretrained(folder)
    user_vocab = UserVocab.from_pretrained(folder)
    check_vocab(user_model, user_vocab)
    return user_model, user_vocab, read_user_model_config(folder)


def is_adapter(name: str, **hub_kwargs: Any) -> bool:
    """Whether a local folder or a hub repository holds a PEFT adapter, and not a whole language model."""
    return _cached(name, "adapter_config.json", hub_kwargs) is not None


def check_fingerprints(folder: Path, config: dict[str, Any]) -> None:
    """Raise a `ValueError` unless the weights in `folder` are those that the user model was saved with."""
    for name, expected in config.get("language_model_files", {}).items():
        path = folder / name
        if not path.is_file() or fingerprint(path) != expected:
            raise ValueError(
                f"{path} is not the file that the user model in {folder / USER_MODEL_FOLDER} was saved with: the folder holds "
                "parts of two saves, as after a kill. Use an earlier checkpoint, or put the matching files back. (To "
                "combine a user model with other weights on purpose, use `attach_user_model`.)"
            )


def reload_renamed_weights(model: nn.Module, checkpoint: Path) -> None:
    """
    Load a full model's checkpoint through `from_pretrained` if its files name the weights otherwise than the module does.

    transformers writes some families (experts of Mixtral, GPT-NeoX) under the names of their first release. Its `Trainer`
    reads checkpoints by the names in the module and lets the rest pass, so that resuming would start those weights anew.
    """
    saved = {name for file in checkpoint.glob("model*.safetensors") for name in safe_open(file, "pt").keys()}
    if saved <= set(model.state_dict()):
        return
    loaded = _load_by_architecture(checkpoint, dtype=get_base_model(model).dtype)
    model.load_state_dict(loaded.state_dict(), strict=False)


def load_language_model(name: str, *, is_trainable: bool = False, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """The language model or adapter in a folder or repository, without users."""
    hub_kwargs = {key: kwargs[key] for key in HUB_PULL_ARGUMENTS if key in kwargs}
    if not is_adapter(name, **hub_kwargs):
        return _load_by_architecture(name, **kwargs)
    adapter = PeftConfig.from_pretrained(name, **hub_kwargs)
    base_kwargs = {**kwargs, "revision": adapter.revision or "main"}
    base = _load_by_architecture(str(adapter.base_model_name_or_path), **base_kwargs)
    return PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **hub_kwargs)


def _load_by_architecture(name: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The class that the config names, as TRL does: the automatic one for language models knows none that see images."""
    config_names = (*HUB_PULL_ARGUMENTS, "trust_remote_code")
    config = AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in config_names if key in kwargs})
    architecture = getattr(
        transformers, (config.architectures or [""])[0] or "AutoModelForCausalLM", AutoModelForCausalLM
    )
    return architecture.from_pretrained(name, **kwargs)


def _cached(name: str, filename: str, hub_kwargs: dict[str, Any]) -> str | None:
    return cached_file(
        name,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )
