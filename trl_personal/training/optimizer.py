"""The user model's groups of parameters in an optimizer."""

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.saving import embedding_size, get_base_model
from ..user_models import UserModel
from ..user_models.initialization import embedding_std


DEFAULT_STEP = 0.03  # of a soft prompt in a step of Adam, in standard deviations of the token embeddings


def user_groups(user_model: UserModel, learning_rate: float | None, scale: float) -> list[dict[str, Any]]:
    """
    The parameters of the user model that are trained, as groups of an optimizer: without weight decay, which would pull a user
    without rows towards the generic one.

    Args:
        user_model ([`UserModel`]): The user model, whose frozen parameters are left out.
        learning_rate (`float`, *optional*): The rate of all of them, in one group. If it is `None`, there is a group for each
            of the [`UserModel.units`], at [`DEFAULT_STEP`] of that unit.
        scale (`float`): The standard deviation of the language model's token embeddings.
    """
    trained = {name: parameter for name, parameter in user_model.named_parameters() if parameter.requires_grad}
    if not trained:
        return []
    if learning_rate is not None:
        return [{"params": list(trained.values()), "weight_decay": 0.0, "lr": learning_rate}]
    units = user_model.units(scale)
    return [
        {
            "params": [parameter for name, parameter in trained.items() if units[name] == unit],
            "weight_decay": 0.0,
            "lr": DEFAULT_STEP * unit,
        }
        for unit in dict.fromkeys(units[name] for name in trained)
    ]


def measure_embedding_std(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
    """The [`embedding_std`] of a language model. All processes get that of the first, which may be alone in having weights."""
    embedding = get_base_model(model).get_input_embeddings()
    num_tokens, _ = embedding_size(embedding)
    with gather_params_ctx(list(embedding.parameters()), modifier_rank=None):
        (std,) = broadcast_object_list([embedding_std(embedding, min(num_tokens, len(tokenizer)))])
    return std


def move_to_user_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Take the parameters of `groups` out of the groups of `optimizer`, and add them as groups of their own."""
    user_parameters = {id(parameter) for group in groups for parameter in group["params"]}
    for other in optimizer.param_groups:
        other["params"] = [parameter for parameter in other["params"] if id(parameter) not in user_parameters]
    for group in groups:
        optimizer.add_param_group(group)


def add_user_groups(optimizer: torch.optim.Optimizer, scheduler: object | None, groups: list[dict[str, Any]]) -> None:
    """
    Add `groups` to an optimizer that the caller made, unless their parameters are there already.

    Raises:
        `ValueError`: if a scheduler is bound to the optimizer, which would not know the groups.
    """
    present = {id(parameter) for other in optimizer.param_groups for parameter in other["params"]}
    if all(id(parameter) in present for group in groups for parameter in group["params"]):
        return
    if scheduler is not None:
        raise ValueError(
            "The optimizer in `optimizers` does not hold the user model's parameters, and a scheduler is bound to it already. "
            "Pass the optimizer alone (the user model is then added to it), or make a `user_model` first and include it."
        )
    for group in groups:
        optimizer.add_param_group(group)
