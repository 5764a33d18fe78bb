"""Pair accuracy by user, for each scorer: each prompt or model that pairs were scored with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ...canvas import (
    BLUE,
    GRAY,
    GREEN,
    MAX_LABELS,
    ORANGE,
    PALETTE,
    PURPLE,
    drawable,
    label_users,
    legend_below,
    new_figure,
    tidy,
    width_for,
)
from ..report import PersonalizationReport, UserResult, scorers_of


STYLES = {
    **{"own": (BLUE, "o"), "generic": (GRAY, "s"), "swapped": (ORANGE, "X"), "opposite": (PURPLE, "P")},
    "vanilla": (GREEN, "^"),
}


def plot_report(path: str | Path, report: PersonalizationReport) -> None:
    """
    Write a chart of the pair accuracy of each user to `path`, in the format of its ending (`.png`, `.pdf`, `.svg`).

    Up to 40 users get a column with their name, and an interval around each accuracy; they are ordered by gain. More users
    are drawn as one curve for each scorer, over users sorted by that scorer's accuracy, with the intervals of the user's own
    prompt. Unknown users are left out unless there are no others.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        report ([`PersonalizationReport`]): A report from [`evaluate_margins`].
    """
    users = [user for user in report.users if user.known] or list(report.users)
    scorers = scorers_of(report)
    few = len(users) <= MAX_LABELS
    figure = new_figure(width_for(len(users) * max(1, len(scorers) // 3)) if few else 7.5, 4.4)
    axes = figure.add_subplot()
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":", zorder=0)
    if few:
        _draw_columns(axes, sorted(users, key=lambda user: -user.gain), scorers)
    else:
        _draw_curves(axes, users, scorers)
    axes.set_ylabel("pair accuracy")
    axes.set_ylim(-0.02, 1.02)
    pairs = sum(user.num_pairs for user in users)
    tidy(axes, "Pair accuracy by user (pairs)" if few else f"Pair accuracy of {len(users):,} users, {pairs:,} pairs")
    legend_below(figure, *axes.get_legend_handles_labels())
    figure.savefig(path)


def _style(scorer: str, place: int) -> tuple[str, str]:
    return STYLES.get(scorer, (PALETTE[place % len(PALETTE)], "d"))


def _draw_columns(axes: Axes, users: Sequence[UserResult], scorers: Sequence[str]) -> None:
    for place, scorer in enumerate(scorers):
        color, marker = _style(scorer, place)
        shift = 0.6 * ((place + 0.5) / len(scorers) - 0.5)
        found = [user.accuracy[scorer] for user in users]
        values = np.array([interval.value for interval in found])
        errors = np.array([[interval.value - interval.low, interval.high - interval.value] for interval in found]).T
        axes.errorbar(
            np.arange(len(users)) + shift,
            values,
            yerr=np.clip(errors, 0, None),
            color=color,
            marker=marker,
            markersize=5 if len(users) <= 12 else 3.5,
            linestyle="none",
            linewidth=1,
            label=scorer.replace("_", " "),
        )
    label_users(axes, [user.user_id or "generic user" for user in users], [user.num_pairs for user in users])


def _draw_curves(axes: Axes, users: Sequence[UserResult], scorers: Sequence[str]) -> None:
    share = 100 * (np.arange(len(users)) + 0.5) / len(users)
    own = sorted((user.accuracy["own"] for user in users), key=lambda interval: (interval.value, interval.low))
    axes.fill_between(
        share,
        [interval.low for interval in own],
        [interval.high for interval in own],
        color=BLUE,
        alpha=0.15,
        linewidth=0,
        label="interval of one user's own",
    )
    for place, scorer in enumerate(scorers):
        values = sorted(user.accuracy[scorer].value for user in users)
        width = 1.2 + 1.6 * (
            len(scorers) - 1 - place
        )  # where curves are equal, the wider ones are seen beside the last
        axes.plot(
            share, values, color=_style(scorer, place)[0], linewidth=width, label=drawable(scorer.replace("_", " "))
        )
    axes.set_xlabel("% of users, each curve sorted by itself")
    axes.set_xlim(0, 100)
