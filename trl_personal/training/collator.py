"""Batches of preferences that know their users."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..user_profile import USER_PROMPT_IDS, truncate_like_plain
from ..users import UserVocab
from .prefix_sharing import PairPacker


@dataclass
class DataCollatorForPersonalizedPreference:
    """
    Any collator, with `user_indices` added: LongTensor `(rows_per_example * batch,)`, the row of the user table for each row
    of `input_ids`. A batch of preferences has the chosen rows first, then the rejected ones.

    A collator of your own may put the examples into another order, or leave some out: the users follow their rows. It may also
    say itself whose each row is, in `user_indices`.

    TRL hands every key of a batch that it does not know to the model, and so `user_indices` reaches the model's forward pass
    by itself ([`~models.soft_prompt.SoftPromptInsertion`] takes it there).

    Args:
        collator (`Callable`): Makes the batch, e.g. TRL's `DataCollatorForPreference`.
        user_vocab ([`UserVocab`]): Rows of the known users.
        user_id_column (`str`, *optional*, defaults to `"user_id"`): Where an example has its user. A missing or `None` user
            is the generic user, and so is one who is not in `user_vocab`.
        row_collator (`Callable`, *optional*): The same as `collator`, without truncation. Only profiles need it.
        max_length (`int`, *optional*): How many tokens `collator` keeps of a row. Only profiles need it.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`): Which end of a row `collator` keeps. Only profiles
            need it.
        packer ([`~training.prefix_sharing.PairPacker`], *optional*): Adds `packed_pairs` where it pays to share prompts.
        rows_per_example (`int`, *optional*, defaults to `2`): How many rows of a batch belong to one example: two where a
            batch is `[chosen; rejected]`, one where examples are not paired.

    Examples with `user_prompt_ids`, the prompt with the user's profile in it, also come as `user_input_ids`,
    `user_attention_mask` and `user_completion_mask`, LongTensor `(2 * batch, user_seq_len)`: the same rows with the other
    prompt, and with exactly the answer tokens that `collator` keeps.

    ```python
    >>> from trl.trainer.dpo_trainer import DataCollatorForPreference
    >>> collator = DataCollatorForPersonalizedPreference(DataCollatorForPreference(pad_token_id=0), UserVocab(["ann", "bo"]))
    >>> batch = collator(
    ...     [
    ...         {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4], "user_id": "bo"},
    ...         {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6], "user_id": None},
    ...     ]
    ... )
    >>> batch["user_indices"]
    tensor([2, 0, 2, 0])
    >>> batch["input_ids"]
    tensor([[1, 2, 3],
            [1, 5, 0],
            [1, 2, 4],
            [1, 6, 0]])
    ```
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    user_vocab: UserVocab
    user_id_column: str = "user_id"
    row_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    packer: PairPacker | None = None
    rows_per_example: int = 2

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        A batch of `examples`.

        Raises:
            `ValueError`: if `collator` returns rows that cannot be followed back to the examples, or if its own `user_indices`
            are not one for each row.
        """
        batch = self.collator(examples)
        if "user_indices" not in batch:
            if not type(self.collator).__module__.startswith("trl.trainer."):  # those of TRL keep the order
                examples = self._in_order_of_rows(examples, batch)
            rows = self.user_vocab.encode([example.get(self.user_id_column) for example in examples])
            batch["user_indices"] = torch.tensor(rows).repeat(self.rows_per_example)
        elif USER_PROMPT_IDS in examples[0] or batch["user_indices"].shape != batch["input_ids"].shape[:1]:
            raise ValueError(
                f"The collator {self._collator_name()} returns `user_indices` of shape {tuple(batch['user_indices'].shape)} "
                f"for {len(batch['input_ids'])} rows. Give one for each row (with `user_profile_column`, give none: profiles "
                "go by the examples)."
            )
        with_profiles = self._rows_with_profiles(examples) if examples and USER_PROMPT_IDS in examples[0] else {}
        for prefix, rows_of in ("", batch), ("user_", with_profiles):
            packed = self.packer(rows_of) if self.packer is not None and rows_of else None
            if packed is not None:
                batch[f"{prefix}packed_pairs"] = packed
        return batch | {f"user_{name}": values for name, values in with_profiles.items()}

    def _in_order_of_rows(self, examples: list[dict[str, Any]], batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The example of each row of a batch, found by its tokens, which are the same as in a batch of its own."""
        waiting: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for example in examples:
            for tokens in self._tokens_of_rows(self.collator([example])):
                waiting[tokens].append(example)
        found = self._tokens_of_rows(batch)
        ordered = [waiting[tokens].pop(0) for tokens in found if waiting[tokens]]
        is_clear = len(ordered) == len(found) and not any(
            # where one of two equal rows was left out, the other may belong to either user
            other.get(self.user_id_column) != example.get(self.user_id_column)
            for tokens, example in zip(found, ordered, strict=False)
            for other in waiting[tokens]
        )
        if not is_clear:
            raise ValueError(
                f"It cannot be told which users the rows of the collator {self._collator_name()} belong to: they are not the "
                f"rows of its {len(examples)} examples. Let it return the same tokens for an example as in a batch of one, in "
                "any order, or let it add `user_indices` itself: for each row of `input_ids` the row of its user, "
                "`trainer.user_vocab.encode(user_ids)`."
            )
        return ordered

    def _tokens_of_rows(self, batch: dict[str, Any]) -> list[tuple[tuple[int, ...], ...]]:
        """For each example of a batch the tokens of its rows, without padding."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        rows = [tuple((row if mask is None else row[mask[number].bool()]).tolist()) for number, row in enumerate(ids)]
        num_examples = len(rows) // self.rows_per_example
        return list(
            zip(*(rows[k * num_examples : (k + 1) * num_examples] for k in range(self.rows_per_example)), strict=True)
        )

    def _collator_name(self) -> str:
        return getattr(self.collator, "__qualname__", type(self.collator).__qualname__)

    def _rows_with_profiles(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for completion in ("chosen_ids", "rejected_ids"):
            for example in examples:
                prompt, answer = truncate_like_plain(example, completion, self.max_length, self.truncation_mode)
                # each row comes as a pair of its own, since the two rows of a pair may lose different ends of the prompt
                rows.append({"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": []})
        batch = (self.row_collator or self.collator)(rows)
        names = ("input_ids", "attention_mask", "completion_mask")
        return {name: batch[name][: len(rows)] for name in names}
