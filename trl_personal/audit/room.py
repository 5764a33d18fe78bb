"""Room for personalization: how much better rules of single users are than one for everybody, and than with shuffled ids."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import FloatArray, IntArray
from ..intervals import Interval, cluster_mean, cluster_share
from .rules import NestedCrossValidation, split_prompts


NUM_FOLDS = 5
MIN_PROMPTS = 3  # one to learn on, one to choose on, one to score on
SIGNIFICANCE = 0.05
REPEATS, FEW_PAIRS = 3, 10_000  # up to so many pairs, the luck of one partition into folds is averaged out
SHUFFLES = (19, 99)  # fewest, with which a p-value of 0.05 is possible, and most
SHUFFLED_PAIRS = 2_000_000  # pairs times shuffles: the fewer pairs, the more shuffles


@dataclass(frozen=True)
class Room:
    """
    What rules on simple features reach on prompts that they were not learned on. Accuracies are shares of pairs, from 0 to 1.

    Args:
        pooled_accuracy (`Interval`): Accuracy of one rule for everybody, the pooled rule.
        personal_accuracy (`Interval`): Accuracy of a rule for each user.
        gap (`Interval`): The room for personalization: personal minus pooled accuracy.
        shuffled_gaps (`tuple[float, ...]`): The gaps that are left with user ids shuffled over the pairs, when no user has a
            taste.
        p_value (`float`): Share of shuffles whose gap is at least as large as the gap found. The ids as they are count as one
            more shuffle, so that it is never 0.
        num_pairs, num_users, num_prompts (`int`): Number of pairs that were used, and of users and prompts among them.
        has_evidence (`bool`): Whether the interval of the gap is above zero and `p_value` is at most 0.05.
    """

    pooled_accuracy: Interval
    personal_accuracy: Interval
    gap: Interval
    shuffled_gaps: tuple[float, ...]
    p_value: float
    num_pairs: int
    num_users: int
    num_prompts: int
    has_evidence: bool


@dataclass(frozen=True)
class UserAudit:
    """
    What was found in one user's pairs.

    Args:
        user_id (`str`): Id of the user.
        num_pairs (`int`): Number of the user's pairs in all splits.
        pooled_accuracy (`float`, *optional*): Share of the pairs about held-out prompts that the pooled rule gets right.
            `None` if the user's pairs were not used for the estimate.
        personal_accuracy (`float`, *optional*): Share of these pairs that the user's own rule gets right.
    """

    user_id: str
    num_pairs: int
    pooled_accuracy: float | None
    personal_accuracy: float | None


@dataclass(frozen=True)
class RoomScores:
    """
    Scores of pairs about held-out prompts, and the gaps with shuffled ids.

    Args:
        pooled, personal (`FloatArray`): Score of the pooled and of the personal rule on each pair: 1 for a right choice and 0
            for a wrong one, averaged over partitions into folds. Shape: `(n,)`.
        shuffled_gaps (`FloatArray`): Personal minus pooled accuracy for each shuffle of the ids. Shape: `(num_shuffles,)`.
    """

    pooled: FloatArray
    personal: FloatArray
    shuffled_gaps: FloatArray


def score_room(features: NDArray[np.float32], users: IntArray, prompts: IntArray, seed: int) -> RoomScores:
    """
    Cross-validate the pooled and the personal rules, with the ids as they are and shuffled.

    Args:
        features (`NDArray`): Differences between chosen and rejected answers, as [`scale`] returns them. Shape:
            `(n, num_features)`.
        users (`IntArray`): Number of each pair's user, counted from 0. Shape: `(n,)`.
        prompts (`IntArray`): Number of each pair's prompt, counted from 0. There must be `MIN_PROMPTS` prompts at least.
            Shape: `(n,)`.
        seed (`int`): Random seed for the partition into folds and for shuffling ids.
    """
    rng = np.random.default_rng(seed)
    num_pairs, num_users = len(users), int(users.max()) + 1
    repeats = REPEATS if num_pairs <= FEW_PAIRS else 1
    shuffles = [rng.permutation(users) for _ in range(int(np.clip(SHUFFLED_PAIRS // num_pairs, *SHUFFLES)))]
    pooled, personal = np.zeros(num_pairs), np.zeros(num_pairs)
    shuffled_gaps = np.zeros(len(shuffles))
    for _ in range(repeats):
        validation = cross_validate(features, prompts, rng)
        scores = validation.pooled()
        pooled += scores / repeats
        personal += validation.personal(users, num_users) / repeats
        shuffled_gaps += [(validation.personal(ids, num_users) - scores).mean() / repeats for ids in shuffles]
    return RoomScores(pooled, personal, shuffled_gaps)


def summarize_room(scores: RoomScores, users: IntArray, prompts: IntArray) -> Room:
    """Intervals, the p-value, and whether there is evidence of room."""
    gap = cluster_mean(scores.personal - scores.pooled, prompts)
    at_least = int((scores.shuffled_gaps >= gap.value - 1e-9).sum())
    p_value = (at_least + 1) / (len(scores.shuffled_gaps) + 1)
    return Room(
        pooled_accuracy=cluster_share(scores.pooled, prompts),
        personal_accuracy=cluster_share(scores.personal, prompts),
        gap=gap,
        shuffled_gaps=tuple(sorted(scores.shuffled_gaps.tolist())),
        p_value=p_value,
        num_pairs=len(users),
        num_users=len(np.unique(users)),
        num_prompts=len(np.unique(prompts)),
        has_evidence=gap.low > 0 and p_value <= SIGNIFICANCE,
    )


def cross_validate(
    features: NDArray[np.float32], prompts: IntArray, rng: np.random.Generator
) -> NestedCrossValidation:
    """Scores of the pooled rule and of personal rules on one partition of the prompts into folds, `(n,)` each."""
    folds = split_prompts(prompts, NUM_FOLDS, rng)
    return NestedCrossValidation(features, folds, thorough=len(prompts) <= FEW_PAIRS)
