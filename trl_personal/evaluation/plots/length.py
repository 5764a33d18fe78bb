"""Length of generated answers by user."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...canvas import BLUE, GRAY, MAX_LABELS, ORANGE, label_users, legend_below, new_figure, tidy, width_for


PREFERENCE_COLORS = {"longer": BLUE, "shorter": ORANGE}
OTHER_COLOR = GRAY


def plot_length_by_user(path: str | Path, rows: Sequence[Mapping[str, Any]], unit: str = "words") -> None:
    """
    Write a bar chart of generated length by user to `path`, in the format of its ending (`.png`, `.pdf`, `.svg`).

    A bar is a user's mean, a dot one answer, and a diamond the mean of the answers that the user chose. Users are ordered by
    preference, then by mean; those without a preference, such as the generic user, come last. More than 40 users are drawn as
    points without names and single answers.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        rows (`Sequence[Mapping]`): For each user `user_id`, `preference` (`"longer"`, `"shorter"` or `None`),
            `generated_lengths` (one number an answer) and, optionally, `mean_chosen_length`, as from
            [`~evaluation.results.ModelEvaluation.user_rows`].
        unit (`str`, *optional*, defaults to `"words"`): The unit of a length.

    Raises:
        `ValueError`: if there are no rows, or one has no answer.
    """
    empty = [row["user_id"] for row in rows if not row["generated_lengths"]]
    if empty or not rows:
        raise ValueError(f"Each user needs at least one answer to draw; found none for {empty or 'anybody'}.")
    groups = [*PREFERENCE_COLORS, None]
    rows = sorted(rows, key=lambda row: (groups.index(row["preference"]), -mean(row["generated_lengths"])))
    few = len(rows) <= MAX_LABELS
    figure = new_figure(width_for(len(rows)) if few else 7.5, 4.2)
    axes = figure.add_subplot()
    if few:
        for position, row in enumerate(rows):
            _draw_user(axes, position, row)
        label_users(axes, [row["user_id"] for row in rows])
    else:
        _draw_points(axes, rows)
    axes.set_ylabel(f"length ({unit})")
    axes.set_ylim(bottom=0)
    tidy(axes, "Length of generated answers by user" + ("" if few else f", {len(rows):,} users"))
    _add_legend(figure, axes)
    figure.savefig(path)


def _draw_points(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for preference in dict.fromkeys(row["preference"] for row in rows):
        places = [place for place, row in enumerate(rows) if row["preference"] == preference]
        color = PREFERENCE_COLORS.get(preference, OTHER_COLOR)
        means = [mean(rows[place]["generated_lengths"]) for place in places]
        chosen = {p: rows[p]["mean_chosen_length"] for p in places if rows[p].get("mean_chosen_length") is not None}
        axes.scatter(
            list(chosen),
            list(chosen.values()),
            s=3,
            color="black",
            alpha=0.25,
            linewidths=0,
            label="mean of chosen answers",
        )
        label = f"prefers {preference}" if preference else "no preference"
        axes.scatter(places, means, s=12, color=color, alpha=0.9, linewidths=0, label=label)
    axes.set_xlabel("users, by preference and mean")
    axes.set_xlim(-0.01 * len(rows), 1.01 * len(rows))


def _draw_user(axes: Axes, position: int, row: Mapping[str, Any]) -> None:
    lengths, preference, chosen = row["generated_lengths"], row["preference"], row.get("mean_chosen_length")
    color = PREFERENCE_COLORS.get(preference, OTHER_COLOR)
    label = f"prefers {preference}" if preference else "no preference"
    axes.bar(position, mean(lengths), width=0.7, color=color, alpha=0.45, label=label)
    spread = [position + 0.5 * (i / max(1, len(lengths) - 1) - 0.5) for i in range(len(lengths))]
    axes.scatter(spread, lengths, s=7, color=color, alpha=0.8, linewidths=0, label="one answer")
    if chosen is not None:
        axes.scatter(position, chosen, marker="D", s=26, color="black", zorder=3, label="mean of chosen answers")


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))  # one entry for each label
    order = sorted(first, key=labels.index)
    legend_below(figure, [first[label] for label in order], order)
