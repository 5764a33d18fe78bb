"""Which split a pair belongs to: by prompt and by user, without leakage and without a shuffle."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

from .rows import SkippedRow


TRAIN, TEST, TEST_UNKNOWN_USERS = "train", "test", "test_unknown_users"
DEFAULT_TEST_SIZE = 0.1  # of the prompts; the share of the paper's Personalized Soups split


class SplitRule(Protocol):
    """Puts a pair into a split."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every split there is."""
        ...

    def place(self, user_id: str, prompt: str, source_split: str) -> str:
        """The split of a pair of `user_id` about `prompt`, found in the source's `source_split`."""
        ...


@dataclass(frozen=True)
class SourceSplits:
    """The splits that the source comes with."""

    names: tuple[str, ...]

    def place(self, user_id: str, prompt: str, source_split: str) -> str:
        """`source_split` itself."""
        return source_split


@dataclass(frozen=True)
class HeldOut:
    """
    Known users' pairs go to `train`, or to `test` if their prompt is held out. Pairs of held-out users go to
    `test_unknown_users`, if their prompt is not in `train`.

    So no prompt of `train` is in another split, and no user of `test_unknown_users` is in another split.

    Args:
        test_size (`float`): Share of the prompts that is held out. It is met on average, see [`is_held_out`]; with 0 there is
            no `test`.
        unknown_users (`float`): Share of the users that is held out. It is met exactly, with at least one user held out and
            one kept.
        seed (`int`): Random seed for holding out. Another seed holds out other prompts and users.
        held_out_users (`frozenset[str]`): The held-out users, which [`HeldOut.after`] chooses.
        trained (`frozenset[str]`): The prompts in `train`, which [`HeldOut.after`] finds.

    ```python
    >>> rule = HeldOut(test_size=0.5)
    >>> [rule.place("alice", prompt) for prompt in ("Why?", "When?", "Why?")]
    ['train', 'test', 'train']
    ```
    """

    test_size: float = DEFAULT_TEST_SIZE
    unknown_users: float = 0.0
    seed: int = 0
    held_out_users: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Every split there is."""
        return (TRAIN, *((TEST,) if self.test_size else ()), *((TEST_UNKNOWN_USERS,) if self.unknown_users else ()))

    def place(self, user_id: str, prompt: str, source_split: str = TRAIN) -> str:
        """
        The split of a pair of `user_id` about `prompt`.

        Raises:
            `SkippedRow`: for a held-out user's pair about a prompt that is trained on.
        """
        if user_id not in self.held_out_users:
            return TEST if is_held_out(prompt, self.test_size, self.seed) else TRAIN
        if prompt in self.trained:
            raise SkippedRow("the pair belongs to a held-out user, and its prompt is trained on", broken=False)
        return TEST_UNKNOWN_USERS

    def after(self, seen: Iterable[tuple[str, str]]) -> "HeldOut":
        """This rule with the users to hold out chosen, knowing all pairs of user and prompt in the data."""
        prompts: dict[str, set[str]] = defaultdict(set)
        for user_id, prompt in seen:
            prompts[user_id].add(prompt)
        number = min(max(1, round(self.unknown_users * len(prompts))), len(prompts) - 1)
        users = frozenset(sorted(prompts, key=lambda user_id: _hash(user_id, self.seed))[:number])
        known = set().union(*(prompts[user_id] for user_id in prompts if user_id not in users))
        trained = frozenset(p for p in known if not is_held_out(p, self.test_size, self.seed))
        return replace(self, held_out_users=users, trained=trained)


def is_held_out(prompt: str, share: float, seed: int) -> bool:
    """
    Whether `prompt` is among the `share` of all prompts that is held out.

    That depends on the prompt and the seed only, not on other rows. So a prompt is on the same side for every user, and it
    stays there when data are added or come in another order.

    ```python
    >>> sum(is_held_out(f"prompt {number}", 0.1, seed=0) for number in range(10_000))
    1010
    ```
    """
    return _hash(prompt, seed) < share * 2**64


def _hash(key: str, seed: int) -> int:
    return int.from_bytes(sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest()[:8])


def choose_split_rule(
    source_splits: Iterable[str], test_size: float | None, unknown_users: float, seed: int
) -> SourceSplits | HeldOut:
    """
    The source's own splits if it has several and no share is asked for; otherwise held-out prompts and users.

    Raises:
        `ValueError`: for a share that is not at least 0 and below 1.
    """
    for name, share in (("test_size", test_size or 0.0), ("unknown_users", unknown_users)):
        if not 0 <= share < 1:
            raise ValueError(f"`{name}` is a share, at least 0 and below 1, found {share}.")
    names = tuple(source_splits)
    if test_size is None and not unknown_users and len(names) > 1:
        return SourceSplits(names)
    return HeldOut(DEFAULT_TEST_SIZE if test_size is None else test_size, unknown_users, seed)
