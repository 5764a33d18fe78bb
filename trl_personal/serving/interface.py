"""What the server asks of an engine, and nothing more: the transformers engine is one, vLLM's another."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


Messages = list[dict[str, Any]]

USER, BLEND, GENERIC, UNKNOWN = "user", "blend", "generic", "unknown"  # whose soft prompt an answer was written with


class RequestError(ValueError):
    """A request that the engine cannot answer, such as a prompt that is too long. The client gets it as status 400."""


class EngineError(RuntimeError):
    """The engine failed at a request that it should have answered. The client gets status 500, without details."""


@dataclass(frozen=True)
class Sampling:
    """
    How one answer is written.

    Args:
        max_tokens (`int`): The most tokens of the answer.
        temperature (`float`, *optional*, defaults to `1.0`): 0 takes the likeliest token each time (greedy).
        top_p (`float`, *optional*, defaults to `1.0`): Share of the probability that tokens are sampled from.
        seed (`int`, *optional*): Makes a sampled answer come out the same again, whatever is written beside it.
        stop (`tuple[str, ...]`): Texts that end the answer. They are not part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Job:
    """
    One answer to write.

    Args:
        prompt_ids (`list[int]`): The token ids of the prompt, as [`Engine.encode`] makes them.
        sampling ([`Sampling`]): How to write it.
        user (`str` or `dict[str, float]`, *optional*): The user, weights of several, or `None` for the generic user.
        user_strength (`float`, *optional*, defaults to `1.0`): From the generic user (0) to the user (1), in [-1, 2].

    The engine sets, before the first [`Piece`]:
        answered_for (`str`): `"user"`, `"blend"`, `"generic"` (no user was named) or `"unknown"` (a user was named who is not
            known, or a blend of such: the generic user's soft prompt was used).
        started (`float`): When the engine began to work on it, of `time.monotonic()`. Until then it waited.
    """

    prompt_ids: list[int]
    sampling: Sampling
    user: str | Mapping[str, float] | None = None
    user_strength: float = 1.0
    answered_for: str = GENERIC
    created: float = field(default_factory=time.monotonic)
    started: float | None = None


class Piece(NamedTuple):
    """
    A part of an answer. The texts of all pieces, put together, are the answer.

    Args:
        text (`str`): May be empty.
        num_tokens (`int`): How many tokens were written since the piece before.
        finish_reason (`str`, *optional*): `"stop"` (the model ended it, or a stop text did) or `"length"` in the last piece.
    """

    text: str
    num_tokens: int
    finish_reason: str | None = None


class UserAdmin(Protocol):
    """
    Changes who the users are while others are answered. Methods are called one at a time, in a thread of their own; answers
    in progress go on with the soft prompt they began with, and a request that comes later sees the change.

    All raise [`RequestError`] for what cannot be done.
    """

    def add_users(self, pairs: Sequence[Mapping[str, Any]], user_ids: Sequence[str]) -> Mapping[str, Any]:
        """Let users join by preference pairs, and `user_ids` without any; returns what to tell of the fit, as JSON."""

    def update_users(self, pairs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Refine known users by more pairs; returns what to tell of the fit, as JSON."""

    def remove_users(self, user_ids: Sequence[str]) -> Mapping[str, Any]:
        """Forget users."""

    def export_users(self, user_ids: Sequence[str]) -> bytes:
        """The rows of users, as a file that `trl-personal users import` reads."""


class Engine(Protocol):
    """
    Writes answers.

    Attributes:
        name (`str`): The name of the model.
        max_tokens (`int`, *optional*): How many tokens a prompt and its answer may have together, without the soft prompt;
            `None` if the model has no limit.
        has_chat_template (`bool`): Whether [`encode`] takes conversations.
        has_profiles (`bool`): Whether [`encode`] takes profiles: the model was trained with them.
        admin ([`UserAdmin`], *optional*): Changes users; `None` if the engine cannot.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_tokens(self) -> int | None: ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def has_profiles(self) -> bool: ...

    @property
    def admin(self) -> UserAdmin | None: ...

    @property
    def is_alive(self) -> bool:
        """Whether it can answer; `/health` says so."""

    @property
    def num_users(self) -> int:
        """The number of known users; the generic one is not counted."""

    @property
    def vocab_size(self) -> int:
        """Token ids of prompts are below it."""

    def knows(self, user_id: str) -> bool:
        """Whether the model has a row for a user."""

    def encode(self, prompt: str | Messages, user_profile: str | None = None) -> list[int]:
        """
        The token ids of a text or of a conversation, with the profile in it as in training. May be called in any thread.

        Raises:
            [`RequestError`]: for a conversation without a chat template or one that the template refuses, or for a profile
            where the model was trained without.
        """

    def generate(self, job: Job) -> AsyncGenerator[Piece]:
        """
        The answer, piece by piece; at least one piece comes, the last one has a `finish_reason`. Closing the iterator
        (`aclose`), as the server does when a client has gone, ends the work on it.

        Raises:
            [`RequestError`], [`EngineError`].
        """

    def gauges(self) -> Mapping[str, float]:
        """Numbers for `/metrics` as they are now, such as `{"running": 3, "waiting": 1}`; names are lower-case words."""

    async def start(self) -> None:
        """Called once, in the event loop of the server, before the first request."""

    async def stop(self) -> None:
        """Called once, after the last request."""
