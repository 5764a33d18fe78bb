"""Generation for a batch of users."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, Pipeline, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..user_models import UserModel
from ..user_profile import insert_profile_ids, require_template
from ..users import UserVocab
from .blending import UserOrBlend, as_strengths, blended_soft_prompts
from .calls import OwnCalls
from .generation_limits import (
    check_cache,
    check_positions,
    is_cache,
    mark_cache,
    reason_not_to_write,
    refuse_what_needs_token_ids,
)
from .saving import PersonalizedSaving
from .soft_prompt import SoftPromptInsertion, insert_position_ids, insert_values
from .user_methods import PersonalizedUsers


logger = logging.getLogger(__name__)

ADAPTER_AROUND = (
    "PEFT has put an adapter around a model that has users. It is called and writes as before, but the adapter's "
    "`save_pretrained` does not write the users, and PEFT has frozen them. Put the adapter on first: "
    "`users = detach_user_model(model)`, `model = get_peft_model(model, config)`, `attach_user_model(model, *users)`."
)
CONTINUOUS_BATCHING = (
    "`{name}` (continuous batching) does not know users: it takes token ids, which do not hold a soft prompt, and would "
    "write the plain model's text. Use `generate(..., user_ids=[...])`, or take the users off first "
    "(`detach_user_model(model)`)."
)


class PersonalizedGeneration(PersonalizedSaving, PersonalizedUsers, OwnCalls):
    """Added in front of a causal LM's class by [`attach_user_model`]: generation for a batch of users, who come and go."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Says so when PEFT, which leaves `peft_config` in a model, puts an adapter around one that has users."""
        if name == "peft_config" and name not in vars(self):
            logger.warning(ADAPTER_AROUND)
        super().__setattr__(name, value)

    user_model: UserModel
    user_vocab: UserVocab
    user_profile_template: str | None
    _soft_prompt_insertion: SoftPromptInsertion

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        user_ids: str | int | Sequence[UserOrBlend] | None = None,
        user_strength: float | Sequence[float] | None = None,
        user_profiles: str | Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        [`~transformers.GenerationMixin.generate`] for users.

        Args:
            inputs (`torch.LongTensor` `(batch, seq_len)`, *optional*): The token ids of the prompts. `input_ids=` is another
                name for them. Prompts of different lengths are padded on the left and come with an `attention_mask`.
            generation_config (`GenerationConfig`, *optional*): The settings of generation. Defaults to
                `model.generation_config`.
            user_ids (`str`, `int` or a list of them, *optional*): The user of each row, or one user for all rows. `None` and
                users who are not in `user_vocab` get the generic user's soft prompt. In a list, a dictionary of weights is a
                blend: `{"ann": 0.7, "bo": 0.3}`; weights need not sum to one.
            user_strength (`float` or a list of them, *optional*): How far each row goes from the generic user (0) to the user
                (1, the default), in [-1, 2]: the soft prompt is e_0 + s · Σ w_u (e_u - e_0).
            user_profiles (`str` or a list of them, *optional*): A text about the user of each row, or `None` where nothing is
                known. It is put into the prompts as in training, which needs `tokenizer=` to read and write their ids.
            **kwargs: Every other argument of [`~transformers.GenerationMixin.generate`]. `max_length` and `min_length` count
                the tokens of `inputs` and new ones only.

        Returns:
            What transformers returns: the prompt ids and the new tokens. Virtual tokens and profiles do not show.

        Raises:
            `TypeError`: if `user_ids` is neither an id nor a list of them. `ValueError`: if `user_ids` or `user_profiles` is a
            list of another length than the batch; for arguments that go by token ids, such as `assistant_model`; for a cache
            that other users have filled; if a prompt does not fit the model's positions; for profiles, if there
            is no `tokenizer`, if the model was trained without them, or if they cannot be put into ids (rather put them into
            the text, with [`render_user_profile`]).
        """
        generate = super().generate  # type: ignore[misc]
        if (reason := reason_not_to_write(self)) is not None:
            raise ValueError(f"{reason[0].upper()}{reason[1:]}.")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("`generate` for users needs `input_ids`: without text there is no row to put a user in.")
        config = generation_config or self.generation_config  # type: ignore[attr-defined]
        refuse_what_needs_token_ids(config, kwargs)
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = _mask_from_padding(input_ids, config)
        callers_ids = input_ids  # what shows outside; below, `input_ids` may have profiles in it
        if user_profiles is not None:
            tokenizer = kwargs.get("tokenizer")
            input_ids, attention_mask = self._insert_profiles(user_profiles, tokenizer, input_ids, attention_mask)
        with torch.no_grad():
            embeds = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
            input_ids, attention_mask = input_ids.to(embeds.device), attention_mask.to(embeds.device)
            soft_prompt = self._soft_prompts(user_ids, user_strength, input_ids)
            conditioned, positions, token, virtual = self._soft_prompt_insertion.condition(
                soft_prompt, input_ids, attention_mask, embeds
            )
        caches = {name: value for name, value in kwargs.items() if is_cache(value)}
        for name, cache in caches.items():
            check_cache(name, cache, soft_prompt, positions)
        for name, values in kwargs.items():
            if isinstance(values, Tensor) and values.shape[-1:] == input_ids.shape[-1:] and name == "position_ids":
                kwargs[name] = insert_position_ids(values, positions, token, virtual)
            elif isinstance(values, Tensor) and values.shape == input_ids.shape and name.endswith("token_type_ids"):
                kwargs[name] = insert_values(values, token, virtual, 0)
        # transformers generates from embeddings, as they alone hold the soft prompt, and gets ids beside them: logits
        # processors look at ids. Columns without a token need an id too, one on which penalties have no effect.
        filler = _filler_ids(input_ids, attention_mask, config)
        placeholders = insert_values(torch.where(attention_mask.ne(0), input_ids, filler), token, virtual, filler)
        view = _CallersView(callers_ids, placeholders.shape[1])
        for name in ("max_length", "min_length"):  # in transformers they count all columns; for the caller, its own
            length = kwargs.get(name) or getattr(config, name)
            if length:
                kwargs[name] = length + placeholders.shape[1] - callers_ids.shape[1]
        num_new = kwargs.get("max_new_tokens") or config.max_new_tokens
        num_new = num_new or max(0, (kwargs.get("max_length") or 0) - placeholders.shape[1])
        longest = int(conditioned["attention_mask"].ne(0).sum(dim=1).max())
        check_positions(self, longest, num_new, soft_prompt.shape[1])
        outputs = generate(placeholders, generation_config, **conditioned, **view.adapt(kwargs))
        is_dict = isinstance(outputs, ModelOutput)
        num_rows = (outputs["sequences"] if is_dict else outputs).shape[0] * (_num_beams(config, kwargs))
        for cache in [*caches.values(), *filter(is_cache, outputs.values() if is_dict else ())]:
            mark_cache(cache, soft_prompt, positions, num_rows)
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
        """Returns ids and mask, padded on the left, with the profile of each row in its prompt."""
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

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not for users: continuous batching takes token ids, which do not hold a soft prompt."""
        raise ValueError(CONTINUOUS_BATCHING.format(name="generate_batch"))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not for users: continuous batching takes token ids, which do not hold a soft prompt."""
        raise ValueError(CONTINUOUS_BATCHING.format(name="init_continuous_batching"))

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Not for users: continuous batching takes token ids, which do not hold a soft prompt."""
        raise ValueError(CONTINUOUS_BATCHING.format(name="continuous_batching_context_manager"))

    def _soft_prompts(self, user_ids: Any, user_strength: Any, input_ids: Tensor) -> Tensor:
        """The soft prompt of each row, `(batch, T, token_dim)`."""
        batch_size = input_ids.shape[0]
        users, strengths = _as_list(user_ids, batch_size), as_strengths(user_strength, batch_size)
        differ = any(user != users[0] for user in users) or len(set(strengths)) > 1
        if differ and _is_called_by_a_pipeline():
            raise ValueError(
                "A pipeline hands prompts over in batches of its own, so a list of `user_ids` would not follow its prompts. "
                "Give a single id for all of them, or call `model.generate(..., user_ids=[...])` with the tokenized batch."
            )
        if len(users) != batch_size:
            raise ValueError(
                f"`user_ids` has {len(users)} users for a batch of {batch_size} rows. Give one per row, or a single id "
                "for all rows."
            )
        soft_prompts, unknown = blended_soft_prompts(
            self.user_model, self.user_vocab, users, strengths, input_ids.device
        )
        if unknown:
            logger.warning(
                "%d of %d rows have a user who is not in `model.user_vocab`; they get the generic user's soft prompt.",
                unknown,
                batch_size,
            )
        return soft_prompts


def _as_list(user_ids: Any, batch_size: int) -> list[UserOrBlend]:
    """One user for each row: a single id stands for all rows; arrays, tensors and columns of tables are lists too."""
    if isinstance(user_ids, (Tensor, np.ndarray, np.generic)):
        user_ids = user_ids.tolist()
    if user_ids is None or isinstance(user_ids, (str, int)):
        return [user_ids] * batch_size
    if isinstance(user_ids, (bytes, Set, Mapping)) or not hasattr(user_ids, "__len__"):
        raise TypeError(
            f"`user_ids` must be a user id or a list with one for each row, found {type(user_ids).__name__}, whose order is "
            "not that of the rows. Give a list."
        )
    return list(user_ids)


def _is_called_by_a_pipeline() -> bool:
    """Whether a pipeline of transformers is among the callers; it passes arguments of `generate` on, batch by batch."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Pipeline):
            return True
        frame = frame.f_back
    return False


def _num_beams(config: GenerationConfig, kwargs: dict[str, Any]) -> int:
    return kwargs.get("num_beams") or config.num_beams or 1


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
