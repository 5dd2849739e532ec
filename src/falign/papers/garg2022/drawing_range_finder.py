"""Picture of what oversampling and power iteration buy."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, band, each_of, law, legend, panels, sequence


def ratios_by_oversampling(data: pl.DataFrame) -> Figure:
    """A column a matrix, a line a number of power iterations."""
    sets = each_of(data, "data")
    figure, axes = panels(
        len(sets),
        titles=[name for name, _ in sets],
        xlabels=["oversampling p"],
        ylabels=["error / optimum"],
        height=3.2,
    )
    for panel, (_, whole) in zip(axes, sets, strict=True):
        powers = each_of(whole, "power")
        for colour, (q, own) in zip(sequence(len(powers)), powers, strict=True):
            runs = own.sort("oversampling")
            band(
                panel,
                runs["oversampling"],
                runs["median"],
                runs["low"],
                runs["high"],
                label=f"q = {q}",
                colour=colour,
                marker="o",
            )
            if q == 0:
                open_ = {"marker": "s", "markersize": 8, "fillstyle": "none", "linestyle": "none"}
                panel.plot(runs["oversampling"], runs["trained"], color=colour, label="FA of width r + p, cut", **open_)
        top = panel.get_ylim()[1]
        wide = [p for p in sorted(whole["oversampling"].unique().to_list()) if p >= 2]
        law(panel, wide, [(1 + whole["r"][0] / (p - 1)) ** 0.5 for p in wide], "√(1 + r/(p - 1))")
        panel.axhline(1, color=AXIS, linewidth=0.8)
        panel.set_ylim(1 - (top - 1) / 20, top)
    legend(figure)
    return figure
