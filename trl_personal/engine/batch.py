"""A batch of answers in progress, with its cache: it begins with prompts, goes on by tokens, loses rows and gains some."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from ..models.generation import PersonalizedGeneration
from ..models.generation_limits import is_cache
from ..models.saving import get_base_model, is_personalized
from ..serving.interface import BLEND, GENERIC, UNKNOWN, USER, Job, Piece
from .rows import DrawnPerRow, Row


class Writer:
    """
    Writes the next tokens of batches with a model's own `generate`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): With users attached, or a plain one.
        tell (`Callable`): Gets each row with each of its pieces.
    """

    def __init__(self, model: Any, tell: Callable[[Row, Piece], None]) -> None:
        self.model, self.causal_lm, self.tell = model, get_base_model(model), tell
        self.is_personalized = is_personalized(model)
        self.config: GenerationConfig = copy.deepcopy(self.causal_lm.generation_config)
        # each row draws for itself, see `DrawnPerRow`
        self.config.update(
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=True,
            max_length=None,
            max_new_tokens=None,
            **dict.fromkeys(("temperature", "top_p", "top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff")),
        )
        takes = inspect.signature(self.causal_lm.forward).parameters
        self._name_of_cache = "cache" if "cache" in takes else "past_key_values"  # transformers is changing the name
        ids = self.config.eos_token_id
        self.end_ids = frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
        if self.config.pad_token_id is None and self.end_ids:
            self.config.pad_token_id = min(self.end_ids)

    @property
    def num_virtual_tokens(self) -> int:
        """How many columns the soft prompt of a row takes."""
        return self.causal_lm.user_model.config.num_virtual_tokens if self.is_personalized else 0

    def begin(self, rows: Sequence[Row]) -> "Batch":
        """Read the prompts of `rows` with their soft prompts, and write the first token of each."""
        prompts = [torch.tensor(row.job.prompt_ids) for row in rows]
        fillers = torch.tensor([self._filler(row.job) for row in rows])[:, None]
        padded = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
        mask, ids = padded.ge(0).long(), torch.where(padded < 0, fillers, padded)
        device = self.causal_lm.get_input_embeddings().weight.device
        device = self.causal_lm.device if device.type == "meta" else device
        ids, mask, fillers = ids.to(device), mask.to(device), fillers.to(device)
        outputs = self.model.generate(
            ids,
            generation_config=self._config(1),
            attention_mask=mask,
            **(self._users(rows) if self.is_personalized else {}),
            **self._per_row(rows, lambda: False),
        )
        # `generate` keeps the soft prompt to itself: the columns of the cache that it takes are put in front, as padding
        # on the left comes first
        num_virtual = self.num_virtual_tokens
        mask = torch.cat([mask, mask.new_ones(len(rows), num_virtual + 1)], dim=1)
        ids = torch.cat([fillers.expand(-1, num_virtual), outputs["sequences"].to(device)], dim=1)
        return Batch(list(rows), ids, mask, next(filter(is_cache, outputs.values())))

    def go_on(self, batch: "Batch", num_tokens: int, is_over: Callable[[], bool]) -> None:
        """Write up to `num_tokens` tokens more of each row, unless `is_over` says after one of them that it is enough."""
        # the cache has the soft prompts: from here on it is the plain model
        plain: Any = super(PersonalizedGeneration, self.causal_lm) if self.is_personalized else self.model
        outputs = plain.generate(
            batch.ids,
            generation_config=self._config(num_tokens),
            attention_mask=batch.mask,
            **{self._name_of_cache: batch.cache},
            **self._per_row(batch.rows, is_over),
        )
        num_new = outputs["sequences"].shape[1] - batch.ids.shape[1]
        batch.ids = outputs["sequences"]
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), num_new)], dim=1)

    def _config(self, num_tokens: int) -> GenerationConfig:
        config = copy.copy(self.config)
        config.max_new_tokens = num_tokens
        return config

    def _per_row(self, rows: Sequence[Row], is_over: Callable[[], bool]) -> dict[str, Any]:
        return {
            "logits_processor": [DrawnPerRow(rows)],
            "stopping_criteria": [_AsRowsSay(rows, self.tell, is_over)],
        }

    def _users(self, rows: Sequence[Row]) -> dict[str, Any]:
        users = []
        for row in rows:
            user, row.job.answered_for = known_part(row.job.user, self.causal_lm.user_vocab)
            users.append(user)
        return {"user_ids": users, "user_strength": [row.job.user_strength for row in rows]}

    def _filler(self, job: Job) -> int:
        """As in [`PersonalizedGeneration.generate`]: an id for columns without a token, without effect on penalties."""
        if self.config.pad_token_id is not None and self.config.pad_token_id not in self.end_ids:
            return self.config.pad_token_id
        return job.prompt_ids[0]


def known_part(user: Any, user_vocab: Any) -> tuple[Any, str]:
    """
    The part of a user or blend that a vocabulary knows, and what to say of it.

    ```python
    >>> known_part("ann", ["ann"]), known_part("eve", ["ann"]), known_part({"ann": 0.5, "eve": 0.5}, ["ann"])
    (('ann', 'user'), (None, 'unknown'), ({'ann': 0.5}, 'blend'))
    ```
    """
    if user is None:
        return None, GENERIC
    if isinstance(user, str):
        return (user, USER) if user in user_vocab else (None, UNKNOWN)
    blend = {name: weight for name, weight in user.items() if name in user_vocab}
    return (blend, BLEND) if blend else (None, UNKNOWN)


class Batch:
    """
    Rows whose next tokens are written together. Padding is on the left.

    Args:
        rows (`list[Row]`): The answers.
        ids (`LongTensor` `(batch, columns)`): Their tokens; fillers where padding and soft prompts are.
        mask (`LongTensor` `(batch, columns)`): 0 at the padding.
        cache (`Cache`): Of all columns but the last.
    """

    def __init__(self, rows: list[Row], ids: Tensor, mask: Tensor, cache: Any) -> None:
        self.rows, self.ids, self.mask, self.cache = rows, ids, mask, cache

    @property
    def num_left(self) -> int:
        """How many tokens its longest answer may have yet."""
        return max(row.num_left for row in self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether its cache has a column for each token in each layer, so that batches may be put together."""
        return type(self.cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def drop_done(self) -> None:
        """Leave out the rows that are done, and columns that are padding in all others."""
        kept = [number for number, row in enumerate(self.rows) if not row.is_done]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in kept]
        if not kept:
            return
        index = torch.tensor(kept, device=self.ids.device)
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.cache.batch_select_indices(index)
        num_empty = int(self.mask.any(dim=0).int().argmax())
        if num_empty and self.is_plain:
            self._move(-num_empty)

    def can_take(self, other: "Batch") -> bool:
        """Whether the two are better one: not where one would be mostly padding."""
        areas = [batch.ids.numel() for batch in (self, other)]
        together = (len(self.rows) + len(other.rows)) * max(batch.ids.shape[1] for batch in (self, other))
        return self.is_plain and other.is_plain and together <= 1.25 * sum(areas) + 1024

    def take(self, other: "Batch") -> None:
        """Put the rows of another batch under its own; the shorter of the two is padded on the left."""
        more = other.ids.shape[1] - self.ids.shape[1]
        (self if more > 0 else other)._move(abs(more))
        self.rows = self.rows + other.rows
        self.ids, self.mask = torch.cat([self.ids, other.ids]), torch.cat([self.mask, other.mask])
        for layer, others in zip(self.cache.layers, other.cache.layers, strict=True):
            if layer.is_initialized:
                layer.keys = torch.cat([layer.keys, others.keys])
                layer.values = torch.cat([layer.values, others.values])

    def _move(self, num_columns: int) -> None:
        """Pad by some columns on the left, or, below zero, take them off."""
        if num_columns == 0:
            return
        self.ids, self.mask = pad(self.ids, (num_columns, 0)), pad(self.mask, (num_columns, 0))
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys = pad(layer.keys, (0, 0, num_columns, 0))
                layer.values = pad(layer.values, (0, 0, num_columns, 0))


class _AsRowsSay(StoppingCriteria):
    """Hands each row its token, and ends the rows that are done, or all of them when the engine has something else to do."""

    def __init__(self, rows: Sequence[Row], tell: Callable[[Row, Piece], None], is_over: Callable[[], bool]) -> None:
        self._rows, self._tell, self._is_over = rows, tell, is_over

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token_id in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.is_done:
                self._tell(row, row.accept(token_id))
        if self._is_over():
            return torch.ones(len(self._rows), dtype=torch.bool, device=input_ids.device)
        return torch.tensor([row.is_done for row in self._rows], device=input_ids.device)
