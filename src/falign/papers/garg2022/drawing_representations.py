"""Picture of errors and overlap of representations against size."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, MARKERS, each_of, law, logarithmic, panels


def ratio_and_overlap(data: pl.DataFrame) -> Figure:
    """Ratio of errors on the left, overlap on the right."""
    figure, (left, right) = panels(
        2, titles=["FA's error / gradient descent's", "Overlap of representations"], xlabels=["size m"], height=3.4
    )
    sizes = sorted(data["m"].unique().to_list())
    for colour, marker, (name, whole) in zip(COLOURS, MARKERS, each_of(data, "data"), strict=False):
        for found, own in each_of(whole, "found"):
            trained = found == "trained"
            for panel, value in ((left, "ratio"), (right, "overlap")):
                spread = own[f"{value}_sd"].fill_null(0)
                low = pl.select(pl.min_horizontal(spread, own[f"{value}_mean"] * 0.9)).to_series()
                panel.errorbar(
                    own["m"],
                    own[f"{value}_mean"],
                    yerr=None if trained else [low, spread],
                    color=colour,
                    marker=marker,
                    markersize=9 if trained else 4.5,
                    fillstyle="none" if trained else "full",
                    linestyle="none" if trained else "-",
                    linewidth=1.4,
                    elinewidth=0.9,
                    label=f"{name}, trained" if trained else name,
                )
    left.axhline(1, color=AXIS, linewidth=0.8)
    law(right, sizes, [data["r"][0] / m for m in sizes], "r/m")
    least = float(data["overlap_mean"].to_numpy().min())
    logarithmic(right, "y", ticks=[at for at in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if at > least / 2])
    for panel in (left, right):
        logarithmic(panel, "x", ticks=sizes)
    left.legend()
    right.legend()
    return figure
