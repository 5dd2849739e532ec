"""How figures of papers are drawn: panels, colours of an ordered parameter, means with bands, laws, legends."""

import math
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, Literal

import matplotlib
import polars as pl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike

from falign.lab.report._numbers import power_of_ten, shown

__all__ = [
    "AXIS",
    "COLOURS",
    "GRID",
    "INK",
    "MARKERS",
    "band",
    "each_of",
    "expected",
    "law",
    "legend",
    "logarithmic",
    "markers",
    "panels",
    "sequence",
    "thinned",
]

# The house style: inks, colours and the settings of matplotlib in which every picture is drawn.

INK, AXIS, GRID = "#1c1f23", "#85898f", "#e4e5e3"
"""Text and laws; ticks and frames; grids."""
COLOURS = ("#1f5fa8", "#c04a12", "#17795a", "#8a4a9c", "#8c6a00", "#5b6470")
"""Of things without an order: at least 4:1 on white, and told apart with colour-blind eyes."""
MARKERS = "osD^vP"
"""One a line, so that colour is not all that tells them apart."""

HOUSE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": AXIS,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.xmargin": 0.03,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # it comes with matplotlib: the layout is the same everywhere
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",
    "svg.hashsalt": "falign",
    "text.color": INK,
    "xtick.color": AXIS,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": AXIS,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}
"""Settings of matplotlib in which the report draws every picture."""


# Logarithmic axes, with numbers written without mathtext, which other fonts would pull apart.


def logarithmic(axes: Axes, which: Literal["x", "y", "both"], ticks: Sequence[float | int] | None = None) -> None:
    """Scale axes by powers of ten.

    Args:
        axes: The panel; its lines may come before or after.
        which: Which of its axes.
        ticks: Where to write numbers, such as the widths that were run; None is powers of ten.
    """
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which not in (name, "both"):
            continue
        axes.set(**{f"{name}scale": "log"})
        if ticks is None:
            axis.set_major_locator(_Decades())
        else:
            axis.set_ticks(list(ticks))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(_Powers())
        axis.set_minor_formatter(NullFormatter())


class _Decades(LogLocator):
    """Powers of ten; where there are too few of them, also their double and fivefold."""

    def __init__(self) -> None:
        super().__init__(numticks=7)

    def tick_values(self, vmin: Any, vmax: Any) -> Any:
        """Where the ticks are."""
        self.set_params(subs=(1.0, 2.0, 5.0) if vmin > 0 and max(vmin, vmax) < 50 * min(vmin, vmax) else (1.0,))
        return super().tick_values(vmin, vmax)


class _Powers(Formatter):
    """Plain numbers where all ticks of an axis are handy, powers of ten where there are none else."""

    def __call__(self, x: Any, pos: Any = None) -> str:
        return shown(x, 3)

    def format_ticks(self, values: Any) -> list[str]:
        """The labels of all ticks together."""
        ticks = [float(value) for value in values]
        low, high = sorted(self.axis.get_view_interval())  # pyright: ignore
        seen = [value for value in ticks if low <= value <= high]
        if not all(_is_power(value) for value in ticks) or all(0.01 <= value <= 1000 for value in seen):
            return [shown(value, 3) for value in ticks]
        return ["1" if value == 1 else power_of_ten(round(math.log10(value))) for value in ticks]


def _is_power(value: float) -> bool:
    return value > 0 and math.isclose(value, 10 ** round(math.log10(value)))


def panels(
    columns: int,
    rows: int = 1,
    *,
    titles: Sequence[str] = (),
    xlabels: Sequence[str] = (),
    ylabels: Sequence[str] = (),
    share: Literal["none", "row", "all"] = "none",
    width: float | int = 9.0,
    height: float | int = 2.8,
) -> tuple[Figure, list[Axes]]:
    """A figure of panels in the house style.

    Args:
        columns: Panels side by side.
        rows: Rows of them.
        titles: Of the panels, row by row.
        xlabels: One for each row; or a single one, written under the last row.
        ylabels: One for each row, written at its first panel.
        share: Whose vertical axes are the same.
        width: Of the whole, in inches; 9 fill the page.
        height: Of a row, in inches.

    Returns:
        The figure and its panels, row by row.
    """
    with matplotlib.rc_context(HOUSE):
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        made = figure.subplots(rows, columns, sharey=share, squeeze=False)
    for panel, title in zip(made.flat, titles, strict=False):
        panel.set_title(title, loc="left")
    for row, label in zip(made if len(xlabels) > 1 else made[-1:], xlabels, strict=False):
        for panel in row:
            panel.set_xlabel(label)
    for row, label in zip(made, ylabels, strict=False):
        row[0].set_ylabel(label)
    return figure, list(made.flat)


def sequence(count: int) -> list[str]:
    """Colours of an ordered parameter, such as λ: from orange to indigo, each darker than the one before."""
    shades = matplotlib.colormaps["plasma"]
    return [to_hex(shades(0.62 - 0.57 * index / max(1, count - 1))) for index in range(count)]


def markers(count: int) -> list[str]:
    """Markers for as many lines."""
    return list(islice(cycle(MARKERS), count))


def band(
    axes: Axes,
    x: ArrayLike,
    mean: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    label: str,
    colour: str,
    marker: str | None = None,
) -> None:
    """A line with a band around it, such as a mean ± a standard deviation.

    Args:
        axes: Where to.
        x: Horizontal positions.
        mean: The line.
        low: The band's lower edge; on a logarithmic axis it must be positive.
        high: Its upper edge.
        label: Name in the legend.
        colour: Of both.
        marker: At every point; None for a line of many points.
    """
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=colour, label=label, marker=marker, linewidth=1.7, markersize=4.5)


def law(axes: Axes, x: ArrayLike, y: ArrayLike, label: str) -> None:
    """What theory says, dashed and in ink."""
    axes.plot(x, y, color=INK, linestyle=(0, (4, 2.5)), linewidth=1.2, label=label, zorder=3)


def expected(axes: Axes, low: float | int, high: float | int, label: str) -> None:
    """An interval in which values should lie, as a grey stripe."""
    axes.axhspan(low, high, color=AXIS, alpha=0.2, linewidth=0, label=label, zorder=0)


def legend(figure: Figure, title: str = "", columns: int = 6) -> None:
    """One legend under all panels, each label once, in the order in which the lines were drawn."""
    found: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    with matplotlib.rc_context(HOUSE):
        made = figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=min(columns, max(1, len(found))),
            title=title or None,
        )
    made.get_title().set_color(INK)


def each_of(data: pl.DataFrame, column: str, order: Sequence[Any] = ()) -> list[tuple]:
    """[(value, its rows)] of a column, in an order if one is given, sorted otherwise."""
    there = set(data[column].unique().to_list())
    values = [value for value in order if value in there] or sorted(there)
    return [(value, data.filter(pl.col(column) == value)) for value in values]


def thinned(ticks: list[int], most: int) -> list[int]:
    """Every so many of the ticks, at most so many of them."""
    return ticks[:: max(1, -(-len(ticks) // most))]
