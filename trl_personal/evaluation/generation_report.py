"""What users' answers are like: how long, how varied, and whether a judge prefers them to others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..intervals import Interval, cluster_share
from ..users import UserId
from .user_report import summarize_lengths


# prompts, and two answers to each -> 0 or 1 for the better one, -1 for a tie
Judge: TypeAlias = Callable[[list[str], list[list[str]]], list[int]]
TIE = -1


@dataclass(frozen=True)
class WinRate:
    """
    How a user's answers do against others to the same prompts.

    Args:
        wins, losses, ties (`int`): Prompts. A judge who changes its mind with the order of the answers gave a tie.
        rate (`Interval`): Wins and half the ties among all, prompts resampled.
    """

    wins: int
    losses: int
    ties: int
    rate: Interval


def distinct_n(answers: Sequence[str], n: int) -> float | None:
    """
    Distinct n-grams of words among all n-grams of some answers (Li et al. 2016); `None` if none is so long.

    ```python
    >>> distinct_n(["a b a b", "a b"], 2)
    0.5
    ```
    """
    grams = [
        tuple(words[i : i + n]) for words in (answer.split() for answer in answers) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


def summarize_answers(
    answers: Mapping[UserId, Sequence[str]], reference: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """
    A row for each user: `mean_generated_length` in words, `length_drift` (that minus the reference policy's), `distinct_1`,
    `distinct_2`, `empty_share`, and the `generated_lengths`.

    Args:
        answers (`Mapping`): From [`~evaluation.answers.answers_by_user`].
        reference (`Sequence[str]`, *optional*): The reference policy's answers to the same prompts.

    ```python
    >>> row = summarize_answers({"ann": ["yes", "no no no"]}, reference=["one two three", "four"])[0]
    >>> row["mean_generated_length"], row["length_drift"], row["distinct_1"]
    (2, 0, 0.5)
    ```
    """
    expected = None if reference is None else summarize_lengths(reference)["mean_generated_length"]
    rows = []
    for user_id, texts in answers.items():
        lengths = summarize_lengths(texts)
        rows.append(
            {
                "user_id": user_id,
                **lengths,
                "length_drift": None if expected is None else lengths["mean_generated_length"] - expected,
                "distinct_1": distinct_n(texts, 1),
                "distinct_2": distinct_n(texts, 2),
            }
        )
    return rows


def judge_both_ways(judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[int]:
    """
    Which answer is better, asked twice with their positions swapped: 0 (`first`) or 1 (`second`) where both judgements agree,
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
    swapped = [TIE if verdict == TIE else 1 - verdict for verdict in _ask(judge, prompts, second, first)]
    return [a if a == b else TIE for a, b in zip(straight, swapped, strict=True)]


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
        judge (`Callable`): `judge(prompts, pairs) -> list[int]`: for each prompt and its two answers 0 or 1, the better one,
            or -1 for a tie.
        prompts (`Sequence[str]`): All users have the same.
        answers (`Mapping`): From [`~evaluation.answers.answers_by_user`].
        others (`Mapping` or `Sequence[str]`): Answers to compete with, for each user or the same for all.
        confidence (`float`, *optional*, defaults to `0.95`): Of the intervals.
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
