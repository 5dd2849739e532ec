"""Picture of the error against iteration."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import each_of, legend, logarithmic, panels
from falign.papers.garg2022.drawing import methods

_LEAST = 1e-16
"""Below it errors are rounding."""


def errors_by_step(data: pl.DataFrame) -> Figure:
    """A column a matrix; above r = rank(Y), below more."""
    sets, surplus = each_of(data, "data"), ("r = rank(Y)", "r > rank(Y)")
    figure, axes = panels(
        len(sets),
        2,
        titles=[f"{name}, {words}" for words in surplus for name, _ in sets],
        xlabels=["step"],
        ylabels=["|ZW - Y| / |Y|"] * 2,
        share="all",
        height=2.9,
    )
    for column, (_, whole) in enumerate(sets):
        for row, own in enumerate((pl.col("r") == pl.col("rank"), pl.col("r") > pl.col("rank"))):
            panel = axes[row * len(sets) + column]
            for look, runs in methods(whole.filter(own & (pl.col("step") > 0))):
                steps, flow = (runs.filter(pl.col("fine") == fine).sort("step") for fine in (1, 0))
                panel.plot(steps["step"], steps["median"], color=look.colour, label=look.label)
                panel.plot(steps["step"], steps["most"], color=look.colour, linestyle=":", linewidth=1.2)
                dots = {"marker": "o", "markersize": 3.5, "linestyle": "none", "markevery": 3}
                panel.plot(flow["step"], flow["median"], color=look.colour, **dots)
            logarithmic(panel, "both")
            panel.set_ylim(_LEAST, 3)
    legend(figure)
    return figure
