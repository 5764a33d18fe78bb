"""Settings of the trainers: TRL's, and a few of users."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

from trl import DPOConfig

from ..user_models import get_user_model_class
from ..user_models.initialization import SOFT_PROMPT_INITS
from ..user_profile import USER_PROFILE_TEMPLATE, check_user_profile_template


GENERIC_TERMS = ("exact", "sampled")
SHARE_PREFIX = ("auto", "always", "never")
ON_DIVERGENCE = ("stop", "warn")
FREEZE = ("nothing", "shared")
MAY_BE_INFINITE = {"max_grad_norm"}  # no clipping
LOWEST = {
    0: ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "seed"),
    1: ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length"),
}
ABOVE_ZERO = ("beta", "num_train_epochs")


@dataclass
class PersonalizationConfig:
    """
    The settings of users (arXiv 2402.05133) that any trainer has; their defaults are the paper's. A trainer's own config puts
    this class in front of TRL's: `class PersonalizedDPOConfig(PersonalizationConfig, DPOConfig)`.

    Parameters:
        user_model_kind (`str`, *optional*, defaults to `"individual"`):
            How users become soft prompts: `"individual"`, `"cluster"`, `"low_rank"` or any registered kind. `"none"` is
            TRL's own trainer, to the last bit.
        num_virtual_tokens (`int`, *optional*, defaults to `10`):
            Number of vectors in a user's soft prompt.
        num_clusters (`int`, *optional*, defaults to `10`):
            Number of soft prompts that users of the `"cluster"` kind share.
        user_rank (`int`, *optional*, defaults to `32`):
            How many numbers the `"low_rank"` kind keeps for each user.
        soft_prompt_init (`str`, *optional*, defaults to `"sample_vocab"`):
            Where soft prompts start: `"sample_vocab"` (embeddings of random tokens), `"random"` (noise on their scale) or
            `"text"` (embeddings of `soft_prompt_init_text`). Draws follow `seed`.
        soft_prompt_init_text (`str`, *optional*):
            The text for `soft_prompt_init="text"`.
        personalization_alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the user's term in the loss; the generic user's term has the rest.
        generic_term (`str`, *optional*, defaults to `"exact"`):
            `"exact"` computes both terms for every pair. `"sampled"` computes one of them for each pair, the user's with
            probability `personalization_alpha`: the same loss in expectation at half the policy passes, with more noise.
            Evaluation is always exact.
        user_id_column (`str`, *optional*, defaults to `"user_id"`):
            Column with the user of each row, text or integers. `None` is the generic user.
        user_learning_rate (`float`, *optional*):
            Learning rate of all weights of the user model. If it is not set, each has a rate of its own, so that soft prompts
            move by about 0.03 standard deviations of the language model's token embeddings in a step of Adam
            ([`UserModel.units`]); at a `learning_rate` of 0 nothing moves. 0 leaves users as they are.
        freeze (`str`, *optional*, defaults to `"nothing"`):
            `"shared"` trains nothing but the rows of users: the language model or adapter, what users share and the generic
            user stay as they are, to the last bit, and with them every user who is not in the training data. The loss is
            then the user's term alone. For a model that has users already.
        on_divergence (`str`, *optional*, defaults to `"stop"`):
            What happens when weights or users' rows are no finite numbers any more: `"stop"` ends the run with an error that
            says which and since when, `"warn"` goes on.
    """

    user_model_kind: str = field(
        default="individual",
        metadata={
            "help": "How users become soft prompts: a built-in or any registered kind. 'none' is TRL's own trainer, without "
            "users.",
            "metavar": "{individual,cluster,low_rank,none,...}",
        },
    )
    num_virtual_tokens: int = field(default=10, metadata={"help": "Number of vectors in a user's soft prompt."})
    num_clusters: int = field(
        default=10, metadata={"help": "Number of soft prompts that users of the 'cluster' kind share."}
    )
    user_rank: int = field(default=32, metadata={"help": "How many numbers the 'low_rank' kind keeps for each user."})
    soft_prompt_init: str = field(
        default="sample_vocab",
        metadata={
            "help": "Where soft prompts start: embeddings of random tokens, noise on their scale, or embeddings of "
            "`soft_prompt_init_text`.",
            "choices": list(SOFT_PROMPT_INITS),
        },
    )
    soft_prompt_init_text: str | None = field(
        default=None, metadata={"help": "The text for `soft_prompt_init='text'`."}
    )
    personalization_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the user's term in the loss; the generic user's term has the rest."}
    )
    generic_term: str = field(
        default="exact",
        metadata={
            "help": "Compute both terms of the loss for every pair, or one of them at random: the user's with probability "
            "`personalization_alpha`.",
            "choices": list(GENERIC_TERMS),
        },
    )
    user_id_column: str = field(default="user_id", metadata={"help": "Column with the user of each row."})
    user_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the user model. If it is not set, soft prompts move by about 0.03 standard deviations "
            "of the token embeddings a step."
        },
    )

    freeze: str = field(
        default="nothing",
        metadata={
            "help": "What stays as it is: nothing, or all that users share, so that the rows of users alone are trained.",
            "choices": list(FREEZE),
        },
    )
    on_divergence: str = field(
        default="stop",
        metadata={
            "help": "Whether a run stops or goes on with a warning when its weights are no finite numbers any more.",
            "choices": list(ON_DIVERGENCE),
        },
    )

    def __post_init__(self) -> None:
        _check_finite(self)
        _check_ranges(self)
        super().__post_init__()  # type: ignore[misc]
        if not 0.0 <= self.personalization_alpha <= 1.0:
            raise ValueError(f"`personalization_alpha` must lie in [0, 1], got {self.personalization_alpha}.")
        for name in ("num_virtual_tokens", "num_clusters", "user_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        _check_kind(self.user_model_kind)
        _check_choice("soft_prompt_init", self.soft_prompt_init, SOFT_PROMPT_INITS)
        _check_choice("freeze", self.freeze, FREEZE)
        _check_choice("on_divergence", self.on_divergence, ON_DIVERGENCE)
        _check_choice("generic_term", self.generic_term, GENERIC_TERMS)
        if (self.soft_prompt_init == "text") != (self.soft_prompt_init_text is not None):
            raise ValueError(
                '`soft_prompt_init_text` and `soft_prompt_init="text"` go together: set both, or neither '
                f"(got {self.soft_prompt_init!r} and {self.soft_prompt_init_text!r})."
            )
        if self.user_learning_rate is not None and self.user_learning_rate < 0:
            raise ValueError(f"`user_learning_rate` must not be negative, got {self.user_learning_rate}.")

    @classmethod
    def from_trl_config(cls, args: Any) -> Self:
        """`args` itself if it has the settings of users, else a copy of it in which they have their defaults."""
        if isinstance(args, cls):
            return args
        return cls(**{f.name: getattr(args, f.name) for f in fields(args) if f.init})


@dataclass
class PersonalizedDPOConfig(PersonalizationConfig, DPOConfig):
    """
    [`~trl.DPOConfig`] with the settings of P-DPO (arXiv 2402.05133): those of [`PersonalizationConfig`], and the following.

    Parameters:
        share_prefix (`str`, *optional*, defaults to `"auto"`):
            Whether chosen and rejected share the tokens of their prompt: `"auto"` (in models known to compute the same,
            for batches where it saves time), `"always"` or `"never"`.
        user_profile_column (`str`, *optional*):
            Column with text about the user of each pair (`None`: nothing is known). It is put into the prompt of the user's
            term, and stays out of the generic term and the reference. `max_length` does not count it.
        user_profile_template (`str`, *optional*, defaults to `"User profile: {profile}"`):
            How a profile reads in the prompt: the system turn of a conversation, the first line of a text.
    """

    share_prefix: str = field(
        default="auto",
        metadata={
            "help": "Whether chosen and rejected share the tokens of their prompt: where it saves time, always or never.",
            "choices": list(SHARE_PREFIX),
        },
    )
    user_profile_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with text about the user of each pair, put into the prompt of the user's term only."
        },
    )
    user_profile_template: str = field(
        default=USER_PROFILE_TEMPLATE,
        metadata={"help": "How a profile reads in the prompt; `{profile}` is where it goes."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("share_prefix", self.share_prefix, SHARE_PREFIX)
        if self.generic_term == "sampled" and self.user_profile_column is not None:
            raise ValueError(
                '`generic_term="sampled"` cannot be combined with `user_profile_column`: the two terms read different '
                'prompts. Use "exact", or train without profiles.'
            )
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches and accelerator.split_batches and self.user_model_kind != "none":
            raise ValueError(
                "`accelerator_config` with both `dispatch_batches` and `split_batches` would give the chosen answers of a "
                "batch to one process and the rejected ones to another. Leave one of them out."
            )
        if self.padding_free and self.user_model_kind != "none":
            raise ValueError(
                "`padding_free=True` does nothing in this version of TRL, which pads all the same after a warning. Leave it "
                "out (`share_prefix` saves the tokens that a pair has twice)."
            )
        check_user_profile_template(self.user_profile_template)


def _check_finite(config: Any) -> None:
    """Refuse `nan` and `inf` in any setting, TRL's among them: they train without an error, and ruin the weights."""
    for setting in fields(config):
        value = getattr(config, setting.name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(number, float) or math.isfinite(number):
                continue
            if math.isnan(number) or setting.name not in MAY_BE_INFINITE:
                raise ValueError(f"`{setting.name}` must be a finite number, got {value!r}.")


def _check_ranges(config: Any) -> None:
    """Refuse settings of TRL that no training can have: most would fail late, or train nothing without a word."""
    for lowest, names in LOWEST.items():
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, (int, float)) and value < lowest:
                raise ValueError(f"`{name}` must be at least {lowest}, got {value}.")
    for name in ABOVE_ZERO:
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")


def _check_kind(kind: str) -> None:
    if kind == "none":
        return
    try:
        get_user_model_class(kind)
    except ValueError as error:
        raise ValueError(f"{error} Or set `user_model_kind=none` for TRL's own trainer, without users.") from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
