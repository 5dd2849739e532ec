"""Picture of the order of learning: shares of the components over time, a column a start, a row a rule."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, INK, each_of, legend, logarithmic, panels, sequence

_SCHEMES = ("zero", "small", "positive", "negative", "aligned", "anti-aligned")
_ROWS = (("fa", 2), ("dfa", 3), ("bp", 2))


def courses(data: pl.DataFrame) -> Figure:
    """One line a component; the larger, the darker."""
    figure, axes = panels(
        len(_SCHEMES),
        len(_ROWS),
        titles=[scheme if row == 0 else "" for row in range(len(_ROWS)) for scheme in _SCHEMES],
        xlabels=["time"],
        ylabels=[f"{rule}, {depth} layers" for rule, depth in _ROWS],
        share="all",
        width=10.5,
        height=1.9,
    )
    colours = dict(zip(sorted(data["target"].unique()), sequence(data["target"].n_unique()), strict=True))
    for index, panel in enumerate(axes):
        (rule, depth), scheme = _ROWS[index // len(_SCHEMES)], _SCHEMES[index % len(_SCHEMES)]
        own = data.filter((pl.col("rule") == rule) & (pl.col("depth") == depth) & (pl.col("scheme") == scheme))
        for target, line in each_of(own, "target"):
            panel.plot(line["time"], line["share"], color=colours[target], linewidth=1.3, label=f"λ = {target:g}")
        panel.axhline(0.9, color=INK, linewidth=0.8, linestyle=(0, (4, 2.5)))
        panel.axhline(0.0, color=AXIS, linewidth=0.8)
        panel.set_ylim(-0.5, 1.15)
        panel.set_xlim(0.05, 500)
        logarithmic(panel, "x", ticks=(0.1, 1, 10, 100))
    legend(figure, columns=8)
    return figure
