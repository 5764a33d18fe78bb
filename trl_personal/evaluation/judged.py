"""What a judge says of users' answers: win rates over the generic user, as they are and as between answers of one length."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from scipy.optimize import minimize
from scipy.special import expit, stdtrit

from ..arrays import FloatArray, IntArray
from ..intervals import Interval, cluster_share
from ..terminal import printable
from ..user_profile import Prompt
from ..users import UserId
from ..writing import text_of_last
from .answer_features import check_answers, count_words
from .answers import TIE, Judge, WinRate, judge_both_ways
from .fluency import with_wish


USER_SD, LENGTH_SD = 1.5, 30.0  # of the normal priors on a user's log odds, and on those of length
POINTS = {0: 1.0, 1: 0.0, TIE: 0.5}  # of the first answer
MOST_ROWS = 20  # users in a table that is printed


@dataclass(frozen=True)
class JudgeReport:
    """
    What [`judge_answers`] finds.

    Args:
        judge (`str`): What the judge is called.
        num_prompts (`int`): The number of prompts.
        users (`Mapping[str, WinRate]`): How each user's answers do against the generic user's to the same prompts.
        length_controlled (`Mapping[str, Interval]`): The same between answers of the same length ([`length_controlled`]).
        mean, mean_length_controlled (`Interval`): Means over users.
    """

    judge: str
    num_prompts: int
    users: Mapping[str, WinRate]
    length_controlled: Mapping[str, Interval]
    mean: Interval
    mean_length_controlled: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, for JSON; the ids of users are in `users`."""
        users = {
            user: {**asdict(found), "length_controlled": asdict(self.length_controlled[user])}
            for user, found in self.users.items()
        }
        means = {"mean": asdict(self.mean), "mean_length_controlled": asdict(self.mean_length_controlled)}
        return {"judge": self.judge, "num_prompts": self.num_prompts, **means, "users": users}

    @property
    def sentence(self) -> str:
        """Both means in one sentence, without ids."""
        return (
            f"{self.judge} prefers users' answers to the generic user's in {self.mean:.2f} of {self.num_prompts} prompts, "
            f"mean of {len(self.users)} users (ties are half a win); between answers of the same length in "
            f"{self.mean_length_controlled:.2f}."
        )


def judge_answers(
    judge: Judge,
    prompts: Sequence[Prompt],
    answers: Mapping[UserId, Sequence[str]],
    wishes: Mapping[UserId, str] | None = None,
    name: str = "The judge",
    confidence: float = 0.95,
) -> JudgeReport:
    """
    Let a judge compare each user's answers with the generic user's, in both orders ([`~evaluation.answers.judge_both_ways`]).

    Args:
        judge (`Callable`): As for [`~evaluation.answers.win_rates`]. It reads a user's wish in front of the prompt.
        prompts (`Sequence`): Texts or conversations; of these the judge gets the last message.
        answers (`Mapping`): For each user the answers, and under `None` the generic user's.
        wishes (`Mapping`, *optional*): For users what they wish, in words.
        name (`str`, *optional*): What the judge is called.
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true rate.

    Returns:
        [`JudgeReport`].

    Raises:
        `ValueError`: without the generic user's answers or those of a user, or for judgements that are none.

    ```python
    >>> longer = lambda prompts, pairs: [int(len(b) > len(a)) for a, b in pairs]
    >>> report = judge_answers(longer, ["p", "q"], {"ann": ["yes, yes", "no, no"], None: ["yes", "no"]})
    >>> report.users["ann"].wins, report.mean.value, round(report.mean_length_controlled.value, 1)
    (2, 1.0, 0.5)
    ```
    """
    users = [user for user in answers if user is not None]
    if None not in answers or not users:
        raise ValueError(
            "A judge compares users' answers with the generic user's, so it needs the answers of at least one user and, under "
            f"`None`, of the generic user; found those of {len(users)} users."
        )
    check_answers(answers, len(prompts))
    points: dict[UserId, list[float]] = {}
    rates = {}
    for user in users:
        asked = [text_of_last(with_wish(prompt, (wishes or {}).get(user))) for prompt in prompts]
        verdicts = judge_both_ways(judge, asked, answers[user], answers[None])
        points[user] = [POINTS[verdict] for verdict in verdicts]
        rates[str(user)] = WinRate(
            wins=verdicts.count(0),
            losses=verdicts.count(1),
            ties=verdicts.count(TIE),
            rate=cluster_share(points[user], range(len(prompts)), confidence=confidence),
        )
    controlled, mean_controlled = length_controlled(
        points, answers, dict.fromkeys(users, answers[None]), confidence=confidence
    )
    everything = np.concatenate([points[user] for user in users])
    return JudgeReport(
        judge=name,
        num_prompts=len(prompts),
        users=rates,
        length_controlled={str(user): rate for user, rate in controlled.items()},
        mean=cluster_share(everything, np.tile(np.arange(len(prompts)), len(users)), confidence=confidence),
        mean_length_controlled=mean_controlled,
    )


def judge_table(report: JudgeReport, list_users: bool = False) -> Table:
    """Win rates over the generic user to print; no ids unless `list_users`."""
    table = Table("users", title="Win rate over the generic user", caption=report.sentence)
    for heading in ("wins", "losses", "ties", "win rate", "length-controlled"):
        table.add_column(heading, justify="right")
    rates = list(report.users.values())
    totals = [str(sum(getattr(rate, name) for rate in rates)) for name in ("wins", "losses", "ties")]
    table.add_row(f"{len(rates)} users, mean", *totals, f"{report.mean:.2f}", f"{report.mean_length_controlled:.2f}")
    for user, rate in list(report.users.items())[:MOST_ROWS] if list_users else ():
        counts = [str(getattr(rate, name)) for name in ("wins", "losses", "ties")]
        table.add_row(Text(printable(user)), *counts, f"{rate.rate:.2f}", f"{report.length_controlled[user]:.2f}")
    return table


def length_controlled(
    points: Mapping[UserId, Sequence[float]],
    answers: Mapping[UserId, Sequence[str]],
    others: Mapping[UserId, Sequence[str]],
    confidence: float = 0.95,
) -> tuple[dict[UserId, Interval], Interval]:
    """
    Win rates at no difference in length, as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475).

    The log odds that user u wins prompt i are `theta_u + phi * tanh(d_ui / s)`, where d is the answer's length minus the other
    answer's, in words, and s the root mean square of all d. The win rate at no difference is `sigmoid(theta_u)`. What is ours:
    phi, which is the judge's, is fitted to the judgements of all users together, and both have normal priors, wide on phi
    (standard deviation 30) and narrow on theta (1.5). So what length can explain counts as length: where longer answers always
    win and nobody wins with shorter ones, the rate is 0.5 with a wide interval. The interval holds prompts together (sandwich
    estimator with the priors).

    Args:
        points (`Mapping`): For each user 1 where the answer won, 0 where it lost, 0.5 for a tie, to the same `n` prompts.
        answers (`Mapping`): For each user the `n` answers.
        others (`Mapping`): For each user the answers that they competed with.
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true rate.

    Returns:
        For each user the rate with its interval, within 0 and 1, and the mean over users.

    ```python
    >>> answers = {"ann": ["long long long"] * 20, "bo": ["no"] * 20}
    >>> others = dict.fromkeys(answers, ["two words"] * 20)
    >>> rates, mean = length_controlled({"ann": [1] * 20, "bo": [0] * 20}, answers, others)
    >>> round(rates["ann"].value, 2), round(rates["bo"].value, 2), round(mean.value, 2)
    (0.5, 0.5, 0.5)
    ```
    """
    users = list(points)
    won = np.concatenate([np.asarray(points[user], dtype=np.float64) for user in users])
    num_prompts = len(won) // len(users)
    differences = np.array(
        [
            count_words(answer) - count_words(other)
            for user in users
            for answer, other in zip(answers[user], others[user], strict=True)
        ],
        dtype=np.float64,
    )
    scale = np.sqrt((differences**2).mean()) or 1.0
    rows = np.repeat(np.eye(len(users)), num_prompts, axis=0)
    inputs = np.hstack([rows, np.tanh(differences / scale)[:, None]])
    precision = np.array([*[USER_SD**-2] * len(users), LENGTH_SD**-2])
    weights = _fit(inputs, won, precision)
    prompts = np.tile(np.arange(num_prompts), len(users))
    covariance = _covariance(inputs, won, weights, precision, prompts)[:-1, :-1]
    quantile = float(stdtrit(max(1, num_prompts - 1), (1 + confidence) / 2))
    half_widths = quantile * np.sqrt(np.diag(covariance))
    ends = [expit(weights[:-1] + side * half_widths) for side in (0, -1, 1)]
    slopes = ends[0] * (1 - ends[0]) / len(users)  # of the mean of the rates, for its standard error
    mean, half_width = float(ends[0].mean()), quantile * float(np.sqrt(slopes @ covariance @ slopes))
    rates = {user: Interval(*(float(end[i]) for end in ends)) for i, user in enumerate(users)}
    return rates, Interval(mean, max(0.0, mean - half_width), min(1.0, mean + half_width))


def _fit(inputs: FloatArray, won: FloatArray, precision: FloatArray) -> FloatArray:
    """The weights with the highest posterior density."""

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        logits = inputs @ weights
        value = np.logaddexp(0, logits).sum() - won @ logits + precision @ weights**2 / 2
        return float(value), inputs.T @ (expit(logits) - won) + precision * weights

    return np.asarray(minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B", tol=1e-12).x)


def _covariance(
    inputs: FloatArray, won: FloatArray, weights: FloatArray, precision: FloatArray, clusters: IntArray
) -> FloatArray:
    """Of the weights: a sandwich of the judgements' clustered scores, and of the prior where judgements say little."""
    chance = expit(inputs @ weights)
    bread = np.linalg.inv((inputs * (chance * (1 - chance))[:, None]).T @ inputs + np.diag(precision))
    scores = inputs * (won - chance)[:, None]
    num_clusters = int(clusters.max()) + 1
    sums = np.stack([np.bincount(clusters, weights=column, minlength=num_clusters) for column in scores.T], axis=1)
    correction = num_clusters / (num_clusters - 1) if num_clusters > 1 else 1.0
    return bread @ (correction * sums.T @ sums + np.diag(precision)) @ bread
