"""How often each user's preferences come out right, with the own soft prompt and with another's."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..arrays import FloatArray
from ..users import GENERIC_USER_INDEX


def pair_margins(
    log_probs: Tensor,
    completion_mask: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    ld_alpha: float | None = None,
) -> Tensor:
    """
    How much more than the reference the policy prefers chosen to rejected, in nats, float `(batch,)`: the difference of
    log-ratios inside the DPO loss. A pair is right if it is above zero.

    Args:
        log_probs (`Tensor` `(2 * batch, seq_len - 1)`): Log-probabilities of the completion tokens, zero elsewhere;
            chosen rows first.
        completion_mask (`Tensor` `(2 * batch, seq_len)`): Nonzero at completion tokens.
        ref_chosen_logps (`Tensor` `(batch,)`): Sum over the chosen completion under the reference.
        ref_rejected_logps (`Tensor` `(batch,)`): Sum over the rejected completion under the reference.
        ld_alpha (`float`, *optional*): Weight of tokens past the shorter completion (LD-DPO).

    ```python
    >>> log_probs = torch.tensor([[0.0, -1.0], [0.0, -3.0]])
    >>> pair_margins(log_probs, torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.tensor([-2.0]), torch.tensor([-2.0]))
    tensor([2.])
    ```
    """
    if ld_alpha is not None:
        mask = completion_mask[:, 1:]
        shared = mask.sum(dim=1).view(2, -1).amin(dim=0).repeat(2)[:, None]
        log_probs = torch.where(mask.cumsum(dim=1) > shared, ld_alpha * log_probs, log_probs)
    chosen, rejected = log_probs.sum(dim=1).chunk(2)
    return (chosen - ref_chosen_logps) - (rejected - ref_rejected_logps)


def swapped_user_indices(user_indices: Tensor, num_users: int) -> Tensor:
    """
    Another known user for each: the next row, and the first after the last. The generic user stays.

    ```python
    >>> swapped_user_indices(torch.tensor([1, 2, 3, 0]), num_users=3)
    tensor([2, 3, 1, 0])
    ```
    """
    swapped = user_indices % max(num_users, 1) + 1
    return torch.where(user_indices == GENERIC_USER_INDEX, user_indices, swapped)


class UserAccuracy:
    """
    Pair accuracy of known users, each user counting the same whatever the number of pairs.

    ```python
    >>> accuracy = UserAccuracy()
    >>> accuracy.add(torch.tensor([1, 1, 2, 0]), {"own": torch.tensor([1.0, 0.0, 1.0, 0.0])})
    >>> accuracy.by_user("own")
    {1: 0.5, 2: 1.0}
    >>> accuracy.mean("own"), accuracy.worst("own")
    (0.75, 0.5)
    ```
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = defaultdict(int)
        self._correct: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))

    def __len__(self) -> int:
        """Number of users with pairs."""
        return len(self._counts)

    def add(self, user_indices: Tensor, correct: dict[str, Tensor]) -> None:
        """Count pairs: LongTensor `(batch,)` of users and, for each prompt that was tried, `(batch,)` of 1 or 0."""
        for position, user_index in enumerate(user_indices.tolist()):
            if user_index == GENERIC_USER_INDEX:
                continue
            self._counts[user_index] += 1
            for name, values in correct.items():
                self._correct[name][user_index] += float(values[position])

    def by_user(self, name: str) -> dict[int, float]:
        """Accuracy of each user with the prompts `name`."""
        return {user: total / self._counts[user] for user, total in sorted(self._correct[name].items())}

    def mean(self, name: str) -> float:
        """Mean over users."""
        accuracies = self.by_user(name)
        return sum(accuracies.values()) / len(accuracies)

    def worst(self, name: str) -> float:
        """The lowest user's accuracy."""
        return min(self.by_user(name).values())


class MarginRecorder:
    """
    Takes down the margins of each batch of an evaluation. While `trainer.margin_recorder` is one, the trainer fills it.

    Args:
        swapped_rows (`LongTensor` `(num_users + 1,)`, *optional*): For each row of the user table the one to swap it with;
            default: the next ([`swapped_user_indices`]).
    """

    def __init__(self, swapped_rows: Tensor | None = None) -> None:
        self.swapped_rows = swapped_rows
        self.dataset: Any = None
        self._margins: dict[str, list[Tensor]] = defaultdict(list)

    def see(self, dataset: Any) -> None:
        """The dataset as prepared by the trainer, which leaves out rows whose prompt alone fills `max_length`."""
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError("No pair is left to score: each prompt alone fills `max_length`. Raise it.")
        self.dataset = dataset

    def add(self, margins: Mapping[str, Tensor]) -> None:
        """Margins `(batch,)` of each scorer."""
        for name, values in margins.items():
            self._margins[name].append(values.detach().cpu().double())

    def swapped(self, user_indices: Tensor, num_users: int) -> Tensor:
        """Rows of other users, `(batch,)`."""
        if self.swapped_rows is None:
            return swapped_user_indices(user_indices, num_users)
        return self.swapped_rows.to(user_indices.device)[user_indices]

    def arrays(self) -> dict[str, FloatArray]:
        """The margins of all batches, `(n,)`."""
        return {name: torch.cat(values).numpy() for name, values in self._margins.items()}
