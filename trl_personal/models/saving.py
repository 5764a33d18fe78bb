"""Writes the user model beside the language model, as one save."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import staged_folder, weight_files
from ..user_models import UserModel
from ..user_models.base import CONFIG_FILE
from ..users import JOINED_FILE, UserVocab
from .folder_checks import BASE_FILES_ENTRY, LM_FILES_ENTRY, base_model_files, language_model_files
from .joined import write_joined
from .joining import JoiningUsers


USER_MODEL_FOLDER = "user_model"
SAMPLED_NUMBERS = 4096  # of a weight, to tell whether it has changed since it was saved
HUB_PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


def get_base_model(model: nn.Module) -> Any:
    """The language model itself: `model`, or what is inside if it is a `PeftModel`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_personalized(model: nn.Module) -> bool:
    """Whether a user model is attached to `model`."""
    return isinstance(get_base_model(model), PersonalizedSaving)


class PersonalizedSaving(JoiningUsers):
    """Added in front of a model's class by [`attach_user_model`]: writes the user model beside the language model."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Write the language model (or adapter) as transformers (or PEFT) does, and `user_model/` beside it.

        Each file is replaced as a whole. `user_model_config.json` comes last and holds fingerprints of the weights beside
        it, so a folder in which a kill left files of two saves is refused by [`AutoPersonalizedModelForCausalLM`]. Other
        arguments are those of the model's own `save_pretrained`.

        Raises:
            `ValueError`: if what is to be written could not be loaded again: users that are not those of the vocabulary, or
            4-bit weights that bitsandbytes has repacked for a CPU.
        """
        save = super().save_pretrained  # type: ignore[misc]
        if not is_personalized(self):  # type: ignore[arg-type]  # the users were taken off the model inside
            more = {"push_to_hub": True} if push_to_hub else {}
            save(save_directory, *args, is_main_process=is_main_process, state_dict=state_dict, **kwargs, **more)
            return
        _check_what_is_saved(self)
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_PUSH_ARGUMENTS if name in kwargs}
        if not is_main_process:
            save(save_directory, *args, is_main_process=False, state_dict=state_dict, **kwargs)
            return
        target = Path(save_directory)
        user_state = None  # the user model's own, unless the caller gathered the weights from other processes
        if state_dict is not None:
            prefix = user_model_prefix(self)  # type: ignore[arg-type]
            user_state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(prefix)}
        with staged_folder(target, last=CONFIG_FILE) as staging:
            if (target / "README.md").is_file():  # PEFT adds to the card that is there
                shutil.copy(target / "README.md", staging)
            save(str(staging), *args, is_main_process=True, state_dict=state_dict, **kwargs)
            if user_state != {}:  # a caller that gathered nothing writes the user model itself
                save_user_model(self, staging, user_state)  # type: ignore[arg-type]
            written = weight_files(staging)
        if user_state != {} and not get_base_model(self).joined_users:  # type: ignore[arg-type]
            (target / USER_MODEL_FOLDER / JOINED_FILE).unlink(missing_ok=True)
        if any(name.startswith("model") for name in written):
            for name in weight_files(target) - written:  # shards of an earlier save, or the adapter before a merge
                (target / name).unlink()
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", target.name), **hub_kwargs)  # type: ignore[attr-defined]


def check_vocab(user_model: UserModel, user_vocab: UserVocab) -> None:
    """
    Make sure that there is a row for each user.

    Raises:
        `ValueError`: if the user model is one of more users than the vocabulary lists, or of fewer.
    """
    if user_model.config.num_users != len(user_vocab):
        raise ValueError(
            f"The user model has rows for {user_model.config.num_users} users, the vocabulary has {len(user_vocab)}. Give the "
            "vocabulary it was made for (`user_vocab=`), or a user model of that many users."
        )


def user_model_keys(user_model: UserModel) -> set[str]:
    """The names that the parameters and buffers of a user model have in a language model."""
    return {f"user_model.{name}" for name in user_model.state_dict()}


def _check_what_is_saved(model: Any) -> None:
    """Let a user model that was put in the place of another one be saved as such, and refuse what could not be loaded."""
    causal_lm = get_base_model(model)
    check_vocab(causal_lm.user_model, causal_lm.user_vocab)
    causal_lm._keys_to_ignore_on_save |= user_model_keys(causal_lm.user_model)
    for name, module in model.named_modules():
        if getattr(getattr(module, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked the 4-bit weights of `{name}` for this CPU when they were first used, and does "
                "not undo that rightly: what is saved, and the model itself, would be something else. Load the model again, "
                "and save it before it is used."
            )


def save_user_model(model: nn.Module, directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """
    Write `user_model/` into `directory`, with fingerprints of the weights that are there, and of the base model of an
    adapter. `state_dict` replaces the user model's own, for weights gathered from other processes.
    """
    causal_lm = get_base_model(model)
    folder = directory / USER_MODEL_FOLDER
    if state_dict is None and any(parameter.is_meta for parameter in causal_lm.user_model.parameters()):
        # accelerate leaves the parameters of the outermost module out
        found = get_state_dict_offloaded_model(nn.ModuleDict({"users": causal_lm.user_model}))
        state_dict = {name.removeprefix("users."): value for name, value in found.items()}
    template = causal_lm.user_profile_template
    causal_lm.user_vocab.save_pretrained(folder)
    write_joined(folder, causal_lm.joined_users)
    files = {
        LM_FILES_ENTRY: language_model_files(directory),
        **({BASE_FILES_ENTRY: _base_model_files(model)} if isinstance(model, PeftModel) else {}),
    }
    causal_lm.user_model.save_files(
        folder,
        state_dict,
        bos_token_id=causal_lm._soft_prompt_insertion.bos_token_id,
        **({"user_profile_template": template} if template is not None else {}),
        **files,
    )
    remember_saved(model, files)


def remember_saved(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Keep the fingerprints in `config`, those of the files that the language model was loaded from or saved to just now."""
    names = (LM_FILES_ENTRY, BASE_FILES_ENTRY)
    files = {name: dict(config[name]) for name in names if config.get(name)}
    causal_lm = get_base_model(model)
    causal_lm.saved_language_model = (files, _sample_of_weights(causal_lm))


def saved_language_model(causal_lm: Any) -> dict[str, dict[str, str]]:
    """
    Fingerprints of the files of a language model, as the user model's config has them.

    Raises:
        `ValueError`: if there are none of its present weights: it was not loaded from a folder, or trained or cast since.
    """
    files, sample = getattr(causal_lm, "saved_language_model", ({}, ""))
    if not files or not sample or sample != _sample_of_weights(causal_lm):
        raise ValueError(
            "Rows of users belong to the shared parts that they were fitted beside, and nothing says which those are: the "
            "language model has no files yet, or was trained or cast since. Save it with `model.save_pretrained(folder)`."
        )
    return dict(files)


@torch.no_grad()
def _sample_of_weights(causal_lm: Any) -> str:
    """
    SHA-256 of numbers spread over the weights that can be trained, without users: a step of training moves some of them. Empty
    where FSDP2 has sharded them: what one process has tells nothing of the whole.
    """
    digest = hashlib.sha256()
    for name, parameter in causal_lm.named_parameters():
        if isinstance(parameter, DTensor):
            return ""
        if parameter.is_floating_point() and not parameter.is_meta and not name.startswith("user_model."):
            numbers = parameter.flatten()[:: max(1, parameter.numel() // SAMPLED_NUMBERS)]
            digest.update(name.encode() + str(parameter.dtype).encode() + numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _base_model_files(model: PeftModel) -> dict[str, str]:
    config: Any = model.peft_config[model.active_adapter]
    name = config.base_model_name_or_path or get_base_model(model).config.name_or_path
    return base_model_files(str(name), config.revision) if name else {}


def embedding_size(embedding: nn.Module) -> tuple[int, int]:
    """
    The number of tokens and the width of input embeddings, from the `nn.Embedding` itself where PEFT has wrapped it, and
    also where DeepSpeed has taken the weights away.

    ```python
    >>> embedding_size(nn.Embedding(19, 32))
    (19, 32)
    ```
    """
    for module in embedding.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
    weight: Any = embedding.weight
    return weight.shape[0], weight.shape[1]


def user_model_prefix(model: nn.Module) -> str:
    """What the names of the user model's parameters start with in `model.state_dict()`."""
    return next(name for name, module in model.named_modules() if isinstance(module, UserModel)) + "."


def full_user_state(user_model: UserModel) -> dict[str, Tensor]:
    """The weights of a user model, gathered from the ranks of FSDP2 if they are sharded; every rank must call it."""
    state = user_model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


@torch.no_grad()
def set_user_state(user_model: UserModel, state: dict[str, Tensor]) -> None:
    """Copy weights into a user model, to each rank of FSDP2 its shard if they are sharded."""
    for name, parameter in user_model.state_dict().items():
        value = state[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
