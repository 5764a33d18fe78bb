"""Accuracy by user with the own soft prompt, the generic one and that of an opposite user."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ...canvas import BLUE, GRAY, MAX_LABELS, ORANGE, legend_below, new_figure, tidy, width_for


PROMPTS = {  # column of the rows, and color
    "own": ("accuracy_own", BLUE),
    "generic": ("accuracy_generic", GRAY),
    "opposite": ("accuracy_swapped", ORANGE),
}


def plot_accuracy_by_user(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Write a chart of pair accuracy by user to `path`, in the format of its ending (`.png`, `.pdf`, `.svg`): bars for up to 40
    users; for more, one line for each prompt, sorted by itself.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        rows (`Sequence[Mapping]`): For each user `user_id`, `preference` (or `None`), `accuracy_own`, `accuracy_generic` and
            `accuracy_swapped`, as from [`~evaluation.user_report.summarize_users`].

    Raises:
        `ValueError`: if there are no rows.
    """
    if not rows:
        raise ValueError("There is nobody to draw: `rows` is empty.")
    few = len(rows) <= MAX_LABELS
    figure = new_figure(width_for(2 * len(rows)) if few else 7.5, 4.2)
    axes = figure.add_subplot()
    (_draw_bars if few else _draw_lines)(axes, rows)
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set_ylabel("pair accuracy")
    axes.set_ylim(0, 1.02)
    tidy(axes, "Accuracy on held-out pairs by user")
    legend_below(figure, *axes.get_legend_handles_labels())
    figure.savefig(path)


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for shift, (name, (column, color)) in zip((-0.27, 0.0, 0.27), PROMPTS.items(), strict=True):
        positions = [position + shift for position in range(len(rows))]
        axes.bar(positions, [max(row[column], 0.008) for row in rows], width=0.25, color=color, label=f"{name} prompt")
    names = [f"{row['user_id']}\n{row['preference'] or ''}" for row in rows]
    many = len(rows) > 8
    axes.set_xticks(range(len(rows)), names, fontsize=8, rotation=45 if many else 0, ha="right" if many else "center")


def _draw_lines(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for name, (column, color) in PROMPTS.items():
        values = sorted((row[column] for row in rows), reverse=True)
        axes.step(range(len(rows)), values, where="mid", color=color, label=f"{name} prompt")
    axes.set_xlabel(f"{len(rows)} users, each line from best to worst")
