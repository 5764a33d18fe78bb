"""Loads a language model together with its user model."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..files import read_json
from ..user_models import UserModel
from ..user_models.base import CONFIG_FILE, read_header, read_user_model_config
from ..users import USERS_FILE, UserVocab
from .attach import attach_user_model
from .folder_checks import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LM_FILES_ENTRY,
    check_base_model,
    check_bos_token_id,
    check_fingerprints,
    check_loaded,
    check_sizes,
    check_user_model_folder,
    naming,
    read_adapter_config,
)
from .joined import read_joined
from .saving import USER_MODEL_FOLDER, check_vocab, embedding_size, get_base_model, remember_saved


logger = logging.getLogger(__name__)

HUB_PULL_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
REFUSED_ARGUMENTS = {  # of transformers' `from_pretrained`, with what to do instead
    "adapter_kwargs": "Settings of an adapter are those in its folder.",
    "adapter_name": "Load the model without it, then add another adapter with `model.load_adapter`.",
    "device_mesh": "Load with `device_map`, or train under FSDP2 with accelerate.",
    "distributed_config": "Load with `device_map`, or train under FSDP2 with accelerate.",
    "gguf_file": "Load the language model with it, then use `attach_user_model`.",
    "proxies": "Set the environment variable HTTPS_PROXY.",
    "state_dict": "Load the language model with it, then use `attach_user_model`.",
    "tp_plan": "Load with `device_map`, or train under FSDP2 with accelerate.",
    "tp_size": "Load with `device_map`, or train under FSDP2 with accelerate.",
}
OTHER_MODEL_ARGUMENTS = ("config", "ignore_mismatched_sizes", "key_mapping")  # the caller says that the files differ


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
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_users: bool = False, **kwargs: Any
    ) -> Any:
        """
        The language model itself (`GPTJForCausalLM`, `PeftModelForCausalLM`, ...), with the user model attached (see
        [`attach_user_model`]) and in evaluation mode.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): The folder or the repository on the hub that holds the model.
            map_users (`bool`, *optional*, defaults to `False`): Whether tables of users are mapped from their file, so that a
                row takes memory when it is used first. See [`UserModel.from_pretrained`].
            **kwargs: Arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`], such as `dtype`, `device_map`,
                `quantization_config`, `revision`, `subfolder`; for an adapter they go to the base model, and `is_trainable` to
                PEFT. What each of them does is in docs/compatibility.md.

        Returns:
            The model, or with `output_loading_info=True` the model and transformers' dictionary on how it was loaded.

        Raises:
            `ValueError`: if there is no `user_model/`, if a file is cut off, damaged, foreign or of a newer format, if it
                is not the one that was saved with the others, or if the user model does not fit the language model; or for an
                argument that does not work here.
        """
        name = str(pretrained_model_name_or_path)
        refuse_arguments(kwargs)
        subfolder = kwargs.pop("subfolder", None) or ""
        hub_kwargs = {key: kwargs[key] for key in HUB_PULL_ARGUMENTS if key in kwargs}
        user_folder = find_user_model(name, subfolder, **hub_kwargs)
        if user_folder is None:
            raise ValueError(
                f"{Path(name, subfolder)} has no `{USER_MODEL_FOLDER}/` folder, so it is not a personalized model. Load a "
                "plain language model with `AutoModelForCausalLM`, or train one with `PersonalizedDPOTrainer`."
                + (
                    ""
                    if Path(name).is_dir()
                    else " (There is no local folder of that name, and no repository was found or reached.)"
                )
            )
        user_model, user_vocab, config = load_user_model(user_folder, map_users)
        folder = user_folder.parent
        fetch_language_model(name, subfolder, config, **hub_kwargs)
        check_fingerprints(folder, config, needs_weights=True)
        model, info = _load_whole_folder(folder, config, kwargs)
        causal_lm = get_base_model(model)
        if model is causal_lm and not Path(name).is_dir():
            causal_lm.config.name_or_path = name  # and not its place in the cache
        num_tokens = embedding_size(causal_lm.get_input_embeddings())[0]
        bos_token_id = getattr(causal_lm.config.get_text_config(), "bos_token_id", None)
        check_bos_token_id(folder, config, num_tokens, bos_token_id)
        template = config.get("user_profile_template")
        joined = read_joined(user_folder, config)
        attach_user_model(model, user_model, user_vocab, config.get("bos_token_id"), template, joined)
        remember_saved(model, config)
        causal_lm.user_model_folder = str(folder)
        return (model, info) if kwargs.get("output_loading_info") else model


def refuse_arguments(kwargs: dict[str, Any]) -> None:
    """
    Refuse what would load something else than what was saved.

    Raises:
        `ValueError`: if one of `kwargs` does not work with users; it says what to do instead.
    """
    for name, instead in REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` does not work for a model with users. {instead}")
    if kwargs.get("use_safetensors") is False:
        raise ValueError("`use_safetensors=False` does not work for a model with users: its weights are safetensors.")


def find_user_model(name: str, subfolder: str = "", **hub_kwargs: Any) -> Path | None:
    """
    The `user_model/` folder of a local folder or a hub repository, or of a folder inside it; `None` if it has none.

    Raises:
        `ValueError`: if `user_model` is no folder.
    """
    if Path(name).is_dir():
        folder = Path(name, subfolder, USER_MODEL_FOLDER)
        if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
            raise ValueError(f"{folder} is not a folder. Put the `{USER_MODEL_FOLDER}/` folder back that was saved.")
        return folder if folder.is_dir() else None
    inside = Path(subfolder, USER_MODEL_FOLDER).as_posix()
    if cached(name, f"{inside}/{CONFIG_FILE}", hub_kwargs) is None:
        return None
    return Path(snapshot_download(name, allow_patterns=f"{inside}/*", **hub_kwargs)) / inside


def fetch_language_model(name: str, subfolder: str, config: dict[str, Any], **hub_kwargs: Any) -> None:
    """Download the files of the language model that a user model in a repository was saved with; nothing for a folder."""
    if not Path(name).is_dir():
        files = [*(config.get(LM_FILES_ENTRY) or ()), "*.json", "*.py"]
        patterns = [Path(subfolder, file).as_posix() for file in files]
        snapshot_download(name, allow_patterns=patterns, **hub_kwargs)


def load_user_model(folder: Path, map_users: bool = False) -> tuple[UserModel, UserVocab, dict[str, Any]]:
    """
    The user model in a `user_model/` folder, its vocabulary, and the entries of its config file. With `map_users`, tables are
    mapped from their file.

    Raises:
        `ValueError`: if a file is not the one that was saved, or an entry cannot be; or as [`UserModel.from_pretrained`].
    """
    user_model = UserModel.from_pretrained(folder, map_users=map_users)
    user_vocab = UserVocab.from_pretrained(folder)
    config = read_user_model_config(folder)
    with naming(folder / USERS_FILE):
        check_vocab(user_model, user_vocab)
    check_user_model_folder(folder, config)
    return user_model, user_vocab, config


def is_adapter(name: str, **hub_kwargs: Any) -> bool:
    """Whether a local folder or a hub repository holds a PEFT adapter, and not a whole language model."""
    return cached(name, ADAPTER_CONFIG, hub_kwargs) is not None


def reload_renamed_weights(model: nn.Module, checkpoint: Path) -> None:
    """
    Load a full model's checkpoint through `from_pretrained` if its files name the weights otherwise than the module does.

    transformers writes some families (experts of Mixtral, GPT-NeoX) under the names of their first release. Its `Trainer`
    reads checkpoints by the names in the module and lets the rest pass, so that resuming would start those weights anew.
    """
    saved = {name for file in checkpoint.glob("model*.safetensors") for name in safe_open(file, "pt").keys()}
    if saved <= set(model.state_dict()):
        return
    loaded, _ = _load_by_architecture(checkpoint, dtype=get_base_model(model).dtype)
    model.load_state_dict(loaded.state_dict(), strict=False)


def load_language_model(name: str, *, is_trainable: bool = False, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """The language model or adapter in a folder or repository, without users."""
    hub_kwargs = {key: kwargs[key] for key in HUB_PULL_ARGUMENTS if key in kwargs}
    if not is_adapter(name, **hub_kwargs):
        return _load_by_architecture(name, **kwargs)[0]
    if not Path(name).is_dir():
        name = snapshot_download(name, allow_patterns=["*.json", ADAPTER_WEIGHTS], **hub_kwargs)
    return _load_adapter(Path(name), {}, is_trainable, kwargs)[0]


def check_language_model_config(folder: Path, **kwargs: Any) -> None:
    """
    Make sure that the `config.json` in a local folder describes the weights beside it, before anything is allocated.

    Raises:
        `ValueError`: if it is damaged, or describes another model.
    """
    read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    config, architecture = _config_and_architecture(folder, kwargs)
    if isinstance(architecture, type) and issubclass(architecture, PreTrainedModel):
        check_sizes(folder, architecture, config)


def _load_whole_folder(folder: Path, config: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The language model or adapter in a local folder, whose fingerprints are right, and how it was loaded."""
    is_trainable = kwargs.get("is_trainable", False)
    if (folder / ADAPTER_CONFIG).is_file():
        kwargs = {key: value for key, value in kwargs.items() if key != "is_trainable"}
        return _load_adapter(folder, config, is_trainable, kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("is_trainable", *HUB_PULL_ARGUMENTS)}
    if any(kwargs.get(name) for name in OTHER_MODEL_ARGUMENTS):
        return _load_by_architecture(folder, **kwargs)
    check_language_model_config(folder, **kwargs)
    model, info = _load_by_architecture(folder, **kwargs)
    check_loaded(folder, info, getattr(model.config, "quantization_config", None) is not None)
    return model, info


def _load_adapter(
    folder: Path, config: dict[str, Any], is_trainable: bool, kwargs: dict[str, Any]
) -> tuple[PeftModel, dict[str, Any]]:
    path = folder / ADAPTER_CONFIG
    adapter = read_adapter_config(folder)
    name, revision = adapter["base_model_name_or_path"], adapter.get("revision") or "main"
    try:
        base, info = _load_by_architecture(name, **{**kwargs, "revision": revision})
    except OSError as error:
        raise FileNotFoundError(
            f"The base model {name}, which {path} names, cannot be loaded ({error}). If it has moved, write its new place "
            "into the file."
        ) from error
    check_base_model(folder, config, name, revision)
    _resize_as_saved(base, folder)
    with naming(path):
        return PeftModel.from_pretrained(
            base, str(folder), is_trainable=is_trainable, **_places_in_adapter(base, kwargs)
        ), info


def _places_in_adapter(base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Where the parts of an offloaded base model are, by their names in a `PeftModel`, which takes the model back first."""
    if not any(parameter.is_meta for parameter in base.parameters()):
        return {}
    places = {f"base_model.model.{name}" if name else "": place for name, place in base.hf_device_map.items()}
    return {"device_map": places, "offload_folder": kwargs.get("offload_folder")}


def _resize_as_saved(base: PreTrainedModel, folder: Path) -> None:
    """
    Give the base model as many tokens as it had when the adapter was trained: tokens may have been added, and PEFT saves
    the embeddings then. (`AutoPeftModelForCausalLM` goes by the tokenizer, which may well have more tokens than the model.)
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    header = read_header(folder / ADAPTER_WEIGHTS)
    names = {module: name for name, module in base.named_modules()}
    rows = {
        shape[1] if key.endswith("lora_embedding_A") else shape[0]
        for key, (shape, _) in header.items()
        if f".{names[embedding]}." in key and key.endswith((".weight", "lora_embedding_A")) and len(shape) == 2
    }
    if len(rows) == 1 and rows != {embedding_size(embedding)[0]}:
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)  # the rows come with the adapter
        is_tied = head is None or head.weight is embedding.weight
        if not is_tied and not any(f".{names[head]}." in key for key in header):
            logger.warning(
                "%s has embeddings of added tokens, but not their rows of `%s`, which PEFT does not save with an adapter on "
                "the embeddings: the logits of added tokens are random. Train with `modules_to_save=['%s']`.",
                folder / ADAPTER_WEIGHTS,
                names[head],
                names[head],
            )


def _load_by_architecture(name: str | Path, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The class that the config names, as TRL does: the automatic one for language models knows none that see images."""
    _, architecture = _config_and_architecture(name, kwargs)
    if architecture is not AutoModelForCausalLM:
        kwargs.pop("code_revision", None)  # of code that a repository brings; this class is transformers'
    return architecture.from_pretrained(name, **{**kwargs, "output_loading_info": True})


def _config_and_architecture(name: str | Path, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, Any]:
    """
    The config of a model and its class.

    Raises:
        `ValueError`: if a local `config.json` is damaged, or if the class is no model, or one of another config.
    """
    path = Path(name) / "config.json"
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        config_names = (*HUB_PULL_ARGUMENTS, "trust_remote_code", "code_revision")
        config_kwargs = {key: kwargs[key] for key in config_names if key in kwargs}
        if path.is_file():
            with naming(path):
                config = AutoConfig.from_pretrained(config or name, **config_kwargs)
        else:
            config = AutoConfig.from_pretrained(config or name, **config_kwargs)
    if not isinstance(config.dtype, torch.dtype | str | dict | None):
        raise ValueError(f"`dtype` in {path} must name a dtype of torch, got {config.dtype!r:.200}.")
    architectures: Any = config.architectures or [None]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str | None):
        raise ValueError(f"`architectures` in {path} must be a list of names of classes, got {architectures!r:.200}.")
    architecture = getattr(transformers, architectures[0] or "AutoModelForCausalLM", AutoModelForCausalLM)
    if architecture is AutoModelForCausalLM:
        return config, architecture
    if not isinstance(architecture, type) or not issubclass(architecture, PreTrainedModel):
        raise ValueError(f"`architectures` in {path} names {architectures[0]!r}, which is no model of transformers.")
    if not isinstance(config, architecture.config_class or PreTrainedConfig):
        raise ValueError(
            f"`architectures` in {path} names {architectures[0]}, which is no model of the type {config.model_type!r} that "
            "the file says. Put back the config that was saved."
        )
    return config, architecture


def cached(name: str, filename: str, hub_kwargs: dict[str, Any]) -> str | None:
    """Where a file of a local folder or a hub repository is; `None` if it has none."""
    return cached_file(
        name,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )
