"""What a user model needs in training, known before anything is allocated."""

import logging

import torch

from .base import UserModel, UserModelConfig
from .low_rank import LowRankUserModel, LowRankUserModelConfig


logger = logging.getLogger(__name__)

LARGE_BYTES = 1_000_000_000
FEW_USERS = 1_000  # up to here there is nothing to warn of: at T = 10 and width 4,096, a row is 0.66 MB in training
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient and AdamW's two moments


def training_bytes(user_model_class: type[UserModel], config: UserModelConfig) -> int:
    """
    Bytes of a user model in training: weights, gradients and AdamW's moments, each in float32. Nothing is allocated.

    ```python
    >>> from trl_personal import IndividualUserModel
    >>> training_bytes(IndividualUserModel, UserModelConfig(num_users=1_000_000, num_virtual_tokens=10, token_dim=4096))
    655361310720
    >>> training_bytes(LowRankUserModel, LowRankUserModelConfig(1_000_000, 10, 4096, user_rank=32))
    533627392
    ```
    """
    with torch.device("meta"):
        user_model = user_model_class(config)
    return BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in user_model.parameters())


def warn_if_large(user_model_class: type[UserModel], config: UserModelConfig, user_rank: int = 32) -> None:
    """Warn of a user model of more than 1 GB in training, with the figure and what `"low_rank"` of `user_rank` needs."""
    needed = training_bytes(user_model_class, config) if config.num_users > FEW_USERS else 0
    if needed <= LARGE_BYTES:
        return
    low_rank = LowRankUserModelConfig(config.num_users, config.num_virtual_tokens, config.token_dim, user_rank)
    alternative = training_bytes(LowRankUserModel, low_rank)
    advice = (
        f'`user_model_kind="low_rank"` with `user_rank={user_rank}` needs {_gigabytes(alternative)}.'
        if alternative < needed
        else "Make its sizes smaller, or leave users with few rows to the generic user (`user_vocab`)."
    )
    logger.warning(
        "The user model of kind %r needs %s in training for %d users: %d weights in float32, with their gradients and "
        "AdamW's two moments. %s",
        user_model_class.kind,
        _gigabytes(needed),
        config.num_users,
        needed // BYTES_PER_WEIGHT,
        advice,
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
