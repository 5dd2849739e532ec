"""How figures of papers are drawn: panels, colours of an ordered parameter, means with bands, laws, legends."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, Literal

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from falign.lab.report.house import AXIS, COLOURS, GRID, HOUSE, INK, MARKERS
from falign.lab.report.scales import logarithmic

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
