"""Makes a causal language model one with users, in place, and undoes it."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..user_models import UserModel
from ..users import UserVocab
from .generation import PersonalizedGeneration
from .mixins import add_mixin, remove_mixin
from .saving import (
    PersonalizedSaving,
    check_vocab,
    embedding_size,
    get_base_model,
    is_personalized,
    user_model_keys,
)
from .soft_prompt import SoftPromptInsertion, find_decoder


logger = logging.getLogger(__name__)

FAMILIES_WITH_LAYER_EMBEDDINGS = {"gemma3n_text", "gemma4_text", "gemma4_unified_text"}
FAMILIES_OF_TOKENS = {
    "deepseek_v4": "it sends tokens to experts by their ids, and a soft prompt has no token ids",
    "prophetnet": "it reads other outputs of its decoder than hidden states, which cannot be aligned with the caller's tokens",
}


def attach_user_model(
    model: nn.Module,
    user_model: UserModel,
    user_vocab: UserVocab,
    bos_token_id: int | None = None,
    user_profile_template: str | None = None,
    joined: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """
    Make `model` (a causal LM, or a `PeftModel` around one) a model with users, in place:

    - `model(input_ids, attention_mask, user_indices=...)` conditions each row on a user; without `user_indices` it is the
      plain model, bit for bit. `soft_prompts=...` `(batch, T, token_dim)` takes the place of `user_indices`.
    - `model.generate(..., user_ids=...)`, `model.save_pretrained(...)` and `model.push_to_hub(...)` know the users.
    - `model.rename_users`, `copy_users`, `export_users`, `import_users` and `remove_users` let users come and go.
    - `model.user_model` is a submodule of the causal LM, `model.user_vocab` lists the users.

    The object keeps its type: its class becomes a subclass, of the same name, of the class it had.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The language model, which is changed in place.
        user_model (`UserModel`): The user model, which is moved to the device of the input embeddings (and stays where it is
            if those are offloaded).
        user_vocab (`UserVocab`): Says which row of the user model belongs to whom.
        bos_token_id (`int`, *optional*): Rows that start with this token get the soft prompt after it. Defaults to the
            `bos_token_id` in the model's config.
        user_profile_template (`str`, *optional*): The text around a user's profile in the prompts that the model was trained
            on, for [`render_user_profile`]. It is kept as `model.user_profile_template`.
        joined (`Mapping`, *optional*): What is known of users who came after the shared training, by id: see
            [`~models.known_users.KnownUsers`]. Defaults to none such.

    Raises:
        `ValueError`: if the model has a user model already, is not a decoder-only transformers model, or does not fit the
        user model or vocabulary.
    """
    causal_lm = get_base_model(model)
    if is_personalized(model):
        raise ValueError("The model has a user model already. Take it off first with `detach_user_model(model)`.")
    _check_fit(causal_lm, user_model, user_vocab)
    if model is causal_lm and "peft_config" in vars(model):
        logger.warning(
            "The model has an adapter of PEFT in it. If there is a `PeftModel` around it, attach the user model to that one: "
            "its `save_pretrained` does not write the users otherwise."
        )
    if bos_token_id is None:
        bos_token_id = getattr(causal_lm.config.get_text_config(), "bos_token_id", None)  # a few have none
    weight = causal_lm.get_input_embeddings().weight
    if not weight.is_meta:  # of a model that is offloaded
        user_model.to(weight.device)
    for module in user_model.modules():  # `init_weights` of transformers leaves them alone then
        module._is_hf_initialized = True  # type: ignore[assignment]
    causal_lm.add_module("user_model", user_model)
    causal_lm.user_vocab = user_vocab
    causal_lm.user_profile_template = user_profile_template
    causal_lm.joined_users = {user_id: dict(facts) for user_id, facts in (joined or {}).items()}
    causal_lm._soft_prompt_insertion = SoftPromptInsertion(causal_lm, bos_token_id)
    # transformers leaves these keys out of the LM's files, and does not miss them when it loads a checkpoint
    causal_lm._keys_to_ignore_on_save = set(causal_lm._keys_to_ignore_on_save or ()) | user_model_keys(user_model)
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
        raise ValueError(
            f"{type(model).__name__} has no user model attached. (Give the model itself, no wrapper of it.)"
        )
    causal_lm = get_base_model(model)
    user_model, user_vocab = causal_lm.user_model, causal_lm.user_vocab
    causal_lm._soft_prompt_insertion.remove()
    causal_lm._keys_to_ignore_on_save -= user_model_keys(user_model)
    for name in ("user_model", "user_vocab", "user_profile_template", "joined_users", "_soft_prompt_insertion"):
        delattr(causal_lm, name)
    remove_mixin(causal_lm, PersonalizedGeneration)
    if model is not causal_lm:
        remove_mixin(model, PersonalizedSaving)
    return user_model, user_vocab


def _reason_to_need_tokens(causal_lm: Any) -> str | None:
    """Why the decoder of a model is not content with embeddings, for the few families where it is not."""
    config = causal_lm.config.get_text_config()
    if config.model_type in FAMILIES_WITH_LAYER_EMBEDDINGS and config.hidden_size_per_layer_input:
        return "each of its layers has an embedding of its own for each token id, and a soft prompt has no token ids"
    return FAMILIES_OF_TOKENS.get(config.model_type)


def _check_fit(causal_lm: Any, user_model: UserModel, user_vocab: UserVocab) -> None:
    check_vocab(user_model, user_vocab)
    is_decoder = isinstance(causal_lm, PreTrainedModel) and not causal_lm.config.is_encoder_decoder
    if not is_decoder:
        raise ValueError(
            f"{type(causal_lm).__name__} is not a decoder-only transformers model. User models work with those only."
        )
    if find_decoder(causal_lm) is None:
        raise ValueError(
            f"{type(causal_lm).__name__} has no decoder below its LM head that takes embeddings (`inputs_embeds`), which soft "
            "prompts are. User models do not work with it."
        )
    if (reason := _reason_to_need_tokens(causal_lm)) is not None:
        raise ValueError(f"User models do not work with {type(causal_lm).__name__}: {reason}.")
    _, width = embedding_size(causal_lm.get_input_embeddings())
    if user_model.config.token_dim != width:
        raise ValueError(
            f"The user model makes soft prompts of width {user_model.config.token_dim}, the token embeddings of "
            f"{type(causal_lm).__name__} have width {width}. Make a user model with `token_dim={width}`."
        )
