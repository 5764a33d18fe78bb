"""The margin of each pair with each prompt that it is scored with, from the trainer's own evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from ..arrays import FloatArray, IntArray
from ..training.user_metrics import MarginRecorder, swapped_user_indices
from ..user_column import iterate_user_ids
from ..user_profile import USER_PROMPT_IDS
from ..users import UserVocab


ROW_COLUMN = "row_of_pair"  # rides along through the preparation of the dataset, which may leave rows out
PREPARED_COLUMNS = (  # what a trainer has added to a dataset that it has prepared
    *("prompt_ids", "chosen_ids", "rejected_ids", USER_PROMPT_IDS),
    *("ref_chosen_logps", "ref_rejected_logps"),
)


@dataclass(frozen=True)
class ScoredPairs:
    """
    Margins ([`~training.user_metrics.pair_margins`], in nats) of the pairs of a dataset.

    Args:
        margins (`dict[str, FloatArray]`): For each scorer the margins `(n,)`: `"own"` and, for a trainer with users,
            `"generic"`, `"swapped"` and `"opposite"`, as [`score_pairs`] describes them. Unknown users have the generic prompt
            for all of them.
        rows (`NDArray`): For each pair its row in the dataset, `(n,)`.
        num_dropped (`int`): The number of rows that this call left out because their prompt alone fills `max_length`.
        metrics (`dict[str, float]`): The metrics that `trainer.evaluate` returned.
        prompts, answers (`list`): The prompt of each pair, and a tuple of the chosen and the rejected answer, as text to
            compare (token ids).
    """

    margins: dict[str, FloatArray]
    rows: IntArray
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


def score_pairs(
    trainer: Trainer, dataset: Dataset | str, opposite_users: Mapping[str, str] | None = None
) -> ScoredPairs:
    """
    Score the pairs of `dataset` by `trainer.evaluate`: with its batches, truncation, chat template and reference. The
    reference runs once for each batch, each prompt once.

    A pair is scored with the user's own prompt (`"own"`), with the generic prompt (`"generic"`), with the prompt of the next
    known user (`"swapped"`, a fixed derangement, if there are two known users or more), and, given `opposite_users`, with the
    prompt of the opposite user (`"opposite"`).

    If users have profiles (`user_profile_column`), `"swapped"` and `"opposite"` take the other user's profile along with the
    soft prompt: the first one in `dataset` that is not blank. That is an evaluation more for each of the two. Users without a
    row in `dataset` have no profile that is known here, so `"swapped"` passes over them to the next user who has one.

    Args:
        trainer ([`PersonalizedDPOTrainer`]): A trainer with users or without.
        dataset (`Dataset` or `str`): Pairs as for `trainer.evaluate`, or the name of an eval dataset that the trainer has
            prepared already.
        opposite_users (`Mapping[str, str]`, *optional*): For each known user of `dataset` a user on the other side of the
            same conflict, such as [`~evaluation.answers.opposite_users`] gives.

    Returns:
        [`ScoredPairs`].

    Raises:
        `TypeError`: for a stream. `ValueError`: if a known user of `dataset` is missing in `opposite_users`, a user in it is
        unknown or is opposite to itself, or no pair is left.

    ```python
    scored = score_pairs(trainer, test)
    (scored.margins["own"] > 0).mean(), (scored.margins["swapped"] > 0).mean()
    ```
    """
    of_trainer: Any = trainer
    pairs = of_trainer.eval_dataset[dataset] if isinstance(dataset, str) else dataset
    if not isinstance(pairs, Dataset):
        raise TypeError(
            f"Pairs are scored in a `Dataset`, found {type(pairs).__name__}. Read the stream into one first."
        )
    vocab: UserVocab | None = of_trainer.user_vocab
    if vocab is None:
        return _score(trainer, dataset, {})
    users = list(iterate_user_ids(pairs, of_trainer.args.user_id_column, "evaluation"))
    known = [user for user in vocab if user in set(users)]
    if opposite_users is not None:
        _check_opposite(opposite_users, known, vocab)
    profile_column: str | None = of_trainer.args.user_profile_column
    if profile_column is None:
        others = {} if len(vocab) < 2 else {"swapped": swapped_user_indices(torch.arange(len(vocab) + 1), len(vocab))}
        if opposite_users is not None:
            others["opposite"] = _rows_of(opposite_users, vocab)
        return _score(trainer, dataset, others)
    scored = _score(trainer, dataset, {})
    pairs = pairs.remove_columns([name for name in PREPARED_COLUMNS if name in pairs.column_names])
    profiles = first_profiles(users, pairs[profile_column])
    of_controls = {"swapped": dict(zip(known, known[1:] + known[:1], strict=True)) if len(known) > 1 else None}
    for name, other_users in (of_controls | {"opposite": opposite_users}).items():
        if other_users is not None:
            as_others = _with_other_users(pairs, users, other_users, profiles, of_trainer.args)
            scored.margins[name] = _score(trainer, as_others, {}).margins["own"]
    return scored


def first_profiles(user_ids: list[str | None], profiles: list[str | None]) -> dict[str, str | None]:
    """
    For each user the first profile that is not blank.

    ```python
    >>> first_profiles(["ann", "bo", "ann", None], ["", None, "a child", "of nobody"])
    {'ann': 'a child', 'bo': None}
    ```
    """
    found: dict[str, str | None] = {}
    for user_id, profile in zip(user_ids, profiles, strict=True):
        if user_id is not None and not (found.get(user_id) or "").strip():
            found[user_id] = profile
    return found


def with_row_numbers(dataset: Dataset) -> Dataset:
    """`dataset` with `ROW_COLUMN`, the number of each row, which tells afterwards which rows the preparation left out."""
    if ROW_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(ROW_COLUMN)
    return dataset.add_column(ROW_COLUMN, range(len(dataset)))


def _score(trainer: Trainer, dataset: Dataset | str, other_users: Mapping[str, Tensor]) -> ScoredPairs:
    """One evaluation; the pairs are scored with the soft prompts of `other_users` too (see [`MarginRecorder`])."""
    of_trainer: Any = trainer
    of_trainer.margin_recorder = recorder = MarginRecorder(other_users)
    try:
        with _every_row_in_order(trainer):
            metrics = of_trainer.evaluate(dataset if isinstance(dataset, str) else with_row_numbers(dataset))
    finally:
        of_trainer.margin_recorder = None
    prepared: Dataset = recorder.dataset
    has_numbers = ROW_COLUMN in prepared.column_names
    return ScoredPairs(
        margins=recorder.arrays(),
        rows=np.asarray(prepared[ROW_COLUMN] if has_numbers else range(len(prepared)), dtype=np.intp),
        num_dropped=0 if isinstance(dataset, str) else len(dataset) - len(prepared),
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


def _check_opposite(opposite_users: Mapping[str, str], known: list[str], vocab: UserVocab) -> None:
    unknown = [user for pair in opposite_users.items() for user in pair if user not in vocab]
    if unknown:
        raise ValueError(f"{len(unknown)} users in `opposite_users` are not known to the model: {unknown[:3]}.")
    for user, other in opposite_users.items():
        if user == other:
            raise ValueError(f"`opposite_users` says that user {user!r} is opposite to itself. Name another user.")
    missing = [user for user in known if user not in opposite_users]
    if missing:
        raise ValueError(
            f"`opposite_users` has nobody for {len(missing)} of {len(known)} known users: {missing[:3]}. Add them, or "
            "leave out their pairs."
        )


def _rows_of(other_users: Mapping[str, str], vocab: UserVocab) -> Tensor:
    """`(num_users + 1,)`: for each row of the user table the row of the other user, or its own if there is none."""
    rows = torch.arange(len(vocab) + 1)
    for user, other in other_users.items():
        rows[vocab.encode([user])[0]] = vocab.encode([other])[0]
    return rows


def _with_other_users(
    pairs: Dataset,
    users: list[str | None],
    other_users: Mapping[str, str],
    profiles: Mapping[str, str | None],
    args: Any,
) -> Dataset:
    """`pairs` as if they were those of `other_users`: with their ids, and with their profiles. Unknown users stay."""
    as_users = [other_users.get(user or "", user) for user in users]
    missing = sorted({other for other in as_users if other is not None} - profiles.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} users in `opposite_users` have no row in the dataset, so that no profile is known to go with "
            f"their soft prompt: {missing[:3]}. Name users of the dataset."
        )
    as_profiles = [
        profile if other == user else profiles[other or ""]
        for user, other, profile in zip(users, as_users, pairs[args.user_profile_column], strict=True)
    ]
    for name, values in ((args.user_id_column, as_users), (args.user_profile_column, as_profiles)):
        pairs = pairs.remove_columns(name).add_column(name, values)
    return pairs
