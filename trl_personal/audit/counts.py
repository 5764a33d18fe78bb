"""How many users, pairs and prompts there are, and what leaks from one split to another."""

from dataclasses import dataclass

import numpy as np

from ..arrays import BoolArray, IntArray
from .preferences import NO_USER, PreferenceTable


@dataclass(frozen=True)
class SplitCounts:
    """
    What one split has.

    Args:
        num_pairs, num_users, num_prompts (`int`): Number of pairs in the split, and of distinct users and prompts among them.
    """

    num_pairs: int
    num_users: int
    num_prompts: int


@dataclass(frozen=True)
class Counts:
    """
    What all splits have together.

    Args:
        num_pairs, num_users, num_prompts (`int`): Number of pairs, and of distinct users and prompts among them.
        num_pairs_without_user (`int`): Number of pairs without a user id. They train the generic user.
        num_identical (`int`): Number of rows that were left out because their two answers are the same.
        num_blank (`int`): Number of other rows that were left out because their prompt or an answer is blank.
        pairs_per_user (`dict[str, float]`): The `min`, `p10`, `median`, `mean`, `p90` and `max` number of pairs of a user.
        min_pairs (`int`): Number of pairs below which a user has too few to learn from.
        num_users_with_few_pairs (`int`): Number of users with fewer pairs than `min_pairs`.
        shared_prompt_rate (`float`): Share of the prompts that two users or more judged, from 0 to 1.
    """

    num_pairs: int
    num_users: int
    num_prompts: int
    num_pairs_without_user: int
    num_identical: int
    num_blank: int
    pairs_per_user: dict[str, float]
    min_pairs: int
    num_users_with_few_pairs: int
    shared_prompt_rate: float


@dataclass(frozen=True)
class Leakage:
    """
    What the other splits share with `train`, or with the first split if none has that name.

    Args:
        reference (`str`): Name of the split that the others are compared with.
        num_other_pairs (`int`): Number of pairs in the other splits.
        same_prompt (`int`): Number of them whose prompt is in the reference split.
        same_comparison (`int`): Number of them whose prompt is there with the same two answers, judged by any user.
        same_judgement (`int`): Number of them whose user judged the same comparison in the reference split.
        unknown_users (`int`): Number of users (not of pairs) who are in the other splits only.
    """

    reference: str
    num_other_pairs: int
    same_prompt: int
    same_comparison: int
    same_judgement: int
    unknown_users: int


def count(table: PreferenceTable, min_pairs: int) -> Counts:
    """Count users, pairs and prompts over all splits."""
    owned = table.users != NO_USER
    per_user = np.bincount(table.users[owned], minlength=len(table.user_ids))
    judges = np.unique(np.stack([table.prompts[owned], table.users[owned]]), axis=1)
    users_per_prompt = np.bincount(judges[0], minlength=1)
    judged = users_per_prompt[users_per_prompt > 0]
    low, median, high = np.percentile(per_user, [10, 50, 90]) if len(per_user) else (0.0, 0.0, 0.0)
    return Counts(
        num_pairs=len(table),
        num_users=len(table.user_ids),
        num_prompts=len(np.unique(table.prompts)),
        num_pairs_without_user=int((~owned).sum()),
        num_identical=table.num_identical,
        num_blank=table.num_blank,
        pairs_per_user={
            "min": float(per_user.min(initial=0) if not len(per_user) else per_user.min()),
            "p10": float(low),
            "median": float(median),
            "mean": float(per_user.mean()) if len(per_user) else 0.0,
            "p90": float(high),
            "max": float(per_user.max(initial=0)),
        },
        min_pairs=min_pairs,
        num_users_with_few_pairs=int((per_user < min_pairs).sum()),
        shared_prompt_rate=float((judged > 1).mean()) if len(judged) else 0.0,
    )


def count_splits(table: PreferenceTable) -> dict[str, SplitCounts]:
    """Count each split."""
    found = {}
    for code, name in enumerate(table.split_names):
        rows = table.splits == code
        users = table.users[rows]
        found[name] = SplitCounts(
            num_pairs=int(rows.sum()),
            num_users=len(np.unique(users[users != NO_USER])),
            num_prompts=len(np.unique(table.prompts[rows])),
        )
    return found


def find_leakage(table: PreferenceTable) -> Leakage | None:
    """What the other splits share with `train`; `None` if there is one split only."""
    if len(table.split_names) < 2:
        return None
    reference = "train" if "train" in table.split_names else table.split_names[0]
    inside = table.splits == table.split_names.index(reference)
    owned = table.users != NO_USER
    judgements = table.comparisons * (len(table.user_ids) + 1) + table.users + 1
    outsiders = np.setdiff1d(table.users[~inside & owned], table.users[inside & owned])
    return Leakage(
        reference=reference,
        num_other_pairs=int((~inside).sum()),
        same_prompt=_num_found(table.prompts, inside),
        same_comparison=_num_found(table.comparisons, inside),
        same_judgement=_num_found(np.where(owned, judgements, -1 - np.arange(len(owned))), inside),
        unknown_users=len(outsiders),
    )


def _num_found(keys: IntArray, inside: BoolArray) -> int:
    return int(np.isin(keys[~inside], keys[inside]).sum())
