"""What an evaluation says about users: results of each user and of groups of them, a verdict, and the same as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..intervals import Interval
from ..terminal import printable


SCORERS = (
    "own",
    "generic",
    "swapped",
    "opposite",
    "vanilla",
)  # what pairs were scored with, in the order of tables; others follow
MAX_ON_ONE_LINE = 4  # scorers that a table holds with their intervals beside the number
GROUPS = ("all", "known", "unknown", "minority")


@dataclass(frozen=True)
class UserResult:
    """
    One user's pairs.

    Args:
        user_id (`str`, *optional*): The user; `None` for the pairs of the generic user.
        known (`bool`): Whether the model was trained on this user.
        minority (`bool`, *optional*): Whether the user agrees with the majority less than half the time; `None` if nothing
            is known of a majority.
        num_pairs, num_prompts (`int`): The number of the user's pairs, and of distinct prompts among them.
        accuracy (`Mapping[str, Interval]`): For each of `SCORERS` that was measured, the share of pairs that come out right.
        mean_margin (`Mapping[str, float]`): For each of `SCORERS` that was measured, the mean margin in nats.
        gain (`float`): The accuracy with the user's own prompt minus the better of vanilla DPO and the generic prompt.
    """

    user_id: str | None
    known: bool
    minority: bool | None
    num_pairs: int
    num_prompts: int
    accuracy: Mapping[str, Interval]
    mean_margin: Mapping[str, float]
    gain: float


@dataclass(frozen=True)
class GroupResult:
    """
    A group of users, each counting the same.

    Args:
        num_users, num_pairs (`int`): The number of users in the group, and of their pairs.
        accuracy (`Mapping[str, Interval]`): For each of `SCORERS` that was measured, the mean over users.
        mean_margin (`Mapping[str, float]`): For each of `SCORERS` that was measured, the mean margin in nats, over users.
    """

    num_users: int
    num_pairs: int
    accuracy: Mapping[str, Interval]
    mean_margin: Mapping[str, float]


@dataclass(frozen=True)
class PersonalizationReport:
    """
    What [`evaluate_margins`] finds.

    Args:
        users (`tuple[UserResult, ...]`): The result of each user, in order of first appearance.
        groups (`Mapping[str, GroupResult]`): The result of `all` users, and of the `known`, the `unknown` and the `minority`
            users where there are any.
        worst_user, worst_decile (`Mapping[str, float]`): For each scorer the lowest accuracy of a known user, and the mean of
            the lowest tenth of them (at least one user).
        calibration (`Mapping[str, float]`): For each scorer, the [`calibration_error`] over the pairs of known users.
        advantages (`Mapping[str, Interval]`): The accuracy with the user's own prompt minus that of each other scorer, mean
            over the known users.
        gain (`Interval`, *optional*): The smallest of the advantages over vanilla DPO and the generic prompt, with the lowest
            of their lower and of their upper ends. `None` without known users.
        has_gain (`bool`): Whether another user's prompt was measured, and the intervals of the advantages over it, over the
            generic prompt and over vanilla DPO (if that was measured) lie above zero.
        verdict (`str`): One sentence, without ids.
    """

    users: tuple[UserResult, ...]
    groups: Mapping[str, GroupResult]
    worst_user: Mapping[str, float]
    worst_decile: Mapping[str, float]
    calibration: Mapping[str, float]
    advantages: Mapping[str, Interval]
    gain: Interval | None
    has_gain: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, for JSON. The ids of users are in `users`."""
        return asdict(self)


def scorers_of(report: PersonalizationReport) -> list[str]:
    """What the pairs of a report were scored with, in the order of tables."""
    measured = report.groups["all"].accuracy
    return [*(name for name in SCORERS if name in measured), *(name for name in measured if name not in SCORERS)]


def personalization_table(report: PersonalizationReport, list_users: bool = False) -> Table:
    """
    Accuracies as a table to print: groups of users, the worst, and how well calibrated; no ids unless `list_users`.

    ```python
    rich.print(personalization_table(report))
    ```
    """
    scorers = scorers_of(report)
    table = Table("users", "number", "pairs", title="Pair accuracy by soft prompt", caption=report.verdict)
    for scorer in scorers:
        table.add_column(scorer.replace("_", " "), justify="right")
    write = _on_one_line if len(scorers) <= MAX_ON_ONE_LINE else _on_two_lines
    for name in GROUPS:
        if name in report.groups:
            group = report.groups[name]
            cells = [write(group.accuracy[scorer]) for scorer in scorers]
            table.add_row(f"{name}, mean", f"{group.num_users:,}", f"{group.num_pairs:,}", *cells)
    margins = report.groups["known"].mean_margin if "known" in report.groups else {}
    for name, values in (
        ("worst tenth of known", report.worst_decile),
        ("worst of known", report.worst_user),
        ("own minus this, known", report.advantages),
        ("margin of known, nats", margins),
        ("calibration error", report.calibration),
    ):
        if values:
            cells = [write(values[scorer]) if scorer in values else "" for scorer in scorers]
            table.add_row(name, "", "", *cells)
    for user in report.users if list_users else ():
        cells = [write(user.accuracy[scorer]) for scorer in scorers]
        shown = Text(printable(user.user_id or "generic user"))
        table.add_row(shown, "" if user.known else "unknown", f"{user.num_pairs:,}", *cells)
    return table


def _on_one_line(value: Interval | float) -> str:
    return f"{value:.2f}"


def _on_two_lines(value: Interval | float) -> str:
    return f"{value.value:.2f}\n{value.low:.2f}–{value.high:.2f}" if isinstance(value, Interval) else f"{value:.2f}"
