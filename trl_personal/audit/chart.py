"""An audit as one picture, without ids."""

from collections.abc import Sequence
from io import BytesIO
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..canvas import BLUE, GRAY, ORANGE, new_figure
from .counts import Counts
from .kinds import Recommendation
from .room import Room, UserAudit
from .tastes import Taste


POOLED, PERSONAL, SHUFFLED = GRAY, BLUE, ORANGE
NUM_TASTES = 8


def draw_audit(
    counts: Counts,
    users: Sequence[UserAudit],
    room: Room | None,
    recommendation: Recommendation,
    tastes: Sequence[Taste],
) -> bytes:
    """
    A PNG with four charts: pairs per user, accuracy of rules, gain of each user, and features on which users differ.

    The recommendation stands above them.
    """
    figure = new_figure(11, 7.5)
    pairs_axes, room_axes, gains_axes, tastes_axes = figure.subplots(2, 2).flat
    _draw_pairs(pairs_axes, users, counts.min_pairs)
    _draw_room(room_axes, room)
    _draw_gains(gains_axes, users)
    _draw_tastes(tastes_axes, tastes, certain=room is not None and room.has_evidence)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    heading = f"Recommended user model: {recommendation.kind}"
    figure.suptitle(f"{heading}\n{fill(recommendation.reason, 120)}", fontsize=10, ha="left", x=0.01)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _draw_pairs(axes: Axes, users: Sequence[UserAudit], min_pairs: int) -> None:
    axes.set_title("Pairs per user", loc="left")
    numbers = sorted((user.num_pairs for user in users), reverse=True)
    axes.fill_between(range(1, len(numbers) + 1), numbers, step="mid", color=PERSONAL, alpha=0.5)
    axes.axhline(min_pairs, color=SHUFFLED, linewidth=1, label=f"least to learn from: {min_pairs} pairs")
    axes.set(xlabel="users, most pairs first", ylabel="pairs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if numbers and max(numbers) > 20 * np.median(numbers):
        axes.set_yscale("log")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)  # over no bar


def _draw_room(axes: Axes, room: Room | None) -> None:
    axes.set_title("Room: pair accuracy on held-out prompts", loc="left")
    if room is None:
        _say(axes, "too few users or prompts")
        return
    bars = (
        ("one rule for\neverybody", room.pooled_accuracy, POOLED),
        ("a rule for\neach user", room.personal_accuracy, PERSONAL),
    )
    for position, (_, interval, color) in enumerate(bars):
        errors = [[interval.value - interval.low], [interval.high - interval.value]]
        axes.errorbar(position, interval.value, yerr=errors, color=color, marker="D", capsize=6, linewidth=2)
    shuffled = room.pooled_accuracy.value + np.array(room.shuffled_gaps)
    spread = 2 + 0.4 * (np.arange(len(shuffled)) / max(1, len(shuffled) - 1) - 0.5)
    axes.scatter(spread, shuffled, s=9, color=SHUFFLED)
    axes.set_xticks(range(3), [*(name for name, _, _ in bars), "a rule for each user,\nshuffled ids"])
    lows = [room.pooled_accuracy.low, room.personal_accuracy.low, float(shuffled.min())]
    axes.set(xlim=(-0.5, 2.5), ylim=(max(0.0, min(lows) - 0.05), 1.02))


def _draw_gains(axes: Axes, users: Sequence[UserAudit]) -> None:
    axes.set_title("Gain of each user's own rule", loc="left")
    gains = [
        user.personal_accuracy - user.pooled_accuracy
        for user in users
        if user.personal_accuracy is not None and user.pooled_accuracy is not None
    ]
    if not gains:
        _say(axes, "too few users or prompts")
        return
    axes.hist(gains, bins=np.linspace(-1.025, 1.025, 42).tolist(), color=PERSONAL, alpha=0.6)
    axes.axvline(0, color="black", linewidth=1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="pair accuracy, own rule minus rule for everybody", ylabel="users")


def _draw_tastes(axes: Axes, tastes: Sequence[Taste], certain: bool) -> None:
    axes.set_title("Where users differ" if certain else "Where users may differ, by chance too", loc="left")
    tastes = tastes[:NUM_TASTES][::-1]
    axes.barh(range(len(tastes)), [taste.spread for taste in tastes], color=PERSONAL, alpha=0.6)
    axes.set_yticks(range(len(tastes)), [taste.feature.replace("_", " ") for taste in tastes])
    longest = max((taste.spread for taste in tastes), default=0.0)
    axes.set(xlabel="spread over users of the share who choose more", xlim=(0, max(0.5, 1.05 * longest)))


def _say(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)
