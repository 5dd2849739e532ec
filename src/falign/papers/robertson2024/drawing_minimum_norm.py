"""Picture of the deviation from the solution of least norm."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import COLOURS, MARKERS, each_of, law, logarithmic, panels

_ZERO = 1e-5
"""Where s = 0 is drawn on the logarithmic axis."""


def deviation_by_size(data: pl.DataFrame) -> Figure:
    """Deviation against s; the points at s = 0 stand at the left of the axis."""
    figure, (axes,) = panels(
        1, xlabels=["size s of the first layer at the start"], ylabels=["|W - X⁺Y| / |X⁺Y|"], width=5.5, height=3.4
    )
    for colour, marker, (name, own) in zip(COLOURS, MARKERS, each_of(data, "dataset"), strict=False):
        shown = own.with_columns(pl.col("size").replace(0.0, _ZERO)).sort("size")
        spread = shown["sd"].fill_null(0)
        low = pl.select(pl.min_horizontal(spread, shown["mean"] * 0.9)).to_series()
        axes.errorbar(
            shown["size"], shown["mean"], yerr=[low, spread], color=colour, marker=marker, linestyle="none", label=name
        )
    sizes = sorted(size for size in data["size"].unique().to_list() if size > 0)
    at = data.filter(pl.col("size") == sizes[0])["mean"].to_numpy().mean()
    law(axes, sizes, [at * size / sizes[0] for size in sizes], "∝ s")
    logarithmic(axes, "x", ticks=[_ZERO, *sizes])
    axes.set_xticklabels(["0", *(f"{size:g}" for size in sizes)])
    logarithmic(axes, "y")
    axes.legend()
    return figure
