"""Charts of results. They are written to files without a display; nothing is shown or kept open."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


PREFERENCE_COLORS = {"longer": "#0072B2", "shorter": "#D55E00"}  # told apart by colour-blind readers too
OTHER_COLOR = "#7F7F7F"


def plot_length_by_user(
    path: str | Path,
    generated: Mapping[str, Sequence[int]],
    preferences: Mapping[str, str],
    chosen: Mapping[str, float] | None = None,
    title: str = "Length of generated answers by user",
    unit: str = "words",
) -> None:
    """
    Write a bar chart of generated length by user to `path`, in the format of its ending (`.png`, `.pdf`, `.svg`).

    A bar is a user's mean, a dot one answer, and a diamond the mean of the answers that the user chose. Users are ordered by
    preference, then by mean; those without a preference, such as the generic user, come last.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        generated (`Mapping[str, Sequence[int]]`): Lengths of the answers to each user, at least one.
        preferences (`Mapping[str, str]`): `"longer"` or `"shorter"`; users may be missing.
        chosen (`Mapping[str, float]`, *optional*): Mean length of the answers that a user chose.
        title, unit (`str`, *optional*): Of the chart, and of a length.

    Raises:
        `ValueError`: if there is nobody to draw, or a user without an answer.
    """
    empty = [user for user, lengths in generated.items() if len(lengths) == 0]
    if empty or not generated:
        raise ValueError(f"Each user needs at least one answer to draw; found none for {empty or 'anybody'}.")
    users = _ordered(generated, preferences)
    figure = Figure(figsize=(max(5.0, 1.5 + 0.65 * len(users)), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, user in enumerate(users):
        _draw_user(axes, position, generated[user], preferences.get(user), (chosen or {}).get(user))
    axes.set_xticks(range(len(users)), users, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel(f"length ({unit})")
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend(axes)
    figure.savefig(path)


def _ordered(generated: Mapping[str, Sequence[int]], preferences: Mapping[str, str]) -> list[str]:
    groups = list(PREFERENCE_COLORS)

    def place(user: str) -> tuple[int, float]:
        preference = preferences.get(user)
        return groups.index(preference) if preference in groups else len(groups), -mean(generated[user])

    return sorted(generated, key=place)


def _draw_user(
    axes: Axes, position: int, lengths: Sequence[int], preference: str | None, chosen_length: float | None
) -> None:
    color = PREFERENCE_COLORS.get(preference or "", OTHER_COLOR)
    label = f"prefers {preference}" if preference in PREFERENCE_COLORS else "no preference of its own"
    axes.bar(position, mean(lengths), width=0.7, color=color, alpha=0.45, label=label)
    spread = [position + 0.5 * (i / max(1, len(lengths) - 1) - 0.5) for i in range(len(lengths))]
    axes.scatter(spread, lengths, s=7, color=color, alpha=0.8, linewidths=0, label="one answer")
    if chosen_length is not None:
        axes.scatter(
            position, chosen_length, marker="D", s=26, color="black", zorder=3, label="mean of chosen answers"
        )


def _add_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))  # one entry for each label
    order = sorted(first, key=labels.index)
    axes.legend([first[label] for label in order], order, frameon=False, fontsize=8, loc="upper right")
