"""Picture of the error against the inner dimension."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, each_of, law, legend, logarithmic, panels
from falign.papers.garg2022.drawing import methods


def errors_by_rank(data: pl.DataFrame) -> Figure:
    """Errors above, ratio to the optimum below; a column a matrix."""
    sets = each_of(data, "data")
    figure, axes = panels(
        len(sets),
        2,
        titles=[name for name, _ in sets],
        xlabels=["inner dimension r"],
        ylabels=["|ZW - Y| / |Y|", "error / optimum"],
        share="row",
        height=2.9,
    )
    for column, (_, whole) in enumerate(sets):
        above, below = axes[column], axes[len(sets) + column]
        for look, runs in methods(whole):
            own = runs.sort("r")
            spread = [own["median"] - own["low"], own["high"] - own["median"]]
            colour, marker = look.colour, look.marker
            above.errorbar(own["r"], own["median"], spread, color=colour, marker=marker, ls="none", label=look.label)
            below.plot(own["r"], own["ratio"], color=colour, marker=marker, linewidth=1.2)
            fa = look.label.startswith("FA")
            law(above, own["r"], own["stationary" if fa else "best"], "closed form")
        below.axhline(1, color=AXIS, linewidth=0.8)
        ticks = sorted(whole["r"].unique().to_list())
        for panel in (above, below):
            logarithmic(panel, "x", ticks=ticks)
        logarithmic(above, "y")
    legend(figure)
    return figure
