"""What an evaluation says about users: results of each, of groups of them, and a verdict; and the same as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from .cluster_bootstrap import Interval


SCORERS = ("own", "generic", "swapped", "pooled")  # what pairs were scored with, in the order of tables
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
    """

    num_users: int
    num_pairs: int
    accuracy: Mapping[str, Interval]


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


def personalization_table(report: PersonalizationReport, list_users: bool = False) -> Table:
    """
    Accuracies as a table to print: groups of users, the worst, and how well calibrated; no ids unless `list_users`.

    ```python
    rich.print(personalization_table(report))
    ```
    """
    scorers = [scorer for scorer in SCORERS if scorer in report.groups["all"].accuracy]
    table = Table("users", "number", "pairs", title="Pair accuracy by soft prompt", caption=report.verdict)
    for scorer in scorers:
        table.add_column(scorer, justify="right")
    for name in GROUPS:
        if name in report.groups:
            group = report.groups[name]
            cells = [f"{group.accuracy[scorer]:.2f}" for scorer in scorers]
            table.add_row(f"{name}, mean", f"{group.num_users:,}", f"{group.num_pairs:,}", *cells)
    for name, values in (
        ("worst tenth of seen", report.worst_decile),
        ("worst of seen", report.worst_user),
        ("calibration error", report.calibration),
    ):
        if values:
            table.add_row(name, "", "", *(f"{values[scorer]:.2f}" for scorer in scorers))
    for user in report.users if list_users else ():
        cells = [f"{user.accuracy[scorer]:.2f}" for scorer in scorers]
        table.add_row(user.user_id or "no user", "" if user.seen else "unseen", f"{user.num_pairs:,}", *cells)
    return table
