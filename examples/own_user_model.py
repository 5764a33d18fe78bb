"""
A user model of your own in under 30 lines: every user is a point in a small shared space, e_u = e_0 + z_u B.

Import this file, then train with `PersonalizedDPOConfig(user_model_kind="point")`.
"""

import torch
from torch import Tensor, nn

from trl_personal import UserModel, UserModelConfig, register_user_model


@register_user_model("point")
class PointUserModel(UserModel):
    rank = 4

    def __init__(self, config: UserModelConfig) -> None:
        super().__init__(config)
        shape = (config.num_virtual_tokens, config.token_dim)
        self.generic_prompt = nn.Parameter(0.02 * torch.randn(shape))
        self.shared_basis = nn.Parameter(0.02 * torch.randn(self.rank, *shape))
        self.user_factors = nn.Embedding(config.num_users + 1, self.rank, padding_idx=0)  # row 0: the generic user
        nn.init.zeros_(self.user_factors.weight)

    def forward(self, user_indices: Tensor) -> Tensor:
        return self.generic_prompt + torch.einsum("br,rtd->btd", self.user_factors(user_indices), self.shared_basis)
