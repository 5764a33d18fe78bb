"""DPO with TRL when every preference belongs to a user."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .models.attach import attach_user_model, detach_user_model
    from .models.loading import AutoPersonalizedModelForCausalLM
    from .training.collator import DataCollatorForPersonalizedPreference
    from .training.config import PersonalizedDPOConfig
    from .training.dpo import PersonalizedDPOTrainer
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

_MODULES = {
    "training.collator": ["DataCollatorForPersonalizedPreference"],
    "training.config": ["PersonalizedDPOConfig"],
    "models.attach": ["attach_user_model", "detach_user_model"],
    "models.loading": ["AutoPersonalizedModelForCausalLM"],
    "training.dpo": ["PersonalizedDPOTrainer"],
    "user_models": [
        "ClusterUserModel",
        "ClusterUserModelConfig",
        "IndividualUserModel",
        "LowRankUserModel",
        "LowRankUserModelConfig",
        "UserModel",
        "UserModelConfig",
        "register_user_model",
    ],
    "user_profile": ["render_user_profile"],
    "users": ["GENERIC_USER_INDEX", "UserVocab"],
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch and TRL take seconds, and the command line's `--help` needs neither."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
