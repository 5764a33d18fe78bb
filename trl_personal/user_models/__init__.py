from .base import USER_MODELS, UserModel, UserModelConfig, get_user_model_class, register_user_model
from .cluster import ClusterUserModel, ClusterUserModelConfig
from .individual import IndividualUserModel


__all__ = [
    "USER_MODELS",
    "ClusterUserModel",
    "ClusterUserModelConfig",
    "IndividualUserModel",
    "UserModel",
    "UserModelConfig",
    "get_user_model_class",
    "register_user_model",
]
