"""Picture of the distribution of the ratio of errors."""

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import each_of, law, logarithmic, panels, sequence
from falign.theory.factorisation import RatioLaw


def ratios(data: pl.DataFrame) -> Figure:
    """Share of the draws below a ratio: one cheap direction on the left, a flat tail on the right."""
    figure, (left, right) = panels(
        2,
        titles=["One cheap direction", "Flat tail"],
        xlabels=["FA's error / optimum"],
        ylabels=["share of draws below"],
        height=3.4,
    )
    last = each_of(data.filter(pl.col("tail") == 1), "r")
    for colour, (index, (r, own)) in zip(sequence(len(last)), enumerate(last), strict=True):
        left.plot(own["ratio"], own["quantile"], color=colour, label=f"r = {r}", linewidth=2.4, alpha=0.75)
        at = np.linspace(0.002, 0.998, 400)
        exact = RatioLaw(r=int(r), epsilon=float(own["epsilon"][0])).quantile(at) ** 0.5
        law(left, exact, at, "" if index else "law")
    logarithmic(left, "x")
    kinds = list(data.filter(pl.col("tail") > 1).group_by(["r", "tail", "share"], maintain_order=True))
    for colour, (index, ((r, tail, share), own)) in zip(sequence(len(kinds)), enumerate(kinds), strict=True):
        label = f"r = {r}, tail {tail}, {100 * share:g} % of |Y|²"
        right.plot(own["ratio"], own["quantile"], color=colour, label=label, linewidth=2.4, alpha=0.75)
        law(right, sorted(own["estimate"]), own["quantile"], "" if index else "estimate")
    for panel, columns in ((left, 3), (right, 2)):
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)
    return figure
