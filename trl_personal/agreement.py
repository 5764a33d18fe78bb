"""Who agrees with whom, where several users judged the same two answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from .arrays import BoolArray, FloatArray, IntArray


T = TypeVar("T")


@dataclass(frozen=True)
class Agreement:
    """
    How users judge the same two answers to a prompt. Shares are between 0 and 1, or `None` if there is nothing to count.

    Args:
        num_comparisons (`int`): Number of distinct comparisons. A comparison is a prompt with two answers, in any order.
        num_shared (`int`): Number of comparisons that two users or more judged.
        num_conflicting (`int`): Number of shared comparisons on which not all judgements are the same.
        disagreement_rate (`float`, *optional*): Share of disagreement among pairs of users who judged the same comparison.
        pooled_ceiling (`float`, *optional*): Pair accuracy on the shared comparisons of a rule that knows the majority of
            each: no rule without users can do better there.
        contradiction_rate (`float`, *optional*): How often a user who judged a comparison again judged it the other way.
    """

    num_comparisons: int
    num_shared: int
    num_conflicting: int
    disagreement_rate: float | None
    pooled_ceiling: float | None
    contradiction_rate: float | None


def encode(values: Sequence[T]) -> tuple[IntArray, list[T]]:
    """
    A number for each distinct value, in order of first appearance, and the distinct values.

    ```python
    >>> codes, distinct = encode(["b", "a", "b"])
    >>> codes.tolist(), distinct
    ([0, 1, 0], ['b', 'a'])
    ```
    """
    index = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.fromiter(map(index.__getitem__, values), dtype=np.intp, count=len(values)), list(index)


def compare(prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> tuple[IntArray, BoolArray]:
    """
    What is compared in each pair, and which way it was judged.

    Returns:
        `comparisons` `(n,)`, the same number for the same prompt and the same two answers in any order, and `directions`
        `(n,)`, whether the chosen answer comes first in the order of text.

    ```python
    >>> comparisons, directions = compare(["p", "p", "p"], ["x", "y", "x"], ["y", "x", "z"])
    >>> comparisons.tolist(), directions.tolist()
    ([0, 0, 1], [True, False, True])
    ```
    """
    keys = [(p, min(a, b), max(a, b)) for p, a, b in zip(prompts, chosen, rejected, strict=True)]
    directions = [a < b for a, b in zip(chosen, rejected, strict=True)]
    return encode(keys)[0], np.array(directions, dtype=bool)


def measure_agreement(comparisons: ArrayLike, directions: ArrayLike, users: ArrayLike) -> Agreement:
    """
    Count who agrees with whom. A user who judged a comparison several times counts once, with the more frequent judgement;
    a user who is undecided in that way does not count.

    Args:
        comparisons (`ArrayLike`): Number of the comparison in each pair, as [`compare`] returns it. Shape: `(n,)`.
        directions (`ArrayLike`): Which way each pair was judged, as [`compare`] returns it. Shape: `(n,)`.
        users (`ArrayLike`): Number of the user who judged each pair. Shape: `(n,)`.

    ```python
    >>> found = measure_agreement([0, 0, 0, 1], [True, True, False, True], [0, 1, 2, 0])
    >>> found.num_shared, found.num_conflicting, round(found.disagreement_rate, 3), round(found.pooled_ceiling, 3)
    (1, 1, 0.667, 0.667)
    ```
    """
    votes = np.where(np.asarray(directions), 1, -1)
    judged, users_of, balance, times = _judgements(np.asarray(comparisons), np.asarray(users), votes)
    decided = balance != 0
    size = int(judged.max(initial=-1)) + 1
    first = np.bincount(judged[decided & (balance > 0)], minlength=size)
    second = np.bincount(judged[decided & (balance < 0)], minlength=size)
    total = first + second
    shared = total >= 2
    num_pairs = float((total * (total - 1) / 2).sum())
    again = float((times * (times - 1) / 2).sum())
    contradictions = float(((times**2 - balance**2) / 4).sum())  # judgements one way times judgements the other way
    return Agreement(
        num_comparisons=len(np.unique(judged)),
        num_shared=int(shared.sum()),
        num_conflicting=int((shared & (first > 0) & (second > 0)).sum()),
        disagreement_rate=float((first * second).sum()) / num_pairs if num_pairs else None,
        pooled_ceiling=float(np.maximum(first, second)[shared].sum() / total[shared].sum()) if shared.any() else None,
        contradiction_rate=contradictions / again if again else None,
    )


def majority_agreement(comparisons: ArrayLike, directions: ArrayLike, users: ArrayLike) -> FloatArray:
    """
    Whether each judgement is that of the majority of the users who judged the same comparison. Its own vote counts too.

    Args:
        comparisons (`ArrayLike`): Number of the comparison in each pair, as [`compare`] returns it. Shape: `(n,)`.
        directions (`ArrayLike`): Which way each pair was judged, as [`compare`] returns it. Shape: `(n,)`.
        users (`ArrayLike`): Number of the user who judged each pair. Shape: `(n,)`.

    Returns:
        Floats `(n,)`: 1 if the judgement agrees with the majority, 0 if it does not, and NaN if the votes are tied or no other
        user judged the comparison.

    ```python
    >>> majority_agreement([0, 0, 0, 1], [True, True, False, True], [0, 1, 2, 0]).tolist()
    [1.0, 1.0, 0.0, nan]
    ```
    """
    codes, people = np.asarray(comparisons), np.asarray(users)
    votes = np.where(np.asarray(directions), 1, -1)
    judged, _, balance, _ = _judgements(codes, people, votes)
    num_comparisons = int(codes.max(initial=-1)) + 1
    majority = np.sign(np.bincount(judged, weights=np.sign(balance), minlength=num_comparisons))[codes]
    num_users = np.bincount(judged, minlength=num_comparisons)[codes]
    return np.where((majority == 0) | (num_users < 2), np.nan, (majority == votes).astype(np.float64))


def _judgements(
    comparisons: IntArray, users: IntArray, votes: IntArray
) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    """One entry for each comparison and user: both, votes one way minus votes the other way, and number of votes."""
    keys, inverse = np.unique(np.stack([comparisons, users]), axis=1, return_inverse=True)
    inverse = inverse.ravel()
    balance, times = np.bincount(inverse, weights=votes), np.bincount(inverse)
    return keys[0], keys[1], balance.astype(np.float64), times.astype(np.float64)
