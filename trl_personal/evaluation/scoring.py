"""The margin of each pair with the own, the generic and another user's prompt, from the trainer's own evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer

from ..arrays import FloatArray
from ..training.user_metrics import MarginRecorder, swapped_user_indices
from ..users import UserVocab


ROW_COLUMN = "row_of_pair"  # rides along through the preparation of the dataset, which may leave rows out


@dataclass(frozen=True)
class ScoredPairs:
    """
    Margins ([`~training.user_metrics.pair_margins`], in nats) of the pairs of a dataset.

    Args:
        margins (`dict[str, FloatArray]`): Arrays `(n,)` under `"own"`, `"generic"` and, with two known users or more,
            `"swapped"`; for a trainer without users under `"own"` only. A user who is not known has the generic prompt for
            all of them.
        rows (`NDArray`): `(n,)`, the row in the dataset of each pair.
        num_dropped (`int`): Rows that were left out because their prompt alone fills `max_length`.
        metrics (`dict[str, float]`): What `trainer.evaluate` returned.
        prompts, answers (`list[str]`): The prompt of each pair, and a tuple of the chosen and the rejected answer, as text to
            compare (token ids).
    """

    margins: dict[str, FloatArray]
    rows: NDArray[np.intp]
    num_dropped: int
    metrics: dict[str, float]
    prompts: list[str]
    answers: list[tuple[str, str]]

    def by_row(self, name: str, num_rows: int) -> FloatArray:
        """
        The margins of one scorer for all `num_rows` rows of the dataset, NaN for those left out.

        Raises:
            `ValueError`: if a margin is not a finite number.
        """
        if not np.isfinite(self.margins[name]).all():
            raise ValueError(f"Margins with the {name} prompt are not finite numbers. Did the training diverge?")
        array = np.full(num_rows, np.nan)
        array[self.rows] = self.margins[name]
        return array


def score_pairs(trainer: Trainer, dataset: Dataset, swapped_users: Mapping[str, str] | None = None) -> ScoredPairs:
    """
    The margins of the pairs of `dataset` with each prompt, in one `trainer.evaluate`: its batches, truncation, chat template
    and reference. The reference runs once for each batch, each prompt once.

    Args:
        trainer ([`PersonalizedDPOTrainer`]): With users or without.
        dataset (`Dataset`): As for `trainer.evaluate`.
        swapped_users (`Mapping[str, str]`, *optional*): Whose prompt to score a user's pairs with for the margins `"swapped"`,
            such as [`~evaluation.answers.opposite_users`]; known users who are not in it get the next one.

    Returns:
        [`ScoredPairs`].

    Raises:
        `TypeError`: for a stream. `ValueError`: if a user in `swapped_users` is not known, or is swapped with itself, or no
        pair is left.

    ```python
    scored = score_pairs(trainer, test)
    (scored.margins["own"] > 0).mean(), (scored.margins["swapped"] > 0).mean()
    ```
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Pairs are scored in a `Dataset`, found {type(dataset).__name__}. Read the stream into one first."
        )
    personalized: Any = trainer
    vocab = personalized.user_vocab
    others = {} if vocab is None or len(vocab) < 2 else {"swapped": _swapped_rows(vocab, swapped_users or {})}
    recorder = MarginRecorder(others)
    if ROW_COLUMN in dataset.column_names:  # was prepared before
        dataset = dataset.remove_columns(ROW_COLUMN)
    numbered = dataset.add_column(ROW_COLUMN, range(len(dataset)))
    personalized.margin_recorder = recorder
    try:
        with _every_row_in_order(trainer):
            metrics = trainer.evaluate(numbered)
    finally:
        personalized.margin_recorder = None
    prepared = recorder.dataset
    return ScoredPairs(
        margins=recorder.arrays(),
        rows=np.asarray(prepared[ROW_COLUMN], dtype=np.intp),
        num_dropped=len(dataset) - len(prepared),
        metrics=metrics,
        prompts=_texts(prepared, "prompt"),
        answers=list(zip(_texts(prepared, "chosen"), _texts(prepared, "rejected"), strict=True)),
    )


def _texts(prepared: Dataset, column: str) -> list[str]:
    """Token ids where the trainer made them, so that all formats of data compare alike."""
    name = f"{column}_ids" if f"{column}_ids" in prepared.column_names else column
    return [str(value) for value in prepared[name]]


@contextmanager
def _every_row_in_order(trainer: Trainer) -> Iterator[None]:
    args: Any = trainer.args
    settings = {"train_sampling_strategy": "sequential", "dataloader_drop_last": False}
    previous = {name: getattr(args, name) for name in settings}
    vars(args).update(settings)
    try:
        yield
    finally:
        vars(args).update(previous)


def _swapped_rows(vocab: UserVocab, swapped_users: Mapping[str, str]) -> Tensor:
    rows = swapped_user_indices(torch.arange(len(vocab) + 1), len(vocab))
    unknown = [user for pair in swapped_users.items() for user in pair if user not in vocab]
    if unknown:
        raise ValueError(f"{len(unknown)} users in `swapped_users` are not known to the model: {unknown[:3]}.")
    for user, other in swapped_users.items():
        if user == other:
            raise ValueError(f"`swapped_users` gives user {user!r} its own prompt. Give another user's.")
        rows[vocab.encode([user])[0]] = vocab.encode([other])[0]
    return rows
