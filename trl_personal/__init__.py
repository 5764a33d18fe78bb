"""DPO with TRL when every preference belongs to a user."""

from ._version import __version__
from .collator import DataCollatorForPersonalizedPreference
from .config import PersonalizedDPOConfig
from .modeling import AutoPersonalizedModelForCausalLM, attach_user_model, detach_user_model
from .trainer import PersonalizedDPOTrainer
from .user_models import (
    ClusterUserModel,
    ClusterUserModelConfig,
    IndividualUserModel,
    LowRankUserModel,
    LowRankUserModelConfig,
    UserModel,
    UserModelConfig,
    register_user_model,
)
from .user_profile import render_user_profile
from .users import GENERIC_USER_INDEX, UserVocab


__all__ = [
    "GENERIC_USER_INDEX",
    "AutoPersonalizedModelForCausalLM",
    "ClusterUserModel",
    "ClusterUserModelConfig",
    "DataCollatorForPersonalizedPreference",
    "IndividualUserModel",
    "LowRankUserModel",
    "LowRankUserModelConfig",
    "PersonalizedDPOConfig",
    "PersonalizedDPOTrainer",
    "UserModel",
    "UserModelConfig",
    "UserVocab",
    "__version__",
    "attach_user_model",
    "detach_user_model",
    "register_user_model",
    "render_user_profile",
]
