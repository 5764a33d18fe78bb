"""What the pictures share: their colors, their size, and how many users still get a label."""

from functools import cache
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font


# told apart by colour-blind readers too (Okabe and Ito)
BLUE, ORANGE, GRAY, GREEN, PURPLE, YELLOW, SKY = (
    *("#0072B2", "#D55E00", "#7F7F7F", "#009E73"),
    *("#CC79A7", "#E6A000", "#56B4E9"),
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, "black")
MAX_LABELS = 40  # more users are drawn as a sorted curve, without names
LONGEST_LABEL = 16


def new_figure(width: float, height: float) -> Figure:
    """A figure of that many inches that needs no display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def width_for(num_users: int) -> float:
    """Inches for a chart with a column for each user."""
    return min(9.5, max(5.0, 1.5 + 0.65 * num_users))


def legend_below(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """One legend under the chart, in as many lines as fit its width."""
    per_line = max(2, int(figure.get_figwidth() / 1.7))
    figure.legend(
        handles, labels, frameon=False, fontsize=8, ncols=min(len(labels), per_line), loc="outside lower center"
    )


def tidy(axes: Axes, title: str) -> None:
    """A title on the left, and no frame above and on the right."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def drawable(text: str) -> str:
    """
    `text` with the characters that the font lacks, such as emoji, as their code points: in a picture they would all be the
    same box. A dollar sign is escaped, since a pair of them would be read as mathematics.

    ```python
    >>> drawable("ann \\U0001f984 5$")
    'ann [1F984] 5\\\\$'
    ```
    """
    known = _characters()
    shown = "".join(c if ord(c) in known else f"[{ord(c):X}]" for c in text)
    return shown.replace("$", r"\$")


@cache
def _characters() -> frozenset[int]:
    """The code points that the default font has."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def short(name: str) -> str:
    """A name of a user as it is drawn: cut if it is long."""
    return drawable(name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…")


def label_users(axes: Axes, names: list[str], numbers: list[int] | None = None) -> None:
    """The names of users below their columns, long ones cut, with a number of pairs each if there are some."""
    shown = [short(name) for name in names]
    if numbers is not None:
        shown = [f"{name} ({number:,})" for name, number in zip(shown, numbers, strict=True)]
    size = 9 if len(names) <= 12 else 7
    axes.set_xticks(range(len(names)), shown, rotation=35, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_xlim(-0.7, len(names) - 0.3)
