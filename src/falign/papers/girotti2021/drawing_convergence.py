"""Picture of errors beside their guaranteed bounds."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import INK, each_of, logarithmic, panels, sequence

_KINDS = (("fa", 2), ("fa", 3), ("fa", 4), ("dfa", 3))


def bounds(data: pl.DataFrame) -> Figure:
    """A panel a rule and depth."""
    figure, axes = panels(
        len(_KINDS),
        titles=[f"{rule}, {depth} layers" for rule, depth in _KINDS],
        xlabels=["time × ρ_max"],
        ylabels=["error / bound, largest"],
        share="all",
        height=2.6,
    )
    for panel, (rule, depth) in zip(axes, _KINDS, strict=True):
        own = data.filter((pl.col("rule") == rule) & (pl.col("depth") == depth) & pl.col("over_bound").is_finite())
        shares = each_of(own, "share")
        for colour, (share, line) in zip((INK, *sequence(len(shares) - 1)), shares, strict=False):
            label = f"steps, η = {share:g}/ρ_max" if share else "flow"
            panel.plot(line["time"], line["over_bound"], color=colour, linewidth=1.4, label=label)
        logarithmic(panel, "y")
        panel.set_ylim(1e-3, 2)
    axes[0].legend()
    return figure
