"""One soft prompt per user, as an offset from the generic user's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..users import GENERIC_USER_INDEX
from .base import UserModel, UserModelConfig, register_user_model


@register_user_model("individual")
class IndividualUserModel(UserModel):
    """
    e_u = e_0 + o_u (individual preferences, section 3 of arXiv 2402.05133). The offsets o_u start at zero, and the generic
    user has none: row 0 is the padding row of the table and gets no gradient.

    ```python
    >>> user_model = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=4))
    >>> soft_prompt = user_model(torch.tensor([2, 0]))
    >>> soft_prompt.shape, torch.equal(soft_prompt[0], soft_prompt[1])
    (torch.Size([2, 3, 4]), True)
    ```
    """

    def __init__(self, config: UserModelConfig) -> None:
        super().__init__(config)
        self.generic_prompt = nn.Parameter(0.02 * torch.randn(config.num_virtual_tokens, config.token_dim))
        self.user_offsets = nn.Embedding(
            config.num_users + 1, config.num_virtual_tokens * config.token_dim, padding_idx=GENERIC_USER_INDEX
        )
        nn.init.zeros_(self.user_offsets.weight)

    def forward(self, user_indices: Tensor) -> Tensor:
        has_row = (user_indices != GENERIC_USER_INDEX).unsqueeze(-1)
        offsets = self.user_offsets(user_indices).where(has_row, 0)
        return self.generic_prompt + offsets.view(-1, self.config.num_virtual_tokens, self.config.token_dim)

    @torch.no_grad()
    def initialize(self, draw: Callable[[int], Tensor]) -> None:
        self.generic_prompt.copy_(draw(1)[0])
