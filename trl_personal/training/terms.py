"""The parts that a personalized loss is the sum of."""

from dataclasses import dataclass
from typing import Any


TERMS = "terms"  # a batch that is `{TERMS: [Term, ...]}` is prepared: it says itself what to compute


@dataclass(frozen=True)
class Term:
    """
    One part of a personalized loss: TRL's loss on `batch`, multiplied by `weight`.

    Args:
        prefix (`str`): What TRL's metrics on this batch are logged under, such as `"generic/"`. The user's own term has none.
        weight (`float`): The share of this term in the loss.
        batch (`dict`): What TRL's `compute_loss` gets, the reference's outputs among it.
    """

    prefix: str
    weight: float
    batch: dict[str, Any]
