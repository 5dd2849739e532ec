"""Picture of the training of two-layer linear networks."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import COLOURS, INK, each_of, law, legend, logarithmic, panels

_METHODS = {"fa": ("FA", COLOURS[0], "stationary"), "bp": ("backpropagation", INK, "best")}


def errors_by_step(data: pl.DataFrame) -> Figure:
    """A column a kind of inputs; above a hidden layer that is wide enough, below one that is not."""
    sets = each_of(data, "inputs", ("isotropic", "fresh"))
    sets += [found for found in each_of(data, "inputs") if found[0] not in ("isotropic", "fresh")]
    figure, axes = panels(
        len(sets),
        2,
        titles=[f"{name}, {words}" for words in ("r ≥ rank(Y)", "r < rank(Y)") for name, _ in sets],
        xlabels=["step"],
        ylabels=["|W₂W₁ - Y| / |Y|"] * 2,
        share="row",
        height=2.8,
    )
    for column, (_, whole) in enumerate(sets):
        for row, kept in enumerate((pl.col("r") >= pl.col("rank"), pl.col("r") < pl.col("rank"))):
            panel, own = axes[row * len(sets) + column], whole.filter(kept & (pl.col("step") > 0)).sort("step")
            for method, runs in each_of(own, "method", tuple(_METHODS)):
                words, colour, closed = _METHODS[method]
                panel.plot(runs["step"], runs["error"], color=colour, label=words)
                panel.plot(
                    runs["step"],
                    runs["predicted"],
                    color=colour,
                    marker="o",
                    markersize=3.5,
                    fillstyle="none",
                    linestyle="none",
                    label=f"{words}, predicted",
                )
                if row:
                    law(panel, runs["step"], runs[closed], "closed form")
            logarithmic(panel, "x" if row else "both")
    legend(figure)
    return figure
