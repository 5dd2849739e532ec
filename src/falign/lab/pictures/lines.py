"""Lines against the epoch: one a column, one a layer, and names where they end."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from falign.lab.report.house import HOUSE
from falign.lab.report.style import AXIS, INK, legend, logarithmic, sequence
from falign.lab.text import plain

TITLE: dict[str, Any] = {"x": 0.008, "ha": "left", "fontsize": 11, "fontweight": "bold", "color": INK}
"""Of a figure of several panels."""
NAMED = 8
"""Up to so many layers are named one by one."""
_LETTERS = 13
"""So many letters fit into an inch."""
_MARKED = 12
"""Up to so many points are marked, so that a single one can be seen."""
_FAR = 1e100
"""What is further from 0 is drawn here: an axis to the largest number there is has no room for its own margins."""
_NOTHING = "\u200b"
"""A letter without width: what begins with an underscore stands in no legend."""


@dataclass(frozen=True)
class Line:
    """One line of a picture; points without a value are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def literal(text: str) -> str:
    """A text that matplotlib draws as it stands: no formula, no letter without glyph, and in legends too.

    Args:
        text: A name of anyone's: of a folder, a layer, a data set.
    """
    known = _glyphs()
    shown = "".join(
        letter if ord(letter) in known else letter.encode("unicode_escape").decode() for letter in plain(text)
    ).replace("$", r"\$")
    return f"{_NOTHING}{shown}" if shown.startswith("_") else shown


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(HOUSE["font.family"][0])).get_charmap())


def line(table: pl.DataFrame, column: str, label: str, colour: str, factor: float = 1.0) -> Line:
    """One column against the epoch."""
    kept = table.select("epoch", column).drop_nulls()
    return Line(label, kept["epoch"].to_list(), (kept[column].clip(-_FAR, _FAR) * factor).to_list(), colour)


def layer_colours(records: pl.DataFrame) -> dict[str, str]:
    """{layer: its colour}, darker from the first layer to the last."""
    names = [name.removeprefix("angle_") for name in records.columns if name.startswith("angle_")]
    return dict(zip(names, sequence(len(names)), strict=True))


def by_layer(alignment: pl.DataFrame, column: str, colours: dict[str, str]) -> list[Line]:
    """One column of the table of alignments, a line a layer; layers that have no value are left out."""
    lines = [line(alignment.filter(layer=name), column, name, colour) for name, colour in colours.items()]
    return [each for each in lines if each.y]


def plot(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw lines against the epoch."""
    for each in lines:
        marker = "o" if len(each.x) <= _MARKED else None
        axes.plot(each.x, each.y, color=each.colour, label=literal(each.label), marker=marker)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def decades(axes: Axes) -> None:
    """Scale the vertical axis by powers of ten, unless nothing that is drawn is above 0: a loss can be exactly that."""
    drawn = [float(value) for each in axes.get_lines() for value in each.get_ydata()]  # pyright: ignore
    if not drawn or max(drawn) > 0:
        logarithmic(axes, "y")


def degrees(*panels: Axes) -> None:
    """Scale axes of angles alike: from 0 to a right angle, which is marked, or beyond if there is anything."""
    drawn = [float(value) for axes in panels for each in axes.get_lines() for value in each.get_ydata()]  # pyright: ignore
    high = max(95.0, *(value + 5 for value in drawn), 0.0)
    for axes in panels:
        axes.set_ylim(-2.0, high)
        axes.set_yticks(range(0, int(high) + 1, 15))
        axes.axhline(90, color=AXIS, linewidth=1, linestyle="--", zorder=1)


def key(figure: Figure, colours: dict[str, str]) -> None:
    """Say under the panels which colour is which layer; where there are many, from which to which they go."""
    if len(colours) <= NAMED:
        widest = max(map(len, colours), default=0) + 6
        legend(figure, columns=max(1, int(_LETTERS * figure.get_figwidth()) // widest))
        return
    scale = ScalarMappable(cmap=ListedColormap(list(colours.values())))
    first, *_, last = colours
    bar = figure.colorbar(scale, ax=figure.axes, location="bottom", shrink=0.5, aspect=50, ticks=[])
    bar.set_label(literal(f"{len(colours)} layers, from {first} to {last}"))


def name_at_the_end(axes: Axes, lines: Sequence[Line]) -> None:
    """Write every line's label at its right end, moved up where two would overlap."""
    ends = sorted((each for each in lines if each.y), key=lambda each: each.y[-1])
    low, high = axes.get_ylim()
    free = (high - low) * 0.065
    next_height = low
    for each in ends:
        height = max(each.y[-1], next_height)
        next_height = height + free
        axes.annotate(
            literal(each.label),
            (each.x[-1], height),
            (8, 0),
            textcoords="offset points",
            color=each.colour,
            va="center",
        )
