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
SHUFFLES = (19, 99)  # at least, which makes a p-value of 0.05 possible, and at most
SHUFFLED_PAIRS = 2_000_000  # pairs times shuffles, about


@dataclass(frozen=True)
class Room:
    """
    What rules on simple features reach on prompts that they were not learned on. Accuracies are shares of pairs.

    Args:
        pooled_accuracy (`Interval`): Of one rule for everybody.
        personal_accuracy (`Interval`): Of a rule for each user.
        gap (`Interval`): Personal minus pooled: the room.
        shuffled_gaps (`tuple[float, ...]`): The same with the user ids shuffled over the pairs, so that nobody has a taste.
        p_value (`float`): How often a gap with shuffled ids would be at least as large.
        num_pairs, num_users, num_prompts (`int`): That the estimate is made of.
        has_evidence (`bool`): Whether the interval of the gap is above zero and `p_value` at most 0.05.
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
    One user's pairs.

    Args:
        user_id (`str`): The user.
        num_pairs (`int`): Over all splits.
        pooled_accuracy (`float`, *optional*): On held-out prompts, of the simple rule for everybody.
        personal_accuracy (`float`, *optional*): Likewise, of the user's own rule.
    """

    user_id: str
    num_pairs: int
    pooled_accuracy: float | None
    personal_accuracy: float | None


@dataclass(frozen=True)
class RoomScores:
    """
    Scores on held-out prompts `(n,)`, mean over partitions into folds, and the gaps with shuffled ids.

    Args:
        pooled, personal (`FloatArray`): 1 right, 0 wrong.
        shuffled_gaps (`FloatArray`): `(num_shuffles,)`.
    """

    pooled: FloatArray
    personal: FloatArray
    shuffled_gaps: FloatArray


def score_room(features: NDArray[np.float32], users: IntArray, prompts: IntArray, seed: int) -> RoomScores:
    """
    Cross-validate the pooled and the personal rules, with the ids as they are and shuffled.

    Args:
        features (`NDArray`): Of [`scale`], `(n, num_features)`.
        users (`IntArray`): `(n,)`, from 0.
        prompts (`IntArray`): `(n,)`, from 0; `MIN_PROMPTS` at least.
        seed (`int`): Of folds and shuffles.
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
    """Rules on one partition of the prompts into folds."""
    folds = split_prompts(prompts, NUM_FOLDS, rng)
    return NestedCrossValidation(features, folds, thorough=len(prompts) <= FEW_PAIRS)
