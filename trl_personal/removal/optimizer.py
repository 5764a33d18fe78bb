"""The state of an optimizer in a checkpoint, without the rows of removed users."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.optimizer import user_groups
from ..user_models import UserModel


OPTIMIZER_FILE = "optimizer.pt"
SHARDED = ("global_step*", "optimizer_*", "pytorch_model_fsdp*")  # what DeepSpeed and FSDP2 write in its place
BLOCKS = ("absmax", "qmap", "gnorm_vec")  # of 8-bit states, whose blocks are not the rows


def optimizer_without_rows(path: Path, user_model: UserModel, rows: Sequence[int]) -> dict[str, Any]:
    """
    The state in an `optimizer.pt`, without the moments of some users: other rows move up and stay the same to the last bit.

    Args:
        path (`Path`): The file, which is read without running code (`weights_only`), as its numbers are needed.
        user_model ([`UserModel`]): That of the checkpoint, before the removal.
        rows (`list[int]`): The rows of the removed users, 1 to `num_users`.

    Raises:
        `ValueError`: if it cannot be told which of its states are the users'.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    num_rows = user_model.config.num_users + 1
    kept = torch.tensor([row for row in range(num_rows) if row not in set(rows)])
    for number in _states_of_tables(path, state, user_model):
        moments = list(_tensors(state["state"].get(number, {})))
        if any(name.startswith(BLOCKS) for _, name, _ in moments):
            raise ValueError(_cannot(path, "they are of blocks, which are not the rows"))
        for container, name, value in moments:
            if value.shape[0] == num_rows:
                container[name] = value[kept].clone()
    return state


def _states_of_tables(path: Path, state: dict[str, Any], user_model: UserModel) -> set[int]:
    """Numbers of the parameters with a row per user. The user model's are the last, in one of two orders."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    tables = {f"{name}.weight" for name in user_model.row_tables()}
    named = dict(user_model.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    unusual = 0.123456789  # a unit that no kind has by itself
    orders = [
        [names[id(parameter)] for group in user_groups(user_model, rate, unusual) for parameter in group["params"]]
        for rate in (1.0, None)
    ]
    found = set()
    for order in orders:
        last = dict(zip(numbers[len(numbers) - len(order) :], order, strict=False))
        fits = len(last) == len(order) and all(
            _fits(state["state"].get(number, {}), named[name].shape) for number, name in last.items()
        )
        if fits:
            found.add(
                frozenset(number for number, name in last.items() if name in tables and number in state["state"])
            )
    if len(found) != 1:
        raise ValueError(_cannot(path, "its states are not those of this user model"))
    return set(found.pop())


def _fits(state: dict[str, Any], shape: torch.Size) -> bool:
    """Whether the moments of a parameter have its shape, or (Adafactor) that of its rows and columns."""
    allowed = {shape, shape[:-1], torch.Size([*shape[:-2], *shape[-1:]])}
    return all(value.shape in allowed for _, name, value in _tensors(state) if not name.startswith(BLOCKS))


def _tensors(state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The tensors with rows in the state of a parameter, with where they are: bitsandbytes puts its own one level deeper."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.ndim:
            yield state, name, value


def _cannot(path: Path, why: str) -> str:
    return (
        f"The rows of users in {path} cannot be told from others: {why}. Delete the checkpoint, then remove the users."
    )
