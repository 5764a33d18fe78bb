"""Answers of all users to the same prompts: how long they are, how varied, and whether a judge prefers them to others."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import mean
from typing import Any, TypeAlias

from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..intervals import Interval, cluster_share
from ..user_profile import Prompt
from ..users import UserId
from ..writing import Request, write_answers
from .answer_features import count_words, distinct_n


GENERIC_USER = "generic user"  # its name where a table or a file needs one
TIE = -1
# takes prompts, and two answers to each; gives 0 or 1 for the better one, -1 for a tie
Judge: TypeAlias = Callable[[list[str], list[list[str]]], list[int]]


def answers_by_user(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    user_ids: Sequence[UserId],
    batch_size: int = 32,
    description: str = "Writing answers",
    user_profiles: Mapping[Any, str | None] | None = None,
    **generate_kwargs: Any,
) -> dict[UserId, list[str]]:
    """
    Generate an answer to every prompt for every user.

    Args:
        model: A language model with a user model attached; a plain one writes for `user_ids=[None]`.
        tokenizer: The model's tokenizer. It pads on the left here, whatever its own side.
        prompts (`Sequence`): Texts, or conversations for the chat template; the same for all users.
        user_ids (`Sequence`): The users; `None` is the generic one.
        batch_size (`int`, *optional*, defaults to `32`): The number of answers that are generated at once.
        description (`str`, *optional*): The text beside the progress bar.
        user_profiles (`Mapping`, *optional*): Text about users, put into their prompts as in training; users who are not in
            it have none.
        **generate_kwargs: Keywords of `model.generate`, such as `max_new_tokens`.

    Returns:
        For each user the answers, in the order of `prompts`.

    Raises:
        `ValueError`: for profiles, if the model was trained without them.

    ```python
    answers = answers_by_user(model, tokenizer, ["Why is the sky blue?"], ["alice", "bob", None], max_new_tokens=64)
    answers["alice"][0], answers[None][0]
    ```
    """
    profiles = user_profiles or {}
    requests = [Request(user_id, prompt, profiles.get(user_id)) for prompt in prompts for user_id in user_ids]
    use_template = not all(isinstance(prompt, str) for prompt in prompts)
    batches = write_answers(model, tokenizer, requests, batch_size, use_template, **generate_kwargs)
    num_batches = -(-len(requests) // batch_size)
    written = [text for batch in track(batches, description, num_batches, transient=True) for text in batch]
    answers: dict[UserId, list[str]] = {user_id: [] for user_id in user_ids}
    for text, user_id in zip(written, cycle(user_ids), strict=False):
        answers[user_id].append(text)
    return answers


def opposite_users(preferences: Mapping[str, str], conflicts: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    For each user one with another preference, in turn.

    Args:
        preferences (`Mapping[str, str]`): What each user prefers.
        conflicts (`Mapping[str, str]`, *optional*): What each user is in conflict about; the other user is then one on another
            side of the same conflict. Defaults to one conflict for all.

    Raises:
        `ValueError`: if all users of a conflict have the same preference.

    ```python
    >>> opposite_users({"ann": "longer", "bo": "shorter", "cy": "longer", "di": "longer"})
    {'ann': 'bo', 'bo': 'ann', 'cy': 'bo', 'di': 'bo'}
    >>> opposite_users({"ann": "longer", "cy": "lists", "bo": "shorter", "di": "prose"}, dict(ann=1, bo=1, cy=2, di=2))
    {'ann': 'bo', 'cy': 'di', 'bo': 'ann', 'di': 'cy'}
    ```
    """
    opposite, turns = {}, Counter[tuple[str, str]]()
    for user_id, preference in preferences.items():
        conflict = "" if conflicts is None else conflicts[user_id]
        rivals = [user for user in preferences if conflicts is None or conflicts[user] == conflict]
        others = [other for other in rivals if preferences[other] != preference]
        if not others:
            raise ValueError(f"All {len(rivals)} users prefer {preference!r}: nobody has the opposite preference.")
        opposite[user_id] = others[turns[conflict, preference] % len(others)]
        turns[conflict, preference] += 1
    return opposite


# --- What answers are like ----------------------------------------------------------------------------------------------


def summarize_answers(
    answers: Mapping[UserId, Sequence[str]], reference: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """
    Describe the answers of each user by a few numbers.

    Args:
        answers (`Mapping`): The answers of each user, as from [`answers_by_user`].
        reference (`Sequence[str]`, *optional*): The reference policy's answers to the same prompts.

    Returns:
        A row for each user with `user_id`, `mean_generated_length` (in words), `length_drift` (that length minus the reference
        policy's, `None` without it), `distinct_1` and `distinct_2` ([`distinct_n`]), `empty_share`, and `generated_lengths`.

    ```python
    >>> row = summarize_answers({"ann": ["yes", "no no no"]}, reference=["one two three", "four"])[0]
    >>> row["mean_generated_length"], row["length_drift"], row["distinct_1"]
    (2, 0, 0.5)
    ```
    """
    expected = None if reference is None else mean(map(count_words, reference))
    rows = []
    for user_id, texts in answers.items():
        lengths = [count_words(text) for text in texts]
        rows.append(
            {
                "user_id": user_id,
                "mean_generated_length": mean(lengths),
                "length_drift": None if expected is None else mean(lengths) - expected,
                "distinct_1": distinct_n(texts, 1),
                "distinct_2": distinct_n(texts, 2),
                "empty_share": mean(length == 0 for length in lengths),
                "generated_lengths": lengths,
            }
        )
    return rows


# --- Which answers a judge prefers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WinRate:
    """
    How a user's answers do against others to the same prompts.

    Args:
        wins, losses, ties (`int`): The number of prompts with each outcome. A judge who changes its mind with the order of the
            answers gave a tie.
        rate (`Interval`): The share of wins, where a tie counts as half a win.
    """

    wins: int
    losses: int
    ties: int
    rate: Interval


def judge_both_ways(judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[int]:
    """
    Ask which answer is better, twice with their positions exchanged: 0 (`first`) or 1 (`second`) where both judgements agree,
    else -1, a tie.

    Raises:
        `ValueError`: if the judge gives another number of judgements than prompts, or one that is not 0, 1 or -1.

    ```python
    >>> longer = lambda prompts, pairs: [int(len(b) > len(a)) for a, b in pairs]  # of two as long ones, the one in front
    >>> judge_both_ways(longer, ["p", "p", "p"], ["aa", "a", "a"], ["b", "bb", "b"])
    [0, 1, -1]
    ```
    """
    straight = _ask(judge, prompts, first, second)
    exchanged = [TIE if verdict == TIE else 1 - verdict for verdict in _ask(judge, prompts, second, first)]
    return [a if a == b else TIE for a, b in zip(straight, exchanged, strict=True)]


def win_rates(
    judge: Judge,
    prompts: Sequence[str],
    answers: Mapping[UserId, Sequence[str]],
    others: Mapping[UserId, Sequence[str]] | Sequence[str],
    confidence: float = 0.95,
) -> dict[UserId, WinRate]:
    """
    How often a judge prefers each user's answers to others, such as the generic user's. The judge gets the prompts of
    one user at a time, in the order of `answers`.

    Args:
        judge (`Callable`): A function `judge(prompts, pairs) -> list[int]` that gives for each prompt and its two answers 0 or
            1, the better one, or -1 for a tie.
        prompts (`Sequence[str]`): The prompts that all users have answered.
        answers (`Mapping`): The answers of each user, as from [`answers_by_user`].
        others (`Mapping` or `Sequence[str]`): The answers to compete with, for each user or the same for all.
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true rate.

    ```python
    >>> longer = lambda prompts, pairs: [int(len(b) > len(a)) for a, b in pairs]
    >>> rates = win_rates(longer, ["p", "q"], {"ann": ["long", "longer"]}, ["no", "yes"])
    >>> rates["ann"].wins, rates["ann"].rate.value
    (2, 1.0)
    ```
    """
    rates = {}
    for user_id, texts in answers.items():
        opponents = others[user_id] if isinstance(others, Mapping) else others
        verdicts = judge_both_ways(judge, prompts, texts, opponents)
        points = [{0: 1.0, 1: 0.0, TIE: 0.5}[verdict] for verdict in verdicts]
        rates[user_id] = WinRate(
            wins=verdicts.count(0),
            losses=verdicts.count(1),
            ties=verdicts.count(TIE),
            rate=cluster_share(points, list(prompts), confidence=confidence),
        )
    return rates


def _ask(judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[int]:
    verdicts = judge(list(prompts), [[a, b] for a, b in zip(first, second, strict=True)])
    if len(verdicts) != len(prompts) or not set(verdicts) <= {0, 1, TIE}:
        raise ValueError(
            f"The judge must give 0, 1 or -1 for each of {len(prompts)} prompts, found {len(verdicts)} judgements: "
            f"{sorted(set(verdicts))[:5]}."
        )
    return list(verdicts)
