"""What an evaluation says about users: results of each, of groups of them, and a verdict; and the same as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..intervals import Interval


SCORERS = ("own", "generic", "swapped", "pooled")  # what pairs were scored with, in the order of tables; others follow
MAX_ON_ONE_LINE = 4  # scorers that a table holds with their intervals beside the number
GROUPS = ("all", "seen", "unseen", "minority")


@dataclass(frozen=True)
class UserResult:
    """
    One user's pairs.

    Args:
        user_id (`str`, *optional*): The user; `None` for nobody's pairs.
        seen (`bool`): Whether the model was trained on this user.
        minority (`bool`, *optional*): Whether the user agrees with the majority less than half the time; `None` if nothing
            is known of a majority.
        num_pairs, num_prompts (`int`): Pairs, and distinct prompts among them.
        accuracy (`Mapping[str, Interval]`): For each of `SCORERS` that was measured, the share of pairs that come out right.
        mean_margin (`Mapping[str, float]`): Likewise, the mean margin in nats.
        gain (`float`): Own accuracy minus that of the better of the baselines.
    """

    user_id: str | None
    seen: bool
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
        num_users, num_pairs (`int`): In the group.
        accuracy (`Mapping[str, Interval]`): For each of `SCORERS` that was measured, the mean over users.
        mean_margin (`Mapping[str, float]`): Likewise, of the margin in nats.
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
        users (`tuple[UserResult, ...]`): In order of first appearance.
        groups (`Mapping[str, GroupResult]`): `all`, and those that are not empty of `seen`, `unseen` and `minority`.
        worst_user, worst_decile (`Mapping[str, float]`): For each scorer the lowest accuracy of a seen user, and the mean of
            the lowest tenth (at least one user).
        calibration (`Mapping[str, float]`): For each scorer, the [`calibration_error`] over the pairs of seen users.
        advantages (`Mapping[str, Interval]`): Own accuracy minus that of each other scorer, mean over the seen users.
        gain (`Interval`, *optional*): The smallest of the advantages over pooled DPO and the generic prompt, with the lowest
            of their lower and of their upper ends. `None` without seen users.
        has_gain (`bool`): Whether the intervals of all advantages, that over another user's prompt among them, lie above zero.
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
    margins = report.groups["seen"].mean_margin if "seen" in report.groups else {}
    for name, values in (
        ("worst tenth of seen", report.worst_decile),
        ("worst of seen", report.worst_user),
        ("own minus this, seen", report.advantages),
        ("margin of seen, nats", margins),
        ("calibration error", report.calibration),
    ):
        if values:
            cells = [write(values[scorer]) if scorer in values else "" for scorer in scorers]
            table.add_row(name, "", "", *cells)
    for user in report.users if list_users else ():
        cells = [write(user.accuracy[scorer]) for scorer in scorers]
        table.add_row(user.user_id or "no user", "" if user.seen else "unseen", f"{user.num_pairs:,}", *cells)
    return table


def _on_one_line(value: Interval | float) -> str:
    return f"{value:.2f}"


def _on_two_lines(value: Interval | float) -> str:
    return f"{value.value:.2f}\n{value.low:.2f}–{value.high:.2f}" if isinstance(value, Interval) else f"{value:.2f}"
