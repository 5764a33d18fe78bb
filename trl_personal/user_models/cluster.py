"""Each user is a mixture of a few shared soft prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ..users import GENERIC_USER_INDEX
from .base import UserModel, UserModelConfig, register_user_model


SPREAD = 0.1  # of cluster prompts that start from one text, in standard deviations of its embeddings


@dataclass
class ClusterUserModelConfig(UserModelConfig):
    """
    Sizes of a [`ClusterUserModel`].

    Args:
        num_clusters (`int`, *optional*, defaults to 10): The number of soft prompts that all users share.
    """

    num_clusters: int = 10


@register_user_model("cluster")
class ClusterUserModel(UserModel):
    """
    e_u = sum_k softmax(w_u)_k v_k (cluster-based preferences, section 3 of arXiv 2402.05133). The generic user has a weight
    row of its own, w_0. All weights start at zero, so every user starts at the mean of the cluster prompts.

    ```python
    >>> config = ClusterUserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=4, num_clusters=2)
    >>> user_model = ClusterUserModel(config)
    >>> torch.allclose(user_model(torch.tensor([1]))[0], user_model.cluster_prompts.mean(0))
    True
    ```
    """

    config_class = ClusterUserModelConfig

    def __init__(self, config: ClusterUserModelConfig) -> None:
        super().__init__(config)
        self.cluster_prompts = nn.Parameter(
            0.02 * torch.randn(config.num_clusters, config.num_virtual_tokens, config.token_dim)
        )
        self.user_logits = nn.Embedding(config.num_users + 1, config.num_clusters)
        nn.init.zeros_(self.user_logits.weight)

    def forward(self, user_indices: Tensor) -> Tensor:
        weights = self.user_logits(user_indices).softmax(dim=-1)  # (batch, num_clusters)
        return torch.einsum("bk,ktd->btd", weights, self.cluster_prompts)

    @torch.no_grad()
    def initialize(self, draw: Callable[[int], Tensor]) -> None:
        prompts = draw(self.cluster_prompts.shape[0])
        if torch.equal(prompts, prompts[:1].expand_as(prompts)):
            # from one text: clusters that are equal would stay so, since they get equal gradients
            prompts = prompts + SPREAD * prompts.std() * torch.randn_like(prompts)
        self.cluster_prompts.copy_(prompts)

    def units(self, embedding_std: float) -> dict[str, float]:
        """As for any kind, and one for the logits, at which a softmax changes."""
        return super().units(embedding_std) | {"user_logits.weight": 1.0}

    @torch.no_grad()
    def resize(self, num_users: int) -> Self:
        resized = super().resize(num_users)
        # a new user starts as the generic user, not as an even mixture
        weight = resized.user_logits.weight
        weight[self.config.num_users + 1 :] = weight[GENERIC_USER_INDEX]
        return resized
