"""Makes a causal language model one with users, in place, and undoes it."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..user_models import UserModel
from ..users import UserVocab
from .generation import PersonalizedGeneration
from .mixins import add_mixin, remove_mixin
from .saving import PersonalizedSaving, embedding_size, get_base_model
from .soft_prompt import SoftPromptInsertion


def is_personalized(model: nn.Module) -> bool:
    """Whether a user model is attached to `model`."""
    return isinstance(get_base_model(model), PersonalizedGeneration)


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
      plain model, bit for bit. `soft_prompts=...` `(batch, T, token_dim)` takes the place of `user_indices`.
    - `model.generate(..., user_ids=...)`, `model.save_pretrained(...)` and `model.push_to_hub(...)` know the users.
    - `model.user_model` is a submodule of the causal LM, `model.user_vocab` lists the users.

    The object keeps its type: its class becomes a subclass, of the same name, of the class it had.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The language model, which is changed in place.
        user_model (`UserModel`): The user model, which is moved to the device of the input embeddings.
        user_vocab (`UserVocab`): Says which row of the user model belongs to whom.
        bos_token_id (`int`, *optional*): Rows that start with this token get the soft prompt after it. Defaults to the
            `bos_token_id` in the model's config.
        user_profile_template (`str`, *optional*): The text around a user's profile in the prompts that the model was trained
            on, for [`render_user_profile`]. It is kept as `model.user_profile_template`.

    Raises:
        `ValueError`: if the model has a user model already, is not a decoder-only transformers model, or does not fit the
        user model or vocabulary.
    """
    causal_lm = get_base_model(model)
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
    add_mixin(causal_lm, PersonalizedGeneration)
    if model is not causal_lm:
        add_mixin(model, PersonalizedSaving)


def detach_user_model(model: nn.Module) -> tuple[UserModel, UserVocab]:
    """
    Undo [`attach_user_model`]: `model` is the plain language model again. Returns what was attached.

    Raises:
        `ValueError`: if there is no user model.
    """
    if not is_personalized(model):
        raise ValueError("The model has no user model attached.")
    causal_lm = get_base_model(model)
    user_model, user_vocab = causal_lm.user_model, causal_lm.user_vocab
    causal_lm._soft_prompt_insertion.remove()
    causal_lm._keys_to_ignore_on_save -= _user_model_keys(user_model)
    for name in ("user_model", "user_vocab", "user_profile_template", "_soft_prompt_insertion"):
        delattr(causal_lm, name)
    remove_mixin(causal_lm, PersonalizedGeneration)
    if model is not causal_lm:
        remove_mixin(model, PersonalizedSaving)
    return user_model, user_vocab


def check_vocab(user_model: UserModel, user_vocab: UserVocab) -> None:
    if user_model.config.num_users != len(user_vocab):
        raise ValueError(
            f"The user model has rows for {user_model.config.num_users} users, the vocabulary has {len(user_vocab)}. Give the "
            "vocabulary it was made for (`user_vocab=`), or a user model of that many users."
        )


def _check_fit(causal_lm: Any, user_model: UserModel, user_vocab: UserVocab) -> None:
    check_vocab(user_model, user_vocab)
    is_decoder = isinstance(causal_lm, PreTrainedModel) and not causal_lm.config.is_encoder_decoder
    if not is_decoder:
        raise ValueError(
            f"{type(causal_lm).__name__} is not a decoder-only transformers model. User models work with those only."
        )
    if causal_lm.get_decoder() is causal_lm:
        raise ValueError(f"{type(causal_lm).__name__} has no decoder below its LM head to insert soft prompts in.")
    _, width = embedding_size(causal_lm.get_input_embeddings())
    if user_model.config.token_dim != width:
        raise ValueError(
            f"The user model makes soft prompts of width {user_model.config.token_dim}, the token embeddings of "
            f"{type(causal_lm).__name__} have width {width}. Make a user model with `token_dim={width}`."
        )


def _user_model_keys(user_model: UserModel) -> set[str]:
    return {f"user_model.{name}" for name in user_model.state_dict()}
