"""What an evaluation says about users' answers: of each user, in a verdict, and as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..intervals import Interval
from ..terminal import printable
from .answer_features import ANSWER_FEATURES


# of an answer: what `AnswersReport` has means and differences of. Features are as the audit has them, words as they are.
MEASURES = (
    "words",
    "repetition",
    "empty",
    "nats_per_token",
    *(name for name in ANSWER_FEATURES[:-1] if name != "words"),
)
IN_TABLE = {"words": 1, "repetition": 2, "empty": 2, "nats_per_token": 2}  # with their digits
MOST_ROWS = 20  # users in a table that is printed


@dataclass(frozen=True)
class UserAnswers:
    """
    The answers of a user, or of the base model.

    Args:
        user_id (`str`, *optional*): The user; `None` for the generic user and for the base.
        means (`Mapping[str, Interval]`): For each of `MEASURES` that is known, the mean over answers.
        distinct_2 (`float`, *optional*): The share of distinct bigrams in all answers together.
        minus_generic, minus_others, minus_base (`Mapping[str, Interval]`): The same minus the generic user's, the mean of the
            other users', and the base's own answer, each to the same prompt. The base is given the user's wish in words, if
            there is one. Empty where there is nothing to compare with.
        p_generic (`float`, *optional*): The adjusted p-value of a difference from the generic user in any feature.
        collapsed_in (`tuple[str, ...]`): The measures in which the answers are much worse than the base's own.
    """

    user_id: str | None
    means: Mapping[str, Interval]
    distinct_2: float | None
    minus_generic: Mapping[str, Interval]
    minus_others: Mapping[str, Interval]
    minus_base: Mapping[str, Interval]
    p_generic: float | None
    collapsed_in: tuple[str, ...]


@dataclass(frozen=True)
class AnswersReport:
    """
    What [`~evaluation.answers_verdict.evaluate_answers`] finds.

    Args:
        num_prompts (`int`): The number of prompts that all users have answered.
        users (`tuple[UserAnswers, ...]`): Each known user.
        generic, base ([`UserAnswers`], *optional*): The generic user, and the base model's own answers to the plain prompts.
        p_values (`Mapping[str, float]`): For each of `ANSWER_FEATURES` the adjusted p-value of a difference between users.
            Empty with fewer than two users.
        num_pairs (`int`): The number of pairs of users.
        num_pairs_apart (`int`, *optional*): The number of those whose answers differ; `None` with too many users to compare.
        p_fit (`float`, *optional*): The p-value of answers that lean towards what the same users chose; `None` if that is not
            known.
        has_difference (`bool`): Whether answers differ between users in any feature.
        is_personal (`bool`): Whether they do, and lean towards what the users chose, if that is known.
        collapse (`str`, *optional*): One sentence, if answers are much worse than the base's own; without ids.
        verdict (`str`): One sentence, without ids.
    """

    num_prompts: int
    users: tuple[UserAnswers, ...]
    generic: UserAnswers | None
    base: UserAnswers | None
    p_values: Mapping[str, float]
    num_pairs: int
    num_pairs_apart: int | None
    p_fit: float | None
    has_difference: bool
    is_personal: bool
    collapse: str | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, for JSON; the ids of users are in `users`. Endless intervals have no ends."""
        return _finite(asdict(self))


def answers_table(report: AnswersReport, list_users: bool = False) -> Table:
    """
    Words, repetition, empty answers and fluency of users, the generic user and the base, to print; no ids unless `list_users`.
    """
    table = Table("answers of", title="Answers", caption=report.verdict)
    measures = [name for name in IN_TABLE if any(name in row.means for row in [*report.users, report.base] if row)]
    for heading in [*(name.replace("_", " ") for name in measures), "distinct 2"]:
        table.add_column(heading, justify="right")
    if report.users:
        cells = [
            _spread([user.means[name].value for user in report.users if name in user.means], name) for name in measures
        ]
        variety = [user.distinct_2 for user in report.users if user.distinct_2 is not None]
        table.add_row(f"{len(report.users)} users, mean", *cells, _spread(variety, "distinct_2"))
    for name, row in (("generic user", report.generic), ("base", report.base)):
        if row is not None:
            table.add_row(name, *_cells(row, measures))
    for row in report.users[:MOST_ROWS] if list_users else ():
        table.add_row(Text(printable(str(row.user_id))), *_cells(row, measures))
    return table


def _cells(row: UserAnswers, measures: list[str]) -> list[str]:
    cells = [f"{row.means[name].value:.{IN_TABLE[name]}f}" if name in row.means else "" for name in measures]
    return [*cells, "" if row.distinct_2 is None else f"{row.distinct_2:.2f}"]


def _spread(values: list[float], name: str) -> str:
    if not values:
        return ""
    digits = IN_TABLE.get(name, 2)
    spread = f"\n{min(values):.{digits}f}–{max(values):.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
