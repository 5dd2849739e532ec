"""Phase portraits: the velocity of the hidden weight above, trajectories below, a column an invariant."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, INK, each_of, panels

_MOST = 5
"""Columns: of more invariants, those that are nearest to K_c on both sides, and the outermost."""


def portraits(data: pl.DataFrame) -> Figure:
    """A column an invariant, the largest first."""
    shares = _shown(sorted(data["share"].unique().to_list(), reverse=True))
    figure, axes = panels(
        len(shares),
        2,
        titles=[f"K = {share:+g} |K_c|" for share in shares],
        xlabels=["θ₁", "time"],
        ylabels=["h(θ₁)", "θ₁"],
        share="row",
        width=10.5,
        height=2.4,
    )
    for column, share in enumerate(shares):
        own = data.filter(pl.col("share") == share)
        roots = own.filter(pl.col("shown") == "root")
        above, below = axes[column], axes[len(shares) + column]
        _field(above, own.filter(pl.col("shown") == "field"), roots)
        _trajectories(below, own.filter(pl.col("shown") == "trajectory"), roots)
    return figure


def _shown(shares: list[float]) -> list[float]:
    if len(shares) <= _MOST:
        return shares
    near = sorted(shares, key=lambda share: abs(share + 1))[: _MOST - 2]
    return [share for share in shares if share in (*near, shares[0], shares[-1])]


def _field(panel: Axes, field: pl.DataFrame, roots: pl.DataFrame) -> None:
    panel.axhline(0, color=AXIS, linewidth=0.8)
    panel.plot(field["hidden"], field["velocity"], color=INK, linewidth=1.3)
    panel.set_ylim(-5, 5)
    for stable, own in each_of(roots, "stable"):
        face = INK if stable else "white"
        panel.plot(own["hidden"], own["velocity"], "o", color=INK, markerfacecolor=face, markersize=6, zorder=4)


def _trajectories(panel: Axes, paths: pl.DataFrame, roots: pl.DataFrame) -> None:
    for stable, own in each_of(roots, "stable"):
        for place in own["hidden"]:
            panel.axhline(place, color=INK, linewidth=0.9, linestyle="-" if stable else ":")
    for _, path in each_of(paths, "start"):
        line = path.sort("time")
        colour = COLOURS[0] if line["hidden"][-1] > 0 else COLOURS[1]
        panel.plot(line["time"], line["hidden"], color=colour, linewidth=1.2)
    panel.set_xlim(0, 12)
