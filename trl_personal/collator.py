"""Batches of preferences that know their users."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .prefix_sharing import PairPacker
from .users import UserVocab


@dataclass
class DataCollatorForPersonalizedPreference:
    """
    Any collator of preferences, with `user_indices` added: LongTensor `(2 * batch,)`, one row of the user table for each row
    of `input_ids`, chosen first, then rejected.

    Args:
        collator (`Callable`): Makes the batch, e.g. TRL's `DataCollatorForPreference`.
        user_vocab ([`UserVocab`]): Rows of the known users.
        user_id_column (`str`, *optional*, defaults to `"user_id"`): Where an example has its user. A missing or `None` user
            is the generic user, and so is one who is not in `user_vocab`.
        packer ([`~prefix_sharing.PairPacker`], *optional*): Adds `packed_pairs` where it pays to share prompts.

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
    packer: PairPacker | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = self.user_vocab.encode([example.get(self.user_id_column) for example in examples])
        batch = self.collator(examples)
        batch["user_indices"] = torch.tensor(rows).repeat(2)  # the batch is [chosen; rejected]
        packed = None if self.packer is None else self.packer(batch)
        if packed is not None:
            batch["packed_pairs"] = packed
        return batch
