"""What preference data allow, before anything is trained."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..agreement import Agreement, encode, measure_agreement
from ..arrays import FloatArray, IntArray
from ..files import write_atomically
from ..user_column import AnyDataset
from ..users import describe_variants, find_variants
from .counts import Counts, Leakage, SplitCounts, count, count_splits, find_leakage
from .kinds import Recommendation, recommend
from .preferences import NO_USER, PreferenceTable, read_preferences
from .room import MIN_PROMPTS, Room, RoomScores, UserAudit, score_room, summarize_room
from .rules import scale
from .tastes import Taste, find_tastes
from .text_features import text_features


logger = logging.getLogger(__name__)

MIN_PAIRS = 20  # that a user needs to be learned from, by default
MAX_PAIRS = 200_000  # that the room is estimated on; from larger data, users are drawn
FEW_PROMPTS = 10


@dataclass(frozen=True)
class Audit:
    """
    What [`audit_preferences`] finds.

    Args:
        counts ([`Counts`]): How many users, pairs and prompts there are.
        splits (`dict[str, SplitCounts]`): How many there are in each split.
        agreement ([`Agreement`]): How often users agree on the same two answers.
        leakage ([`Leakage`], *optional*): What splits share; `None` if there is one split only.
        room ([`Room`], *optional*): How much room there is for personalization; `None` if the data are too few to estimate it.
        tastes (`tuple[Taste, ...]`): The features on which users differ, starting with those on which they differ most.
        recommendation ([`Recommendation`]): Which user model to train, if any.
        notes (`tuple[str, ...]`): Sentences on the data and the estimates. They name no user.
        users (`tuple[UserAudit, ...]`): What was found for each user, in order of first appearance.
        variants (`tuple[tuple[str, ...], ...]`): Ids that differ only in white space, letter case or the way they are written.
    """

    counts: Counts
    splits: dict[str, SplitCounts]
    agreement: Agreement
    leakage: Leakage | None
    room: Room | None
    tastes: tuple[Taste, ...]
    recommendation: Recommendation
    notes: tuple[str, ...]
    users: tuple[UserAudit, ...]
    variants: tuple[tuple[str, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, for JSON. The ids of users are in `users` and `variants` only."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write `audit.json` (all of it, ids included) and `audit.png` (a chart without ids) into `folder`."""
        from .chart import draw_audit  # matplotlib takes a second to load

        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=2, allow_nan=False)
        write_atomically(Path(folder) / "audit.json", text.encode())
        write_atomically(
            Path(folder) / "audit.png",
            draw_audit(self.counts, self.users, self.room, self.recommendation, self.tastes),
        )


def audit_preferences(
    dataset_or_splits: AnyDataset | Mapping[str, AnyDataset],
    user_id_column: str = "user_id",
    *,
    split_column: str | None = None,
    min_pairs: int = MIN_PAIRS,
    seed: int = 0,
) -> Audit:
    """
    Look at preference data before training: users, agreement, leakage, and whether there is room for personalization.

    The room is how much better rules of single users predict choices than one rule for everybody, on prompts that neither was
    learned or chosen on. Rules see simple features of the texts only (`text_features.FEATURES`: length, marks, vocabulary,
    ...). It counts as evidence if the interval (of whole prompts) is above zero and the same estimate with shuffled ids is
    hardly ever as large. No evidence is not a proof: a language model sees more than these features.

    Args:
        dataset_or_splits (`Dataset`, `IterableDataset` or a mapping of them): Rows with `prompt`, `chosen`, `rejected` (text
            or messages) and the user.
        user_id_column (`str`, *optional*, defaults to `"user_id"`): Name of the column with the user of each row. `None` in
            it is the generic user, whose pairs are counted and used for nothing else.
        split_column (`str`, *optional*): Name of the column with the split of each row, if splits are not datasets of their
            own.
        min_pairs (`int`, *optional*, defaults to `20`): Number of pairs below which a user counts as having too few.
        seed (`int`, *optional*, defaults to `0`): Random seed for the partition into folds, and for
            shuffling ids.

    Returns:
        [`Audit`], with counts, estimates and a recommendation.

    Raises:
        `ValueError`: if a column is missing, or there are no pairs. `TypeError`: for ids or answers of another type.

    ```python
    audit = audit_preferences(load_dataset("json", data_files="preferences.jsonl")["train"])
    audit.recommendation.kind, audit.room.gap
    audit.save("audit")
    ```
    """
    table = read_preferences(dataset_or_splits, user_id_column, split_column)
    counts = count(table, min_pairs)
    leakage = find_leakage(table)
    variants = find_variants(table.user_ids)
    owned = np.flatnonzero(table.users != NO_USER)
    rows = _drawn_rows(table.users, owned, seed)
    differences = _differences(table, rows)
    users = table.users[rows]
    room, scores, recommendation = _estimate(
        differences, encode(users.tolist())[0], _recoded(table.prompts[rows]), seed
    )
    audit = Audit(
        counts=counts,
        splits=count_splits(table),
        agreement=measure_agreement(table.comparisons[owned], table.directions[owned], table.users[owned]),
        leakage=leakage,
        room=room,
        tastes=find_tastes(differences, users),
        recommendation=recommendation,
        notes=tuple(_notes(counts, leakage, room, len(owned) - len(rows), variants)),
        users=_audit_users(table, rows, scores),
        variants=tuple(map(tuple, variants)),
    )
    logger.info(
        "Audited %d pairs of %d users; recommended user model: %s.",
        counts.num_pairs,
        counts.num_users,
        recommendation.kind,
    )
    return audit


def _estimate(
    differences: FloatArray, users: IntArray, prompts: IntArray, seed: int
) -> tuple[Room | None, RoomScores | None, Recommendation]:
    num_users, num_prompts = (len(np.unique(codes)) for codes in (users, prompts))
    if num_users < 2 or num_prompts < MIN_PROMPTS:
        reason = (
            f"Too little to tell whether users differ: {num_users} users and {num_prompts} prompts were found, at least 2 and "
            f"{MIN_PROMPTS} are needed."
        )
        return None, None, Recommendation("none", reason, {})
    features = scale(differences)
    scores = score_room(features, users, prompts, seed)
    room = summarize_room(scores, users, prompts)
    return room, scores, recommend(room, features, users, prompts, seed)


def _recoded(codes: IntArray) -> IntArray:
    return np.unique(codes, return_inverse=True)[1]


def _drawn_rows(users: IntArray, owned: IntArray, seed: int) -> IntArray:
    """Rows of all users; or, if they are more than `MAX_PAIRS`, those of users drawn at random who have about as many."""
    if len(owned) <= MAX_PAIRS:
        return owned
    totals = np.bincount(users[owned])
    order = np.random.default_rng(seed).permutation(len(totals))
    number = max(2, int(np.searchsorted(np.cumsum(totals[order]), MAX_PAIRS)))
    return owned[np.isin(users[owned], order[:number])]


def _differences(table: PreferenceTable, rows: IntArray) -> FloatArray:
    """Features of the chosen answers minus those of the rejected ones."""
    answers = [text for row in rows for text in (table.chosen_texts[row], table.rejected_texts[row])]
    features = text_features(answers, [table.prompt_texts[row] for row in rows for _ in range(2)])
    return features[0::2] - features[1::2]


def _audit_users(table: PreferenceTable, rows: IntArray, scores: RoomScores | None) -> tuple[UserAudit, ...]:
    number = len(table.user_ids)
    totals = np.bincount(table.users[table.users != NO_USER], minlength=number)
    scored = np.bincount(table.users[rows], minlength=number)
    shares: dict[str, list[float | None]] = {}
    for name in ("pooled", "personal"):
        right = np.bincount(table.users[rows], weights=getattr(scores, name), minlength=number) if scores else scored
        shares[name] = [float(r / n) if scores and n else None for r, n in zip(right, scored, strict=True)]
    return tuple(
        UserAudit(user_id, int(totals[user]), shares["pooled"][user], shares["personal"][user])
        for user, user_id in enumerate(table.user_ids)
    )


def _notes(
    counts: Counts, leakage: Leakage | None, room: Room | None, num_left_out: int, variants: list[list[str]]
) -> list[str]:
    notes = [f"{describe_variants(variants)}."] if variants else []
    if counts.num_users_with_few_pairs:
        notes.append(
            f"{counts.num_users_with_few_pairs:,} of {counts.num_users:,} users have fewer than {counts.min_pairs} pairs: too "
            "few to learn from. `cluster` and `low_rank` let them share; or leave them to the generic user."
        )
    if counts.num_pairs_without_user:
        notes.append(f"{counts.num_pairs_without_user:,} pairs have no user. They train the generic user.")
    if counts.num_identical:
        notes.append(f"{counts.num_identical:,} rows have two equal answers and were left out.")
    if counts.num_blank:
        notes.append(f"{counts.num_blank:,} rows have a blank prompt or answer and were left out.")
    if leakage and leakage.same_comparison:
        notes.append(
            f"{leakage.same_comparison:,} of {leakage.num_other_pairs:,} pairs outside `{leakage.reference}` compare answers "
            "that were compared there too: accuracy on them is partly memory. Split by prompt."
        )
    elif leakage and leakage.same_prompt:
        notes.append(
            f"{leakage.same_prompt:,} of {leakage.num_other_pairs:,} pairs outside `{leakage.reference}` have a prompt of "
            f"`{leakage.reference}`, with other answers."
        )
    if room and room.num_prompts < FEW_PROMPTS:
        notes.append(f"There are {room.num_prompts} prompts only: the intervals are rough, the shuffled ids say more.")
    if num_left_out:
        notes.append(
            f"The room was estimated on the pairs of drawn users; {num_left_out:,} pairs were not used for it."
        )
    return notes
