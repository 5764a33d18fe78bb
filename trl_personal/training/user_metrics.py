"""The margins of evaluated pairs, and how often each user's preferences come out right."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

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


def accuracy_by_user(user_indices: Tensor, margins: Tensor) -> dict[int, float]:
    """
    The pair accuracy of each known user, in the order of rows. A pair is right if its margin is above zero; a tie is not.

    Args:
        user_indices (`LongTensor` `(n,)`): The user of each pair. Pairs of the generic user are left out.
        margins (`Tensor` `(n,)`): The margin of each pair ([`pair_margins`], in nats).

    ```python
    >>> accuracy_by_user(torch.tensor([1, 1, 2, 0]), torch.tensor([0.7, -0.1, 2.0, -3.0]))
    {1: 0.5, 2: 1.0}
    ```
    """
    counts = user_indices.bincount()
    right = user_indices.bincount(weights=(margins > 0).double())
    known = [user for user in counts.nonzero().flatten().tolist() if user != GENERIC_USER_INDEX]
    return {user: float(right[user] / counts[user]) for user in known}


class MarginRecorder:
    """
    Collects the margins of the pairs of one evaluation, for each scorer: what a pair is scored with.

    A trainer with users makes one for each evaluation, for its metrics. Set `trainer.margin_recorder` before
    `trainer.evaluate(...)` to keep the margins of that evaluation, or to score pairs with other users' soft prompts.

    Args:
        other_users (`Mapping[str, LongTensor]`, *optional*): Scorers beside `"own"` and `"generic"`: for each name, a tensor
            `(num_users + 1,)` with the row of the user table whose soft prompt the pairs of each row are scored with.

    ```python
    >>> recorder = MarginRecorder({"swapped": torch.tensor([0, 2, 1])})
    >>> recorder.add({"own": torch.tensor([1.0, -1.0, 2.0])}, torch.tensor([1, 1, 2]))
    >>> recorder.accuracy_by_user("own")
    {1: 0.5, 2: 1.0}
    >>> len(recorder), recorder.arrays()["own"].tolist()
    (3, [1.0, -1.0, 2.0])
    ```
    """

    def __init__(self, other_users: Mapping[str, Tensor] | None = None) -> None:
        self.other_users = dict(other_users or {})
        self.dataset: Any = None
        self._margins: dict[str, list[Tensor]] = defaultdict(list)
        self._user_indices: list[Tensor] = []

    def __len__(self) -> int:
        """The number of pairs so far."""
        return sum(map(len, self._margins.get("own", ())))

    def see(self, dataset: Any) -> None:
        """Keep the dataset as the trainer has prepared it: rows whose prompt alone fills `max_length` are missing there."""
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError("No pair is left to score: each prompt alone fills `max_length`. Raise it.")
        self.dataset = dataset

    def add(self, margins: Mapping[str, Tensor], user_indices: Tensor | None = None) -> None:
        """
        Add a batch of pairs.

        Args:
            margins (`Mapping[str, Tensor]`): For each scorer the margins `(batch,)`.
            user_indices (`LongTensor` `(batch,)`, *optional*): The user of each pair; a model without users has none.
        """
        for name, values in margins.items():
            self._margins[name].append(values.detach().cpu().double())
        if user_indices is not None:
            self._user_indices.append(user_indices.detach().cpu())

    def arrays(self) -> dict[str, FloatArray]:
        """The margins of all batches, `(n,)` for each scorer."""
        return {name: torch.cat(values).numpy() for name, values in self._margins.items()}

    def accuracy_by_user(self, name: str) -> dict[int, float]:
        """The accuracy of each known user with the scorer `name`; see [`accuracy_by_user`]."""
        if not self._user_indices:
            return {}
        return accuracy_by_user(torch.cat(self._user_indices), torch.cat(self._margins[name]))

    def metrics(self) -> dict[str, float]:
        """Means over known users, each counting the same whatever the number of pairs, and the lowest user's accuracy."""
        own = self.accuracy_by_user("own").values()
        if not own:
            return {}
        metrics = {"users/accuracy_mean": sum(own) / len(own), "users/accuracy_worst": min(own)}
        for name in self.other_users:
            others = self.accuracy_by_user(name).values()
            metrics[f"users/accuracy_{name}"] = sum(others) / len(others)
        return metrics


@contextmanager
def metrics_under(trainer: Any, prefix: str | None) -> Iterator[None]:
    """
    Keep what a trainer of TRL logs inside under `prefix`, or nowhere if that is `None`. Without a prefix (`""`) nothing
    changes; otherwise the tokens inside are not counted, since the user's own term has counted them.
    """
    if prefix == "":
        yield
        return
    metrics, num_tokens = trainer._metrics, trainer._total_train_tokens
    trainer._metrics = {mode: defaultdict(list) for mode in metrics}
    try:
        yield
    finally:
        logged, trainer._metrics, trainer._total_train_tokens = trainer._metrics, metrics, num_tokens
    for mode, values in logged.items():
        for name, numbers in values.items():
            if prefix is not None and name != "num_tokens":
                metrics[mode][prefix + name].extend(numbers)


@contextmanager
def scored_outputs(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """The output `name` of each forward pass of `model` inside; none in training, where nothing is scored."""
    found: list[Tensor] = []
    if model.training:
        yield found
        return
    handle = model.register_forward_hook(
        lambda module, args, output: found.append(output[name]) if name in output else None
    )
    try:
        yield found
    finally:
        handle.remove()
