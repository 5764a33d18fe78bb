"""On which simple features users differ: the reason why there is room, or none."""

from dataclasses import dataclass

import numpy as np

from ..arrays import FloatArray, IntArray
from .text_features import FEATURES


@dataclass(frozen=True)
class Taste:
    """
    How often the chosen answer has more of a feature than the rejected one, among pairs in which they differ.

    Args:
        feature (`str`): Name of the feature, one of `FEATURES`.
        share (`float`): How often the chosen answer has more, as a share of all pairs. It is 0.5 if users as a whole do not
            care, or conflict.
        spread (`float`): Standard deviation of that share over users, beyond what chance makes of as many pairs. It is 0 if
            all users are alike, and 0.5 if one half always takes more and the other half less.
    """

    feature: str
    share: float
    spread: float


def find_tastes(differences: FloatArray, users: IntArray) -> tuple[Taste, ...]:
    """
    All features that ever differ, those on which users differ most first.

    Args:
        differences (`FloatArray`): Features of the chosen answers minus those of the rejected ones. Shape:
            `(n, len(FEATURES))`.
        users (`IntArray`): Number of each pair's user, counted from 0. Shape: `(n,)`.
    """
    tastes = []
    for column, name in enumerate(FEATURES):
        differ = differences[:, column] != 0
        if not differ.any():
            continue
        more = (differences[differ, column] > 0).astype(np.float64)
        totals = np.bincount(users[differ]).astype(np.float64)
        wins = np.bincount(users[differ], weights=more).astype(np.float64)
        share = float(more.mean())
        tastes.append(Taste(name, share, _spread(wins[totals > 0], totals[totals > 0], share)))
    return tuple(sorted(tastes, key=lambda taste: -taste.spread))


def _spread(wins: FloatArray, totals: FloatArray, share: float) -> float:
    """Between-user standard deviation by the method of moments (DerSimonian and Laird)."""
    weight = totals.sum() - (totals**2).sum() / totals.sum()
    if weight <= 0:
        return 0.0
    excess = (totals * (wins / totals - share) ** 2).sum() - (len(totals) - 1) * share * (1 - share)
    return float(np.sqrt(max(0.0, excess / weight)))
