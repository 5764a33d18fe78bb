"""A map of users: those with similar soft prompts are close to each other."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...arrays import FloatArray
from ...canvas import GRAY, PALETTE, drawable, new_figure, short, tidy
from ...user_models import UserModel
from ...users import GENERIC_USER_INDEX, UserVocab


MAX_USERS = 5000  # a map of more shows no more
MAX_NAMES = 12
BATCH_SIZE = 1024


def plot_user_map(
    path: str | Path,
    user_model: UserModel,
    user_vocab: UserVocab,
    values: Mapping[str, Any] | None = None,
    column: str = "",
    seed: int = 0,
) -> None:
    """
    Write a scatter chart of the users of a model to `path`: the first two principal components of their soft prompts.

    The axes say how much of the variance they show. Up to 12 users are named; of more than 5,000 users, that many are drawn.

    Args:
        path (`str` or `Path`): File to write; its folder must exist.
        user_model ([`UserModel`]): The user model of a trained model, `model.user_model`.
        user_vocab ([`UserVocab`]): Its users, `model.user_vocab`.
        values (`Mapping[str, Any]`, *optional*): For each user what to color by: numbers (a color scale if there are more than
            seven) or text (seven colors, and gray for the rest). Users who are not in it are gray.
        column (`str`, *optional*): The name of the values, for the title.
        seed (`int`, *optional*, defaults to `0`): Random seed for which users are drawn, if there are too many.

    Raises:
        `ValueError`: if there are fewer than two users.
    """
    if len(user_vocab) < 2:
        raise ValueError(f"A map needs two users or more, the vocabulary has {len(user_vocab)}.")
    user_ids = list(user_vocab)
    if len(user_ids) > MAX_USERS:
        drawn = np.random.default_rng(seed).choice(len(user_ids), MAX_USERS, replace=False)
        user_ids = [user_ids[i] for i in np.sort(drawn)]
    points, shares = _components(user_model, user_vocab.encode(user_ids))
    figure = new_figure(6.2, 4.6)
    axes = figure.add_subplot()
    size = 40 if len(user_ids) <= 60 else 12 if len(user_ids) <= 1000 else 7
    _draw_points(figure, axes, points[1:], [(values or {}).get(user) for user in user_ids], column, size)
    axes.scatter(
        points[:1, 0],
        points[:1, 1],
        marker="*",
        s=130,
        color="white",
        edgecolors="black",
        zorder=4,
        label="generic user",
    )
    if len(user_ids) <= MAX_NAMES:
        for name, point in zip(user_ids, points[1:], strict=True):
            axes.annotate(short(name), point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"first component ({shares[0]:.0%} of variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%})")
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.set_aspect("equal", adjustable="datalim")  # a component that shows nothing is not stretched
    counted = (
        f"{len(user_ids):,} of {len(user_vocab):,}" if len(user_ids) < len(user_vocab) else f"{len(user_vocab):,}"
    )
    tidy(axes, f"Map of soft prompts, {counted} users" + (f", by {drawable(column)}" if values and column else ""))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=4, columnspacing=1.2)
    figure.savefig(path)


@torch.no_grad()
def _components(user_model: UserModel, user_indices: list[int]) -> tuple[FloatArray, list[float]]:
    """Points `(1 + users, 2)`, the generic user first, and the shares of variance of both axes."""
    rows = torch.tensor([GENERIC_USER_INDEX, *user_indices], device=next(user_model.parameters()).device)
    prompts = torch.cat([user_model(part).flatten(1).float().cpu() for part in rows.split(BATCH_SIZE)])
    centered = prompts - prompts[1:].mean(dim=0)
    _, deviations, directions = torch.svd_lowrank(centered[1:], q=min(6, *centered[1:].shape), niter=8)
    total = float(centered[1:].pow(2).sum()) or 1.0
    points = (centered @ directions[:, :2]).numpy().astype(np.float64)
    if points.shape[1] < 2:
        points = np.column_stack([points, np.zeros(len(points))])
    shares = [*(float(value**2) / total for value in deviations[:2]), 0.0]
    return points, shares[:2]


def _draw_points(figure: Figure, axes: Axes, points: FloatArray, values: list[Any], column: str, size: int) -> None:
    style: dict[str, Any] = {"s": size, "alpha": 0.85, "linewidths": 0}
    known = np.array([value is not None for value in values])
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    rest = ~known
    if known.any() and len(numbers) == known.sum() and len(set(numbers)) > len(PALETTE):
        shown = axes.scatter(points[known, 0], points[known, 1], c=numbers, cmap="viridis", **style)
        figure.colorbar(shown, ax=axes, label=drawable(column), shrink=0.8)
    else:
        names = np.array([str(value) for value in values])
        frequent = [name for name, _ in Counter(names[known]).most_common(len(PALETTE))]
        for name, color in zip(sorted(frequent), PALETTE, strict=False):
            axes.scatter(*points[known & (names == name)].T, color=color, label=drawable(name), **style)
        rest = rest | ~np.isin(names, frequent)
    if rest.any():
        axes.scatter(*points[rest].T, color=GRAY, zorder=0, label="others" if known.any() else "user", **style)
