"""Picture of steps beside the flow, a panel a step size."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, INK, each_of, panels, thinned

_MOST = 5


def beside_the_flow(data: pl.DataFrame) -> Figure:
    """Shares learned over time."""
    shares = sorted(data["share"].unique().to_list())
    wanted = [share for share in (0.1, 0.5, 0.9, 1.02, 1.1) if share in shares] or shares[-_MOST:]
    figure, axes = panels(
        len(wanted),
        titles=[f"η = {share:g} η_max" for share in wanted],
        xlabels=["time"],
        ylabels=["share learned"],
        share="all",
        height=2.6,
    )
    flow = data.filter(pl.col("share") == shares[0]).sort("time")
    for panel, (_, own) in zip(axes, each_of(data, "share", wanted), strict=True):
        line = own.sort("step").filter(pl.col("time") <= 12)
        panel.plot(flow["time"], flow["flow"], color=INK, linewidth=1.2, label="flow")
        panel.plot(
            line["time"], line["learned"], color=COLOURS[1], marker="o", markersize=3, linewidth=0.9, label="steps"
        )
        panel.axhline(1, color=AXIS, linewidth=0.8, zorder=0)
        panel.set_xlim(0, 12)
        panel.set_ylim(-0.6, 2.4)
        panel.set_xticks(thinned(list(range(13)), 5))
    axes[0].legend(loc="upper right")
    return figure
