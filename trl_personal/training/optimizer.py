"""The user model's group of parameters in an optimizer."""

from typing import Any

import torch

from ..user_models import UserModel


def user_group(user_model: UserModel, learning_rate: float | None) -> dict[str, Any]:
    """
    The parameters of the user model that are trained, as a group of an optimizer: without weight decay, which would pull a
    user without rows towards the generic one, and with `learning_rate` unless that is `None`.
    """
    trained = [parameter for parameter in user_model.parameters() if parameter.requires_grad]
    group: dict[str, Any] = {"params": trained, "weight_decay": 0.0}
    if learning_rate is not None:
        group["lr"] = learning_rate
    return group


def move_to_user_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Take the parameters of `group` out of the groups of `optimizer`, and add it as a group of its own."""
    user_parameters = {id(parameter) for parameter in group["params"]}
    for other in optimizer.param_groups:
        other["params"] = [parameter for parameter in other["params"] if id(parameter) not in user_parameters]
    if user_parameters:
        optimizer.add_param_group(group)


def add_user_group(optimizer: torch.optim.Optimizer, scheduler: object | None, group: dict[str, Any]) -> None:
    """
    Add `group` to an optimizer that the caller made, unless its parameters are there already.

    Raises:
        `ValueError`: if a scheduler is bound to the optimizer, which would not know the group.
    """
    present = {id(parameter) for other in optimizer.param_groups for parameter in other["params"]}
    if all(id(parameter) in present for parameter in group["params"]):
        return
    if scheduler is not None:
        raise ValueError(
            "The optimizer in `optimizers` does not hold the user model's parameters, and a scheduler is bound to it already. "
            "Pass the optimizer alone (the user model is then added to it), or make a `user_model` first and include it."
        )
    optimizer.add_param_group(group)
