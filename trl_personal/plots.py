"""Charts of results. They are written to files without a display; nothing is shown or kept open."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


PREFERENCE_COLORS = {"longer": "#0072B2", "shorter": "#D55E00"}  # told apart by colour-blind readers too
PROMPT_COLORS = {"own": "#0072B2", "generic": "#7F7F7F", "opposite": "#D55E00"}
ACCURACIES = {"own": "accuracy_own", "generic": "accuracy_generic", "opposite": "accuracy_swapped"}
MOST_BARS = 40  # users with a bar each; more are drawn as lines
OTHER_COLOR = "#7F7F7F"


def plot_length_by_user(path: str | Path, rows: Sequence[Mapping[str, Any]], unit: str = "words") -> None:
    """
    Write a bar chart of generated length by user to `path`, in the format of its ending (`.png`, `.pdf`, `.svg`).

    A bar is a user's mean, a dot one answer, and a diamond the mean of the answers that the user chose. Users are ordered by
    preference, then by mean; those without a preference, such as the generic user, come last.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        rows (`Sequence[Mapping]`): For each user `user_id`, `preference` (`"longer"`, `"shorter"` or `None`),
            `generated_lengths` (one number an answer) and, optionally, `mean_chosen_length`, as from
            [`~user_report.summarize_users`].
        unit (`str`, *optional*, defaults to `"words"`): Of a length.

    Raises:
        `ValueError`: if there are no rows, or one has no answer.
    """
    empty = [row["user_id"] for row in rows if not row["generated_lengths"]]
    if empty or not rows:
        raise ValueError(f"Each user needs at least one answer to draw; found none for {empty or 'anybody'}.")
    groups = [*PREFERENCE_COLORS, None]
    rows = sorted(rows, key=lambda row: (groups.index(row["preference"]), -mean(row["generated_lengths"])))
    figure = Figure(figsize=(max(5.0, 1.5 + 0.65 * len(rows)), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        _draw_user(axes, position, row)
    axes.set_xticks(
        range(len(rows)), [row["user_id"] for row in rows], rotation=35, ha="right", rotation_mode="anchor"
    )
    axes.set_ylabel(f"length ({unit})")
    axes.set_ylim(bottom=0)
    axes.set_title("Length of generated answers by user", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend(axes)
    figure.savefig(path)


def _draw_user(axes: Axes, position: int, row: Mapping[str, Any]) -> None:
    lengths, preference, chosen = row["generated_lengths"], row["preference"], row.get("mean_chosen_length")
    color = PREFERENCE_COLORS.get(preference, OTHER_COLOR)
    label = f"prefers {preference}" if preference else "no preference"
    axes.bar(position, mean(lengths), width=0.7, color=color, alpha=0.45, label=label)
    spread = [position + 0.5 * (i / max(1, len(lengths) - 1) - 0.5) for i in range(len(lengths))]
    axes.scatter(spread, lengths, s=7, color=color, alpha=0.8, linewidths=0, label="one answer")
    if chosen is not None:
        axes.scatter(position, chosen, marker="D", s=26, color="black", zorder=3, label="mean of chosen answers")


def _add_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))  # one entry for each label
    order = sorted(first, key=labels.index)
    axes.legend([first[label] for label in order], order, frameon=False, fontsize=8, loc="upper right")


def plot_accuracy_by_user(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Write a bar chart of pair accuracy by user to `path`, in the format of its ending: with the user's own prompt, the generic
    user's, and that of a user who prefers the opposite. More than 40 users become three lines, each sorted by itself.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        rows (`Sequence[Mapping]`): For each user `user_id`, `preference` (or `None`), `accuracy_own`, `accuracy_generic` and
            `accuracy_swapped`, as from [`~user_report.summarize_users`].

    Raises:
        `ValueError`: if there are no rows.
    """
    if not rows:
        raise ValueError("There is nobody to draw: `rows` is empty.")
    many = len(rows) > MOST_BARS
    width = 8.0 if many else max(5.0, 1.5 + 0.85 * len(rows))
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (_draw_sorted if many else _draw_bars)(axes, rows)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel("pair accuracy")
    axes.set_ylim(0, 1.15)
    axes.set_title("Accuracy on held-out pairs by user", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    figure.savefig(path)


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for shift, (label, column) in zip((-0.27, 0.0, 0.27), ACCURACIES.items(), strict=True):
        positions = [position + shift for position in range(len(rows))]
        heights = [max(row[column], 0.008) for row in rows]  # so that a zero shows
        axes.bar(positions, heights, width=0.25, color=PROMPT_COLORS[label], label=f"{label} prompt")
    names = [f"{row['user_id']}\n{row['preference']}" if row["preference"] else row["user_id"] for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)


def _draw_sorted(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for label, column in ACCURACIES.items():
        values = sorted((row[column] for row in rows), reverse=True)
        axes.step(range(len(rows)), values, where="mid", color=PROMPT_COLORS[label], label=f"{label} prompt")
    axes.set_xlabel(f"{len(rows)} users, each line from best to worst")
