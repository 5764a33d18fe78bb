"""How far to trust what is expected of answers: learned from the answers themselves, each expected without itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


SPREAD = 0.5  # of the logarithm of the sharpness, before any answer is seen
LARGEST = 2.5  # of that logarithm
NUM_POINTS = 101
NEVER = 1e-6  # a probability below is as good as this


@dataclass(frozen=True)
class Sharpness:
    """
    Temperature scaling: a probability `p` is told as `sigmoid(k * logit(p))`. Answers that follow a rule come out right more
    often than the margins of a policy say, answers by chance less often.

    Args:
        value (`float`): `k`, the geometric mean of its posterior.
        draws (`Tensor` `(D,)`): Draws of `k` from its posterior, which widen intervals.
    """

    value: float
    draws: Tensor

    def of(self, probabilities: Tensor) -> Tensor:
        """Probabilities as they are told, in the same shape."""
        return torch.sigmoid(self.value * _logit(probabilities))

    def of_draws(self, probabilities: Tensor) -> Tensor:
        """The same of `(D, n)` draws of probabilities, each with a draw of `k`."""
        return torch.sigmoid(self.draws[:, None] * _logit(probabilities))


def learn_sharpness(left_out: Tensor, num_draws: int) -> Sharpness:
    """
    The posterior of `k` by the answers at hand: `log k` is `N(0, SPREAD^2)` before, and each answer has the probability
    `sigmoid(k * logit(p))`.

    Args:
        left_out (`Tensor` `(n,)`): How probable each answer was, given all others of its user.
        num_draws (`int`): The number of draws.

    ```python
    >>> sharp, blunt = (learn_sharpness(torch.full((50,), p, dtype=torch.float64), 1).value for p in (0.7, 0.4))
    >>> sharp > 2, blunt < 0.5
    (True, True)
    >>> learn_sharpness(torch.zeros(0, dtype=torch.float64), 1).value
    1.0
    ```
    """
    logarithms = torch.linspace(-LARGEST, LARGEST, NUM_POINTS, dtype=torch.float64)
    found = torch.nn.functional.logsigmoid(logarithms.exp()[:, None] * _logit(left_out.double())).sum(1)
    weights = (found - (logarithms / SPREAD).square() / 2).softmax(0)
    numbers = torch.multinomial(weights, num_draws, True, generator=torch.Generator().manual_seed(0))
    return Sharpness(round(float((weights @ logarithms).exp()), 9), logarithms[numbers].exp())


def _logit(probabilities: Tensor) -> Tensor:
    return torch.logit(probabilities.double(), eps=NEVER)
