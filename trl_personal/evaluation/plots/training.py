"""Curves of a training run, from what the trainer logged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ...canvas import BLUE, GRAY, ORANGE, PURPLE, new_figure, tidy


# a panel: its title, and for each curve the metric, how it is called, its color and its line
PANELS = {
    "Loss": (
        ("loss", "training", BLUE, "-"),
        ("eval_loss", "evaluation", BLUE, "--"),
    ),
    "Pair accuracy": (
        ("rewards/accuracies", "own, training", BLUE, "-"),
        ("generic/rewards/accuracies", "generic, training", GRAY, "-"),
        ("eval_rewards/accuracies", "own, evaluation", BLUE, "--"),
        ("eval_generic/rewards/accuracies", "generic, evaluation", GRAY, "--"),
        ("eval_users/accuracy_swapped", "swapped, evaluation", ORANGE, "--"),
        ("eval_users/accuracy_swapped_soft_prompt", "swapped soft prompt, evaluation", ORANGE, "--"),
        ("eval_users/accuracy_worst", "worst user, evaluation", PURPLE, "--"),
    ),
    "Reward margin": (
        ("rewards/margins", "own, training", BLUE, "-"),
        ("generic/rewards/margins", "generic, training", GRAY, "-"),
        ("eval_rewards/margins", "own, evaluation", BLUE, "--"),
        ("eval_generic/rewards/margins", "generic, evaluation", GRAY, "--"),
    ),
}
MAX_MARKERS = 30
MAX_POINTS = 60  # more get a running mean over a twentieth of them, as single batches are noisy


def plot_training_curves(path: str | Path, log_history: Sequence[Mapping[str, Any]]) -> None:
    """
    Write charts of loss, pair accuracy and reward margin over steps to `path`, in the format of its ending.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`, or `log_history` in a `trainer_state.json`.

    Raises:
        `ValueError`: if nothing was logged that could be drawn.
    """
    panels = {
        title: [(curve, points) for curve in curves if (points := _points(log_history, curve[0]))]
        for title, curves in PANELS.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise ValueError("No loss or accuracy was logged. Train with `logging_steps` set.")
    figure = new_figure(3.8 * len(panels), 3.9)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_panel(axes, title, curves)
    figure.savefig(path)


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """The last value of each step: the log of a resumed run may hold a step twice."""
    return {entry["step"]: entry[name] for entry in log_history if name in entry and "step" in entry}


def _draw_panel(axes: Axes, title: str, curves: Sequence[tuple[Sequence[str], Mapping[int, float]]]) -> None:
    for place, ((_, label, color, line), points) in enumerate(curves):
        steps = sorted(points)
        marker = "o" if (line == "--" and len(steps) <= MAX_MARKERS) or len(steps) == 1 else None
        values = [points[step] for step in steps]
        style: dict[str, Any] = {"color": color, "linestyle": line, "marker": marker, "markersize": 3.5}
        if len(values) > MAX_POINTS:
            axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.25)
            values = _running_mean(values, len(values) // 20)
        width = 1.2 + 0.9 * (
            len(curves) - 1 - place
        )  # where curves are equal, the wider ones are seen beside the last
        axes.plot(steps, values, label=label, linewidth=width, alpha=0.9, **style)
    if title == "Pair accuracy":
        axes.set_ylim(-0.02, 1.02)
        axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":", zorder=0)
    axes.set_xlabel("step")
    tidy(axes, title)
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(-0.05, -0.16))


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Over the last `width` values, as far as there are any."""
    return [float(np.mean(values[max(0, end - width) : end])) for end in range(1, len(values) + 1)]
