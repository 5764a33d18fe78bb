from .base import USER_MODELS, UserModel, UserModelConfig, get_user_model_class, register_user_model
from .cluster import ClusterUserModel, ClusterUserModelConfig
from .individual import IndividualUserModel
from .low_rank import LowRankUserModel, LowRankUserModelConfig


__all__ = [
    "USER_MODELS",
    "ClusterUserModel",
    "ClusterUserModelConfig",
    "IndividualUserModel",
    "LowRankUserModel",
    "LowRankUserModelConfig",
    "UserModel",
    "UserModelConfig",
    "get_user_model_class",
    "register_user_model",
]
