"""One soft prompt per user, from a few numbers each and a basis that all share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..users import GENERIC_USER_INDEX
from .base import UserModel, UserModelConfig, register_user_model


@dataclass
class LowRankUserModelConfig(UserModelConfig):
    """
    Sizes of a [`LowRankUserModel`].

    Args:
        user_rank (`int`, *optional*, defaults to 32): How many numbers a user has.
    """

    user_rank: int = 32


@register_user_model("low_rank")
class LowRankUserModel(UserModel):
    """
    e_u = e_0 + z_u B, with `user_rank` numbers z_u per user, which start at zero, and one basis B of offsets. The offsets of
    [`IndividualUserModel`] at a fraction of the memory: a million users of 10 tokens and width 4,096 take 41 billion numbers
    there and 33 million here, at rank 32.

    ```python
    >>> config = LowRankUserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=4, user_rank=2)
    >>> soft_prompt = LowRankUserModel(config)(torch.tensor([2, 0]))
    >>> soft_prompt.shape, torch.equal(soft_prompt[0], soft_prompt[1])
    (torch.Size([2, 3, 4]), True)
    ```
    """

    config_class = LowRankUserModelConfig

    def __init__(self, config: LowRankUserModelConfig) -> None:
        super().__init__(config)
        shape = (config.num_virtual_tokens, config.token_dim)
        self.generic_prompt = nn.Parameter(0.02 * torch.randn(shape))
        self.shared_basis = nn.Parameter(0.02 * torch.randn(config.user_rank, *shape))
        self.user_factors = nn.Embedding(config.num_users + 1, config.user_rank, padding_idx=GENERIC_USER_INDEX)
        nn.init.zeros_(self.user_factors.weight)

    def forward(self, user_indices: Tensor) -> Tensor:
        has_row = (user_indices != GENERIC_USER_INDEX).unsqueeze(-1)
        factors = self.user_factors(user_indices).where(has_row, 0)
        return self.generic_prompt + torch.einsum("br,rtd->btd", factors, self.shared_basis)

    @torch.no_grad()
    def initialize(self, draw: Callable[[int], Tensor]) -> None:
        prompt = draw(1)[0]
        self.shared_basis.mul_(
            prompt.std() / self.shared_basis.std()
        )  # offsets on the scale of the model's embeddings
        self.generic_prompt.copy_(prompt)

    def units(self, embedding_std: float) -> dict[str, float]:
        """As for any kind, and for the factors what makes an offset on the scale of the basis of `user_rank` of them."""
        return super().units(embedding_std) | {"user_factors.weight": len(self.shared_basis) ** -0.5}
