"""How far users' soft prompts have moved from the generic one, and from each other."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..users import GENERIC_USER_INDEX
from .base import UserModel


MOST_USERS = 1_000  # that are looked at, spread over the table
LITTLE = 0.05  # below which answers hardly change; users who learned what they prefer differ by 0.08 and more


@dataclass(frozen=True)
class Movement:
    """
    Distances of soft prompts, root mean square over their values, in standard deviations of the token embeddings.

    Args:
        moved (`float`): From the generic prompt, of the user who is farthest from it.
        differ (`float`): From the mean of all users, of the user who is farthest from it.
    """

    moved: float
    differ: float

    def to_dict(self) -> dict[str, Any]:
        """The two distances by name, for JSON."""
        return {"moved": self.moved, "differ": self.differ}

    def describe(self) -> str:
        """One sentence with both."""
        return (
            f"The farthest user's soft prompt is {self.moved:.2g} standard deviations of the token embeddings from the "
            f"generic one, and {self.differ:.2g} from the users' mean."
        )

    def warning(self) -> str | None:
        """
        A word if users hardly have a soft prompt of their own, else `None`.

        ```python
        >>> Movement(moved=0.4, differ=0.01).warning().split(":")[0]
        "Users' soft prompts hardly differ"
        >>> Movement(moved=0.4, differ=0.3).warning()
        ```
        """
        if self.moved < LITTLE:
            text, remedy = "hardly moved", "raise `user_learning_rate`, or train longer"
        elif self.differ < LITTLE:
            text, remedy = "hardly differ", "they may want the same, or `user_learning_rate` may be too low"
        else:
            return None
        return f"Users' soft prompts {text}: {remedy}. {self.describe()}"


@torch.no_grad()
def measure_movement(user_model: UserModel, embedding_std: float) -> Movement | None:
    """
    The [`Movement`] of the users of a model, of at most 1,000 spread over the table; `None` if there are no users, or where
    the weights are in pieces (FSDP2, ZeRO-3).

    Args:
        user_model ([`UserModel`]): The user model.
        embedding_std (`float`): The standard deviation of the language model's token embeddings.

    ```python
    >>> from trl_personal import IndividualUserModel, UserModelConfig
    >>> user_model = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=4))
    >>> _ = user_model.user_offsets.weight.data[1].fill_(0.2)
    >>> measure_movement(user_model, embedding_std=0.1).to_dict()
    {'moved': 2.0, 'differ': 1.0}
    ```
    """
    num_users = user_model.config.num_users
    weights = list(user_model.parameters())
    if not num_users or not embedding_std or any(isinstance(w, DTensor) or not w.numel() for w in weights):
        return None
    step = -(-num_users // MOST_USERS)
    users = torch.arange(GENERIC_USER_INDEX + 1, num_users + 1, step, device=weights[0].device if weights else None)
    prompts = user_model(torch.cat([users.new_tensor([GENERIC_USER_INDEX]), users])).float()
    generic, own = prompts[0], prompts[1:]
    return Movement(_farthest(own - generic) / embedding_std, _farthest(own - own.mean(dim=0)) / embedding_std)


def _farthest(offsets: Tensor) -> float:
    return round(offsets.pow(2).mean(dim=(1, 2)).sqrt().max().item(), 6)
