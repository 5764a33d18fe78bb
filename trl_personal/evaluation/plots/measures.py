"""A few measures of every user side by side, a panel each: what pairs say, and what answers are like."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...canvas import BLUE, GRAY, drawable, new_figure, short, tidy
from ...intervals import Interval


def plot_measures(
    path: str | Path,
    names: Sequence[str],
    panels: Mapping[str, Sequence[Interval | None]],
    limits: Mapping[str, float] | None = None,
    others: Sequence[str] = (),
) -> None:
    """
    Write a picture with a panel for each measure and a row for each user to `path`, in the format of its ending (`.png`,
    `.pdf`, `.svg`). A dot is a mean, a line its interval, and the number stands beside it.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        names (`Sequence[str]`): The rows, from above: users, and what they are compared with. Up to about 40 are legible.
        panels (`Mapping`): For each title one [`Interval`] a row, or `None` where there is nothing to draw.
        limits (`Mapping`, *optional*): For a title the highest number of its axis, which starts at 0.
        others (`Sequence[str]`, *optional*): The names that are no users; they are drawn in gray.

    Raises:
        `ValueError`: if there are no rows or panels, or a panel has another number of rows.

    ```python
    plot_measures("users.png", ["ann", "bo"], {"words": [Interval(9, 7, 11), Interval(60, 50, 70)]})
    ```
    """
    wrong = {title: len(found) for title, found in panels.items() if len(found) != len(names)}
    if wrong or not panels or not names:
        raise ValueError(f"Each panel needs one interval for each of {len(names)} rows; found {wrong or 'no panel'}.")
    figure = new_figure(1.6 + 2.5 * len(panels), 1.0 + 0.36 * len(names))
    places = np.arange(len(names))
    colors = [GRAY if name in others else BLUE for name in names]
    for number, (title, found) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        limit = (limits or {}).get(title) or 1.15 * max((i.high for i in found if i), default=0) or 1.0
        for place, interval, color in zip(places, found, colors, strict=True):
            if interval is None:
                continue
            axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=2.5, alpha=0.35)
            axes.plot(interval.value, place, color=color, marker="o", markersize=5.5)
            axes.annotate(
                f"{interval.value:.2f}" if limit < 10 else f"{interval.value:.0f}",
                (interval.value, place),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=color,
            )
        axes.set_xlim(-0.04 * limit, 1.04 * limit)
        axes.set_ylim(len(names) - 0.5, -0.7)
        axes.set_yticks(places, [short(name) for name in names] if number == 0 else [""] * len(names), fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", linewidth=0.4, alpha=0.5)
        tidy(axes, drawable(title))
    figure.savefig(path)
