"""Where rows of users lie before anything is known of a user: around a start row, in the directions in which users differ."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .margins import RowMargins


logger = logging.getLogger(__name__)

MAX_ROWS = 1024  # of known users from which directions are taken; more are read at even distances
MAX_RANK = 64
SMALLEST = 1e-3  # a direction counts if known users differ by this share of the largest
INITIAL_SPREAD = 0.3  # of a new user's row where no known users tell it, in units of the user model
MAX_PAIRS = 256  # whose gradients span the directions then


@dataclass(frozen=True)
class RowPrior:
    """
    A row is `start + z @ basis` with codes `z` from `N(0, I)`, or wider or narrower by the precision of a hypothesis.

    Args:
        basis (`Tensor` `(rank, width)`): The directions, each as long as the standard deviation along it.
        is_of_users (`bool`): Whether known users tell directions and spread.
    """

    basis: Tensor
    is_of_users: bool


def prior_of_users(generic: Tensor, known: Tensor) -> Tensor:
    """
    The directions and the spread of the rows of known users around the generic row: `basis` `(rank, width)`, such that their
    codes have covariance `I` (the singular value decomposition of their distances from it).

    ```python
    >>> prior_of_users(torch.zeros(1, 2), torch.tensor([[3.0, 0.0], [-3.0, 0.0]])).abs()
    tensor([[3., 0.]])
    ```
    """
    distances = (known - generic).double()
    _, sizes, directions = torch.linalg.svd(distances, full_matrices=False)
    rank = min(int((sizes > SMALLEST * sizes[:1].clamp(min=1e-12)).sum()), MAX_RANK)
    basis = directions[:rank] * sizes[:rank, None] / len(known) ** 0.5
    return basis.float()


def row_prior(margins: RowMargins, num_known: int, embedding_std: float) -> RowPrior:
    """
    The prior of rows in a user model. With no or one known user there is nothing to tell the directions: then they are those
    in which the margins of the pairs at hand change most, with the spread of [`INITIAL_SPREAD`], and a message says so.
    """
    if num_known > 1:
        step = -(-num_known // MAX_ROWS)
        rows = margins.flat_rows([0, *range(1, num_known + 1, step)])
        basis = prior_of_users(rows[:1], rows[1:])
        if len(basis):
            return RowPrior(basis, True)
    logger.warning(
        "The model has %s, so nothing tells in which directions users differ: new rows are fitted as free offsets, with an "
        "initial spread. That takes more pairs of each.",
        f"{num_known} known users whose rows do not differ" if num_known > 1 else f"{num_known} known user(s)",
    )
    step = max(1, -(-len(margins) // MAX_PAIRS))
    numbers = torch.arange(0, len(margins), step)
    generic = margins.flat_rows([0])
    units = margins.user_model.units(embedding_std)
    spread = torch.cat(
        [
            torch.full((table.weight[0].numel(),), INITIAL_SPREAD * units[f"{name}.weight"])
            for name, table in margins.tables.items()
        ]
    )
    _, slopes = margins.at(generic, torch.zeros(len(margins), dtype=torch.long), numbers=numbers)
    assert slopes is not None
    _, sizes, directions = torch.linalg.svd(slopes * spread, full_matrices=False)
    rank = min(int((sizes > SMALLEST * sizes[:1].clamp(min=1e-12)).sum()), MAX_RANK)
    return RowPrior(directions[:rank] * spread, False)


def is_linear(margins: RowMargins, start: Tensor, basis: Tensor) -> bool:
    """Whether soft prompts go with codes along a line, as in `individual` and `low_rank`, and not in `cluster`."""
    if not len(basis):
        return True
    with torch.no_grad():
        step = basis.sum(0)
        rows = torch.stack([start - step, start, start + step])
        below, middle, above = torch.cat([margins.soft_prompts(row[None]) for row in rows])
        bend = (above + below - 2 * middle).abs().max()
        return bool(bend <= 1e-4 * (above - below).abs().max())
