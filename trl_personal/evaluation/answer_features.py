"""What an answer is like, in numbers: length, the audit's features of style, variety, repetition, and whether it is empty."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import FloatArray
from ..audit.text_features import FEATURES, text_features


ANSWER_FEATURES = (*FEATURES, "repetition")  # what answers of users are compared in


def count_words(text: str) -> int:
    """
    The number of words of a text, between spaces.

    ```python
    >>> count_words("Why is it blue?")
    4
    ```
    """
    return len(text.split())


def distinct_n(answers: Sequence[str], n: int) -> float | None:
    """
    The number of distinct n-grams of words among all n-grams of some answers (Li et al. 2016), as a share; `None` if no answer
    has `n` words.

    ```python
    >>> distinct_n(["a b a b", "a b"], 2)
    0.5
    ```
    """
    grams = [
        tuple(words[i : i + n]) for words in (answer.split() for answer in answers) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


def repetition(answer: str) -> float:
    """
    The share of an answer's bigrams of words that occur earlier in the same answer: `1 - distinct_n([answer], 2)`, and 0 for
    an answer of fewer than two words.

    ```python
    >>> repetition("no no no no no"), repetition("one two three"), repetition("")
    (0.75, 0.0, 0.0)
    ```
    """
    distinct = distinct_n([answer], 2)
    return 0.0 if distinct is None else 1.0 - distinct


def answer_features(answers: Sequence[str], prompts: Sequence[str]) -> FloatArray:
    """
    The numbers `ANSWER_FEATURES` of each answer: the audit's features of style ([`~audit.text_features.text_features`]) and
    [`repetition`].

    Args:
        answers (`Sequence[str]`): The `n` answers.
        prompts (`Sequence[str]`): The text of the prompt of each answer.

    Returns:
        Float `(n, len(ANSWER_FEATURES))`.

    Raises:
        `ValueError`: if there are not as many prompts as answers.

    ```python
    >>> float(answer_features(["no no no"], ["Why?"])[0, ANSWER_FEATURES.index("repetition")])
    0.5
    ```
    """
    repeated = np.array([repetition(answer) for answer in answers], dtype=np.float64)
    return np.hstack([text_features(answers, prompts), repeated[:, None]])


def describe_answers(answers: Sequence[str], nats_per_token: ArrayLike | None = None) -> dict[str, Any]:
    """
    One user's answers by five numbers.

    Args:
        answers (`Sequence[str]`): The answers, at least one.
        nats_per_token (`ArrayLike`, *optional*): Of each answer, as from [`~evaluation.fluency.nats_per_token`]; NaN for an
            answer without tokens.

    Returns:
        `mean_words`; `distinct_2`, the share of distinct bigrams in all answers together ([`distinct_n`]), `None` if no answer
        has two words; `repetition`, mean of [`repetition`]; `empty_share`, the share of answers without a word;
        `nats_per_token`, the mean over answers that have tokens, `None` if it was not measured.

    ```python
    >>> describe_answers(["no no no", ""], [2.0, float("nan")])
    {'mean_words': 1.5, 'distinct_2': 0.5, 'repetition': 0.25, 'empty_share': 0.5, 'nats_per_token': 2.0}
    ```
    """
    lengths = [count_words(answer) for answer in answers]
    nats = np.asarray([] if nats_per_token is None else nats_per_token, dtype=np.float64)
    nats = nats[np.isfinite(nats)]
    return {
        "mean_words": mean(lengths),
        "distinct_2": distinct_n(answers, 2),
        "repetition": mean(map(repetition, answers)),
        "empty_share": mean(length == 0 for length in lengths),
        "nats_per_token": float(nats.mean()) if len(nats) else None,
    }


def check_answers(answers: Mapping[Any, Sequence[str]], num_prompts: int) -> None:
    """
    Make sure that every user has one answer to each prompt.

    Raises:
        `ValueError`: if not.
    """
    wrong = {str(user): len(texts) for user, texts in answers.items() if len(texts) != num_prompts}
    if wrong:
        some = dict(list(wrong.items())[:3])
        raise ValueError(f"Every user needs one answer to each of {num_prompts} prompts; found other numbers: {some}.")
