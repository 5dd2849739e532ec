"""The house style of figures: panels and facets, colours of an ordered parameter, means with bands, laws, legends.

matplotlib is imported by the functions that draw: who imports an experiment to run it does not wait for it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
from numpy.typing import ArrayLike

from falign._style import AXIS, COLOURS, GRID, INK, MARKERS, RC_PARAMS, law, sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # for annotations only, so that no experiment waits for matplotlib either
    Axes = Figure = Any

__all__ = [
    "AXIS",
    "COLOURS",
    "GRID",
    "INK",
    "MARKERS",
    "RC_PARAMS",
    "Axes",
    "Figure",
    "band",
    "each_of",
    "error_bars",
    "expected",
    "facets",
    "law",
    "legend",
    "logarithmic",
    "panels",
    "sequence",
    "thinned",
]


def logarithmic(axes: Axes, which: Literal["x", "y", "both"], ticks: Sequence[float | int] | None = None) -> None:
    """Scale axes by powers of ten.

    Args:
        axes: The panel; its lines may come before or after.
        which: Which of its axes.
        ticks: Where to write numbers, such as the widths that were run; None is powers of ten.
    """
    from matplotlib.ticker import NullFormatter, NullLocator

    from falign.lab.report._figures import Decades, Powers

    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which not in (name, "both"):
            continue
        axes.set(**{f"{name}scale": "log"})
        if ticks is None:
            axis.set_major_locator(Decades())
        else:
            axis.set_ticks(list(ticks))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(Powers())
        axis.set_minor_formatter(NullFormatter())


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
) -> "tuple[Figure, list[Axes]]":
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
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC_PARAMS):
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


def facets(
    data: pl.DataFrame,
    column: str,
    rows: int = 1,
    *,
    order: Sequence[Any] = (),
    titles: Sequence[str] = ("{}",),
    names: Mapping[Any, str] | None = None,
    xlabels: Sequence[str] = (),
    ylabels: Sequence[str] = (),
    share: Literal["none", "row", "all"] = "none",
    width: float | int = 9.0,
    height: float | int = 2.8,
) -> "tuple[Figure, list[tuple[Any, pl.DataFrame, list[Axes]]]]":
    """A figure with a column of panels for each value of a column of the data.

    Args:
        data: What is drawn.
        column: The column whose values make the facets.
        rows: Panels of a facet, below each other.
        order: Of the values; sorted by default.
        titles: One for each row of panels, with a place for the value; rows without one have none.
        names: {value: how it is written}.
        xlabels: See :func:`panels`.
        ylabels: See :func:`panels`.
        share: See :func:`panels`.
        width: See :func:`panels`.
        height: See :func:`panels`.

    Returns:
        The figure, and for each facet its value, its rows of the data, and its panels from the top.
    """
    parts = each_of(data, column, order)
    written = [(names or {}).get(value, value) for value, _ in parts]
    figure, axes = panels(
        len(parts),
        rows,
        titles=[title.format(name) for title in titles for name in written],
        xlabels=xlabels,
        ylabels=ylabels,
        share=share,
        width=width,
        height=height,
    )
    return figure, [(value, part, axes[place :: len(parts)]) for place, (value, part) in enumerate(parts)]


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


def error_bars(mean: pl.Series, sd: pl.Series) -> list[pl.Series]:
    """Lengths of the bars below and above, for ``errorbar(yerr=…)`` on a logarithmic axis, on which 0 has no place.

    Returns:
        The standard deviation, 0 where it is null, as of single runs; below at most nine tenths of the mean.
    """
    above = sd.fill_null(0)
    return [pl.select(pl.min_horizontal(above, mean * 0.9)).to_series(), above]


def expected(axes: Axes, low: float | int, high: float | int, label: str) -> None:
    """An interval in which values should lie, as a grey stripe."""
    axes.axhspan(low, high, color=AXIS, alpha=0.2, linewidth=0, label=label, zorder=0)


def legend(figure: Figure, title: str = "", columns: int = 6) -> None:
    """One legend under all panels, each label once, in the order in which the lines were drawn."""
    from matplotlib import rc_context

    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    with rc_context(RC_PARAMS):
        made = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(columns, max(1, len(handles))),
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
