"""What the kinds of user models share between users, as rules on simple features, and which kind fits the data."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import FloatArray, IntArray
from ..intervals import cluster_mean
from .room import SIGNIFICANCE, Room, cross_validate
from .rules import Candidate, Sharing, share_nothing


NUM_CLUSTERS = (2, 3, 5, 8)
RANKS = (1, 2, 4)
SHRINKAGE = 10.0  # pairs; shrinks the offsets in which clusters and directions are looked for
KMEANS_STEPS = 15
MIN_ROOM = 0.01  # a smaller gap is not worth a user model, however certain it is
PAIRS_FOR_INDIVIDUAL = 30  # pairs that the median user needs for a whole soft prompt
USERS_FOR_INDIVIDUAL = 1_000  # the table of `individual` grows by a whole soft prompt for each user


@dataclass(frozen=True)
class Recommendation:
    """
    Which user model to train.

    Args:
        kind (`str`): `"individual"`, `"cluster"` or `"low_rank"`; or `"none"`, which is vanilla DPO.
        reason (`str`): One or two sentences on why. They name no user.
        accuracy_by_kind (`dict[str, float]`): For each kind, the pair accuracy on held-out prompts of rules that users share
            in the way of that kind. Empty if `kind` is `"none"`.
    """

    kind: str
    reason: str
    accuracy_by_kind: dict[str, float]


def recommend(
    room: Room, features: NDArray[np.float32], users: IntArray, prompts: IntArray, seed: int
) -> Recommendation:
    """
    The kind of user model for the data.

    It is `"none"` without evidence of room, or with less room than `MIN_ROOM`. Otherwise it is the first kind that is not
    clearly worse than the best one. `individual` comes first if users are few and have many pairs, and last if not.

    Args:
        room ([`Room`]): The room that was found in the same pairs.
        features (`NDArray`): Differences between chosen and rejected answers, as [`scale`] returns them. Shape:
            `(n, num_features)`.
        users (`IntArray`): Number of each pair's user, counted from 0. Shape: `(n,)`.
        prompts (`IntArray`): Number of each pair's prompt, counted from 0. Shape: `(n,)`.
        seed (`int`): Random seed for the partition into folds.
    """
    if not room.has_evidence:
        return Recommendation("none", _why_none(room), {})
    if room.gap.value < MIN_ROOM:
        reason = f"Users differ, but knowing them adds only {room.gap:+.3f} to the pair accuracy of simple rules."
        return Recommendation("none", reason, {})
    validation = cross_validate(features, prompts, np.random.default_rng(seed))
    scores = {kind: validation.personal(users, room.num_users, sharing) for kind, sharing in SHARING.items()}
    accuracies = {kind: float(values.mean()) for kind, values in scores.items()}
    best = max(accuracies, key=lambda kind: accuracies[kind])
    pairs = float(np.median(np.bincount(users)))
    few_users = room.num_users <= USERS_FOR_INDIVIDUAL and pairs >= PAIRS_FOR_INDIVIDUAL
    order = ("individual", "cluster", "low_rank") if few_users else ("cluster", "low_rank", "individual")
    kind = next(kind for kind in order if kind == best or cluster_mean(scores[best] - scores[kind], prompts).low <= 0)
    return Recommendation(kind, _why(room, kind, best, pairs, accuracies), accuracies)


def _why_none(room: Room) -> str:
    text = (
        f"No evidence of room: on held-out prompts, simple rules of single users gain {room.gap:+.3f} over one for everybody "
        f"(shuffled ids: {np.mean(room.shuffled_gaps):+.3f}, p = {room.p_value:.3f})."
    )
    if room.p_value <= SIGNIFICANCE:
        text += (
            " That is more than with shuffled ids, so users may differ, but not enough to beat one rule for everybody."
        )
    if room.gap.high > 2 * MIN_ROOM:
        text += f" The data are too few to rule out up to {room.gap.high:+.3f}."
    return text + " A language model may see tastes that simple features do not."


def _why(room: Room, kind: str, best: str, pairs: float, accuracies: Mapping[str, float]) -> str:
    size = f"{room.num_users:,} users with {pairs:.0f} pairs in the median"
    equal = [f"`{other}`" for other, value in accuracies.items() if other != kind and value >= accuracies[best] - 5e-4]
    if kind != best and accuracies[kind] < accuracies[best] - 5e-4:
        choice = f"`{kind}` is not clearly worse than `{best}`"
    elif equal:
        choice = f"`{kind}` does as well on held-out prompts as {' and '.join(equal)}"
    else:
        choice = f"`{kind}` does best on held-out prompts"
    return (
        f"Simple rules of single users gain {room.gap:+.3f} over one for everybody on held-out prompts "
        f"(shuffled ids: {np.mean(room.shuffled_gaps):+.3f}, p = {room.p_value:.3f}). For {size}, {choice}."
    )


def share_clusters(sums: FloatArray, num_pairs: FloatArray, noise: float) -> list[Candidate]:
    """Users of a cluster learn together, as in the user model `cluster`: one candidate for each of `NUM_CLUSTERS`."""
    candidates = []
    for number in NUM_CLUSTERS:
        clusters = find_clusters(sums / (num_pairs + SHRINKAGE)[:, None], num_pairs, number)
        members = np.eye(clusters.max() + 1)[clusters]
        candidates.append(Candidate((members.T @ sums)[clusters], (members.T @ num_pairs)[clusters]))
    return candidates


def share_directions(sums: FloatArray, num_pairs: FloatArray, noise: float) -> list[Candidate]:
    """Offsets lie in a small space, as in the user model `low_rank`: one candidate for each of `RANKS`."""
    offsets = sums / (num_pairs + SHRINKAGE)[:, None]
    _, _, directions = np.linalg.svd(np.sqrt(num_pairs)[:, None] * offsets, full_matrices=False)
    return [Candidate(sums @ directions[:rank].T @ directions[:rank], num_pairs) for rank in RANKS]


def find_clusters(points: FloatArray, weights: FloatArray, number: int) -> IntArray:
    """
    K-means with weights: the cluster of each point `(n,)`. It starts from points that are far apart, and draws none at random.

    ```python
    >>> find_clusters(np.array([[0.0], [5.0], [0.2], [5.1]]), np.ones(4), number=2).tolist()
    [1, 0, 1, 0]
    ```
    """
    heavy = np.maximum(weights, 1e-9)
    distances = heavy * (points**2).sum(axis=1)
    centers = np.empty((0, points.shape[1]))
    for _ in range(min(number, len(points))):
        centers = np.concatenate([centers, points[[int(np.argmax(distances))]]])
        distances = heavy * _distances(points, centers).min(axis=1)
    clusters = _distances(points, centers).argmin(axis=1)
    for _ in range(KMEANS_STEPS):
        members = np.eye(len(centers))[clusters] * heavy[:, None]
        total = members.sum(axis=0)
        centers = np.where(total[:, None] > 0, members.T @ points / np.maximum(total, 1e-9)[:, None], centers)
        before, clusters = clusters, _distances(points, centers).argmin(axis=1)
        if np.array_equal(before, clusters):
            break
    return clusters


def _distances(points: FloatArray, centers: FloatArray) -> FloatArray:
    """Squared distance of each point to each center, `(num_points, num_centers)`."""
    return ((points[:, None] - centers[None]) ** 2).sum(axis=2)


SHARING: dict[str, Sharing] = {"individual": share_nothing, "cluster": share_clusters, "low_rank": share_directions}
