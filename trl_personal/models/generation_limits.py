"""What `generate` cannot do for users: refused by name, before a token is written."""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


logger = logging.getLogger(__name__)

# arguments of `generate`, or settings of a `GenerationConfig`, that go by token ids where users are embeddings
REFUSED = {
    "assistant_model": "assisted decoding drafts and checks from token ids, which do not hold the soft prompt",
    "prompt_lookup_num_tokens": "assisted decoding checks its drafts from token ids, which do not hold the soft prompt",
    "assistant_early_exit": "assisted decoding drafts from token ids, which do not hold the soft prompt",
    "use_mtp": "assisted decoding drafts from token ids, which do not hold the soft prompt",
    "custom_generate": "a decoding loop of one's own may read token ids, which do not hold the soft prompt",
    "prefill_chunk_size": "prefilling in chunks reads token ids, which do not hold the soft prompt",
    "token_healing": "it writes the end of the prompt anew in token ids, which do not hold the soft prompt",
    "inputs_embeds": "the soft prompt is put into the embeddings of `input_ids`",
    "cache_params": "the state of another call cannot be told from that of another user",
}


def refuse_what_needs_token_ids(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """
    Make sure that nothing is asked for that would write other text than the user's in silence.

    Raises:
        `ValueError`: for an argument, or a setting in `config`, that is in `REFUSED`.
    """
    for name, reason in REFUSED.items():
        value = kwargs[name] if name in kwargs else getattr(config, name, None)
        if value is not None and value is not False:
            raise ValueError(
                f"`generate` for users does not take `{name}`: {reason}. Leave it out, or take the users off first "
                "(`detach_user_model(model)`)."
            )


def reason_not_to_write(causal_lm: Any) -> str | None:
    """Why a model cannot write for users, though it can be trained with them; `None` if it can."""
    prepare = causal_lm.prepare_inputs_for_generation
    if "inputs_embeds" in inspect.signature(prepare).parameters:
        return None
    return (
        f"transformers' `generate` takes no embeddings in {type(causal_lm).__name__}, and a user's soft prompt is one: the "
        "model can be trained and evaluated with users, but it cannot write (`generate`) for them"
    )


def check_positions(causal_lm: Any, num_columns: int, num_new: int, num_virtual_tokens: int) -> None:
    """
    Make sure that a prompt with its soft prompt fits the model's positions; warn if its answer may not.

    Args:
        causal_lm (`PreTrainedModel`): The model.
        num_columns (`int`): Columns of the longest row, the soft prompt's among them.
        num_new (`int`): The most tokens that are to be written.
        num_virtual_tokens (`int`): How many of the columns are the soft prompt's.

    Raises:
        `ValueError`: if the prompt does not fit.
    """
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    if num_columns > positions:
        raise ValueError(
            f"The model has {positions} positions, but a prompt has {num_columns - num_virtual_tokens} tokens and the soft "
            f"prompt {num_virtual_tokens}. Shorten the prompt to {positions - num_virtual_tokens} tokens or less."
        )
    if num_columns + num_new > positions:
        logger.warning(
            "The model has %d positions; %d for the prompt, %d for the soft prompt and up to %d new tokens are more. Set "
            "`max_new_tokens` to %d or less.",
            positions,
            num_columns - num_virtual_tokens,
            num_virtual_tokens,
            num_new,
            positions - num_columns,
        )


# --- Caches -----------------------------------------------------------------------------------------------------------


def is_cache(value: object) -> bool:
    """Whether `value` is a cache of keys and values, of any class of transformers."""
    return hasattr(value, "get_seq_length")


def check_cache(name: str, cache: Any, soft_prompts: Tensor, first_columns: Tensor) -> None:
    """
    Make sure that a cache is empty, or holds these soft prompts in these rows.

    Args:
        name (`str`): The argument of `generate` that it is.
        cache (`Cache`): What the caller passes to go on from.
        soft_prompts (`Tensor` `(batch, num_virtual_tokens, token_dim)`): Those of the users in this call.
        first_columns (`LongTensor` `(batch,)`): The column of each row's first virtual token.

    Raises:
        `ValueError`: if it holds other users' tokens, or those of nobody knows whom.
    """
    if cache.get_seq_length() == 0:
        return
    kept = getattr(cache, "soft_prompts_of_rows", None)
    advice = "Pass the cache that `generate` for the same users has filled, an empty one, or none."
    if kept is None:
        raise ValueError(
            f"The cache in `{name}` is not empty, and was not filled by `generate` for users: it holds no soft "
            f"prompt. {advice}"
        )
    prompts, columns = kept
    same = prompts.shape == soft_prompts.shape and torch.equal(prompts.to(soft_prompts), soft_prompts)
    if not same or not torch.equal(columns.to(first_columns), first_columns):
        raise ValueError(
            f"The cache in `{name}` was filled for other users, or for other rows of them: their text would go on. "
            f"{advice}"
        )
    if cache.get_seq_length() < int(columns.max()) + prompts.shape[1]:
        raise ValueError(f"The cache in `{name}` was cropped into the soft prompt. {advice}")


def mark_cache(cache: Any, soft_prompts: Tensor, first_columns: Tensor, num_rows: int) -> None:
    """Let a cache say whose rows it holds, for [`check_cache`]; a search with other rows than the batch leaves nobody's."""
    belongs = soft_prompts.shape[0] == num_rows
    cache.soft_prompts_of_rows = (soft_prompts.detach().clone(), first_columns.clone()) if belongs else None
