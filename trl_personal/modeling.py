"""Language models with users: attach a user model, generate for a batch of users, save and load both together."""

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, cached_file

from .files import fingerprint, staged_folder, weight_files
from .soft_prompt import SoftPromptInsertion, insert_values
from .user_models import UserModel
from .user_models.base import CONFIG_FILE, read_user_model_config
from .user_profile import insert_profile_ids, require_template
from .users import GENERIC_USER_INDEX, UserId, UserVocab


logger = logging.getLogger(__name__)

USER_MODEL_FOLDER = "user_model"
HUB_PULL_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
HUB_PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


def get_causal_lm(model: nn.Module) -> Any:
    """The language model itself: `model`, or what is inside if it is a `PeftModel`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_personalized(model: nn.Module) -> bool:
    """Whether a user model is attached to `model`."""
    return isinstance(get_causal_lm(model), PersonalizedGeneration)


def attach_user_model(
    model: nn.Module,
    user_model: UserModel,
    user_vocab: UserVocab,
    bos_token_id: int | None = None,
    user_profile_template: str | None = None,
) -> None:
    """
    Make `model` (a causal LM, or a `PeftModel` around one) a model with users, in place:

    - `model(input_ids, attention_mask, user_indices=...)` conditions each row on a user; without `user_indices` it is the
      plain model, bit for bit.
    - `model.generate(..., user_ids=...)`, `model.save_pretrained(...)` and `model.push_to_hub(...)` know the users.
    - `model.user_model` is a submodule of the causal LM, `model.user_vocab` lists the users.

    The object keeps its type: its class becomes a subclass, of the same name, of the class it had.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Changed in place.
        user_model (`UserModel`): Moved to the device of the input embeddings.
        user_vocab (`UserVocab`): Whose rows they are.
        bos_token_id (`int`, *optional*): Rows that start with this token get the soft prompt after it. Defaults to the
            model config's.
        user_profile_template (`str`, *optional*): How profiles read in the prompts it was trained on, for
            [`render_user_profile`]; kept as `model.user_profile_template`.

    Raises:
        `ValueError`: if the model has a user model already, is no decoder-only language model, or does not fit the
        user model or vocabulary.
    """
    causal_lm = get_causal_lm(model)
    if is_personalized(model):
        raise ValueError("The model has a user model already. Take it off first with `detach_user_model(model)`.")
    _check_fit(causal_lm, user_model, user_vocab)
    if bos_token_id is None:
        bos_token_id = causal_lm.config.get_text_config().bos_token_id
    weight = causal_lm.get_input_embeddings().weight
    causal_lm.add_module("user_model", user_model.to(weight.device))
    causal_lm.user_vocab = user_vocab
    causal_lm.user_profile_template = user_profile_template
    causal_lm._soft_prompt_insertion = SoftPromptInsertion(causal_lm, bos_token_id)
    # transformers leaves these keys out of the LM's files, and does not miss them when it loads a checkpoint
    causal_lm._keys_to_ignore_on_save = set(causal_lm._keys_to_ignore_on_save or ()) | _user_model_keys(user_model)
    _add_base(causal_lm, PersonalizedGeneration)
    if model is not causal_lm:
        _add_base(model, PersonalizedSaving)


def detach_user_model(model: nn.Module) -> tuple[UserModel, UserVocab]:
    """
    Undo [`attach_user_model`]: `model` is the plain language model again. Returns what was attached.

    Raises:
        `ValueError`: if there is no user model.
    """
    if not is_personalized(model):
        raise ValueError("The model has no user model attached.")
    causal_lm = get_causal_lm(model)
    user_model, user_vocab = causal_lm.user_model, causal_lm.user_vocab
    causal_lm._soft_prompt_insertion.remove()
    causal_lm._keys_to_ignore_on_save -= _user_model_keys(user_model)
    for name in ("user_model", "user_vocab", "user_profile_template", "_soft_prompt_insertion"):
        delattr(causal_lm, name)
    for module in {id(m): m for m in (causal_lm, model)}.values():
        module.__class__ = type(module).__bases__[1]
    return user_model, user_vocab


class PersonalizedSaving:
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
        """
        save = super().save_pretrained  # type: ignore[misc]
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
        if any(name.startswith("model") for name in written):
            for name in weight_files(target) - written:  # shards of an earlier save, or the adapter before a merge
                (target / name).unlink()
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", target.name), **hub_kwargs)  # type: ignore[attr-defined]


class PersonalizedGeneration(PersonalizedSaving):
    """Added in front of a causal LM's class by [`attach_user_model`]: generation for a batch of users."""

    user_model: UserModel
    user_vocab: UserVocab
    user_profile_template: str | None
    _soft_prompt_insertion: SoftPromptInsertion

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        user_ids: str | int | Sequence[UserId] | None = None,
        user_profiles: str | Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        [`~transformers.GenerationMixin.generate`] for users.

        Args:
            inputs (`torch.LongTensor` `(batch, seq_len)`, *optional*): Prompt ids, also as `input_ids=`. Prompts of
                different lengths are padded on the left, with an `attention_mask`.
            generation_config (`GenerationConfig`, *optional*): As in transformers.
            user_ids (`str`, `int` or a list of them, *optional*): One user per row, or one for all rows. `None` and users
                who are not in `user_vocab` get the generic user's soft prompt.
            user_profiles (`str` or a list of them, *optional*): What is known about the user of each row, or `None`, put into
                the prompts as in training. It needs `tokenizer=`, to read the ids and write them anew.
            **kwargs: As in transformers. `max_length` and `min_length` count the tokens of `inputs` and new ones only.

        Returns:
            As in transformers: the prompt ids and the new tokens. Virtual tokens and profiles do not show.

        Raises:
            `ValueError`: if `user_ids` or `user_profiles` is a list of another length than the batch; for profiles, if there
            is no `tokenizer`, if the model was trained without them, or if they cannot be put into ids (rather put them into
            the text, with [`render_user_profile`]).
        """
        generate = super().generate  # type: ignore[misc]
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("`generate` for users needs `input_ids`: without text there is no row to put a user in.")
        config = generation_config or self.generation_config  # type: ignore[attr-defined]
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = _mask_from_padding(input_ids, config)
        callers_ids = input_ids
        if user_profiles is not None:
            tokenizer = kwargs.get("tokenizer")
            input_ids, attention_mask = self._insert_profiles(user_profiles, tokenizer, input_ids, attention_mask)
        user_indices = torch.tensor(self._encode_users(user_ids, input_ids.shape[0]), device=input_ids.device)
        users, of_user = user_indices.unique(return_inverse=True)  # each user's soft prompt is computed once
        with torch.no_grad():
            soft_prompt = self.user_model(users)[of_user]
            conditioned, _, token, virtual = self._soft_prompt_insertion.condition(
                user_indices, input_ids, attention_mask, soft_prompt=soft_prompt
            )
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = insert_values(kwargs["token_type_ids"], token, virtual, 0)
        filler = _filler_ids(input_ids, attention_mask, config)
        placeholders = insert_values(torch.where(attention_mask.ne(0), input_ids, filler), token, virtual, filler)
        view = _CallersView(callers_ids, placeholders.shape[1])
        for name in ("max_length", "min_length"):
            length = kwargs.get(name) or getattr(config, name)
            if length:
                kwargs[name] = length + placeholders.shape[1] - callers_ids.shape[1]
        outputs = generate(placeholders, generation_config, **conditioned, **view.adapt(kwargs))
        if isinstance(outputs, ModelOutput):
            outputs["sequences"] = view.restore(outputs["sequences"])
            return outputs
        return view.restore(outputs)

    def _insert_profiles(
        self,
        user_profiles: str | Sequence[str | None],
        tokenizer: PreTrainedTokenizerBase | None,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the left, with the profile of each row in it."""
        template = require_template(self.user_profile_template)
        if tokenizer is None:
            raise ValueError(
                "`user_profiles` needs `tokenizer=`: `generate` gets token ids, and a profile belongs into their text."
            )
        if isinstance(user_profiles, str):
            user_profiles = [user_profiles] * input_ids.shape[0]
        if len(user_profiles) != input_ids.shape[0]:
            raise ValueError(
                f"`user_profiles` has {len(user_profiles)} texts for a batch of {input_ids.shape[0]} rows. Give one per row "
                "(`None` where nothing is known), or a single one for all rows."
            )
        rows = [
            torch.tensor(insert_profile_ids(ids[mask].tolist(), profile, template, tokenizer), device=ids.device)
            for ids, mask, profile in zip(input_ids, attention_mask.ne(0), user_profiles, strict=True)
        ]
        padded = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
        return padded.clamp(min=0), padded.ge(0).long()

    def _encode_users(self, user_ids: str | int | Sequence[UserId] | None, batch_size: int) -> list[int]:
        if user_ids is None or isinstance(user_ids, (str, int)):
            user_ids = [user_ids] * batch_size
        if len(user_ids) != batch_size:
            raise ValueError(
                f"`user_ids` has {len(user_ids)} users for a batch of {batch_size} rows. Give one per row, or a single id "
                "for all rows. A pipeline hands prompts over one by one: call `model.generate(..., user_ids=[...])` with "
                "the tokenized batch for different users."
            )
        user_indices = self.user_vocab.encode(user_ids)
        unknown = sum(i == GENERIC_USER_INDEX and u is not None for i, u in zip(user_indices, user_ids, strict=True))
        if unknown:
            logger.warning(
                "%d of %d rows have a user who is not in `model.user_vocab`; they get the generic user's soft prompt.",
                unknown,
                batch_size,
            )
        return user_indices


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
            pretrained_model_name_or_path (`str` or `Path`): A folder, or a repository on the hub.
            **kwargs: Those of [`~transformers.AutoModelForCausalLM.from_pretrained`], such as `dtype`, `device_map`,
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
                    else " (It is no local folder; as a repository it was not found or not reached.)"
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
    _check_vocab(user_model, user_vocab)
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
    loaded = _load_by_architecture(checkpoint, dtype=get_causal_lm(model).dtype)
    model.load_state_dict(loaded.state_dict(), strict=False)


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


def save_user_model(model: nn.Module, directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """
    Write `user_model/` into `directory`, with fingerprints of the weights that are there. `state_dict` replaces the user
    model's own, for weights gathered from other processes.
    """
    causal_lm = get_causal_lm(model)
    folder = directory / USER_MODEL_FOLDER
    template = causal_lm.user_profile_template
    causal_lm.user_vocab.save_pretrained(folder)
    causal_lm.user_model.save_files(
        folder,
        state_dict,
        bos_token_id=causal_lm._soft_prompt_insertion.bos_token_id,
        **({"user_profile_template": template} if template is not None else {}),
        language_model_files={name: fingerprint(directory / name) for name in sorted(weight_files(directory))},
    )


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


def _user_model_keys(user_model: UserModel) -> set[str]:
    return {f"user_model.{name}" for name in user_model.state_dict()}


def _add_base(module: Any, mixin: type) -> None:
    module.__class__ = _personalized_class(mixin, module.__class__)


@cache
def _personalized_class(mixin: type, cls: Any) -> Any:
    # transformers and PEFT write and compare class names, so the subclass keeps the name of the class
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _check_vocab(user_model: UserModel, user_vocab: UserVocab) -> None:
    if user_model.config.num_users != len(user_vocab):
        raise ValueError(
            f"The user model has rows for {user_model.config.num_users} users, the vocabulary has {len(user_vocab)}. Give the "
            "vocabulary it was made for (`user_vocab=`), or a user model of that many users."
        )


def _check_fit(causal_lm: Any, user_model: UserModel, user_vocab: UserVocab) -> None:
    _check_vocab(user_model, user_vocab)
    is_decoder = isinstance(causal_lm, PreTrainedModel) and not causal_lm.config.is_encoder_decoder
    if not is_decoder:
        raise ValueError(
            f"{type(causal_lm).__name__} is no decoder-only language model of transformers; only those can have users."
        )
    if causal_lm.get_decoder() is causal_lm:
        raise ValueError(f"{type(causal_lm).__name__} has no decoder below its LM head to insert soft prompts in.")
    width = causal_lm.get_input_embeddings().embedding_dim
    if user_model.config.token_dim != width:
        raise ValueError(
            f"The user model makes soft prompts of width {user_model.config.token_dim}, the token embeddings of "
            f"{type(causal_lm).__name__} have width {width}. Make a user model with `token_dim={width}`."
        )


def _mask_from_padding(input_ids: Tensor, config: GenerationConfig) -> Tensor:
    """Without an attention mask, padding shows by its id, unless EOS has the same id (as in transformers)."""
    if config.pad_token_id is None or config.pad_token_id in _eos_ids(config):
        return torch.ones_like(input_ids)
    return input_ids.ne(config.pad_token_id).long()


def _filler_ids(input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig) -> Tensor:
    """
    Ids `(batch, 1)` for columns without a token, which penalties and n-gram bans see too: padding, as it is never
    generated, or where padding and EOS have one id, the first token of the row.
    """
    if config.pad_token_id is not None and config.pad_token_id not in _eos_ids(config):
        return torch.full_like(input_ids[:, :1], config.pad_token_id)
    return input_ids.gather(1, attention_mask.ne(0).int().argmax(dim=1)[:, None])


def _eos_ids(config: GenerationConfig) -> list[int]:
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


class _CallersView:
    """Hides the placeholder columns of `generate` from the caller, and from the code that the caller passes in."""

    def __init__(self, input_ids: Tensor, conditioned_length: int) -> None:
        self.input_ids = input_ids
        self.conditioned_length = conditioned_length

    def restore(self, sequences: Tensor) -> Tensor:
        """`sequences` with the caller's prompts in place of the conditioned ones; each may occur several times."""
        prompts = self.input_ids.repeat_interleave(sequences.shape[0] // self.input_ids.shape[0], dim=0)
        return torch.cat([prompts.to(sequences.device), sequences[:, self.conditioned_length :]], dim=1)

    def adapt(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` of `generate` in which the caller's processors, criteria and streamer see the caller's ids."""
        adapted = dict(kwargs)
        for name, list_class in (
            ("logits_processor", LogitsProcessorList),
            ("stopping_criteria", StoppingCriteriaList),
        ):
            if kwargs.get(name):
                adapted[name] = list_class(self._with_callers_ids(function) for function in kwargs[name])
        if kwargs.get("prefix_allowed_tokens_fn"):
            allowed, prompts = kwargs["prefix_allowed_tokens_fn"], self.input_ids
            adapted["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([prompts[row].to(ids.device), ids[self.conditioned_length :]])
            )
        if kwargs.get("streamer") is not None:
            adapted["streamer"] = _PromptStreamer(kwargs["streamer"], self.input_ids)
        return adapted

    def _with_callers_ids(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda ids, scores, **kwargs: function(self.restore(ids), scores, **kwargs)


class _PromptStreamer(BaseStreamer):
    """Hands the caller's prompt to a streamer in place of the conditioned one, which `generate` puts first."""

    def __init__(self, streamer: BaseStreamer, input_ids: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = input_ids

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt.cpu(), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
