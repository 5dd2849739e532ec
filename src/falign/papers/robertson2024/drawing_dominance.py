"""Picture of alignment dominance and the loss that it predicts."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, INK, band, each_of, legend, logarithmic, panels

_STARTS = ("dominant", "small", "generic", "anti")
_COLOUR: dict[str, str] = dict(zip(_STARTS, (COLOURS[2], COLOURS[0], COLOURS[5], COLOURS[1]), strict=True))


def dominance_and_loss(data: pl.DataFrame) -> Figure:
    """D above, losses below, by step; a column a network and rule, a pair of rows a data set."""
    sets = each_of(data, "dataset")
    cases = sorted(data.select("rule", "model").unique().rows())
    figure, axes = panels(
        len(cases),
        2 * len(sets),
        titles=[
            text
            for name, _ in sets
            for text in (
                *(f"{name}, {rule}, {model.removeprefix('mlp:')}" for rule, model in cases),
                *("" for _ in cases),
            )
        ],
        xlabels=["step"],
        ylabels=["dominance D", "loss"] * len(sets),
        share="row",
        height=2.6,
    )
    for row, (_, whole) in enumerate(sets):
        for column, (rule, model) in enumerate(cases):
            own = whole.filter((pl.col("rule") == rule) & (pl.col("model") == model)).sort("step")
            above, below = (axes[(2 * row + part) * len(cases) + column] for part in (0, 1))
            _dominance(above, own.filter(pl.col("shown") == "dominance"))
            _losses(below, own)
    for style, label in (("--", "Σ η ⟨g, f⟩ predicts"), (":", "bound")):
        axes[-1].plot([], [], color=INK, linestyle=style, linewidth=1.1, label=label)
    legend(figure)
    return figure


def _dominance(panel: Axes, data: pl.DataFrame) -> None:
    for start, own in each_of(data, "start", _STARTS):
        spread = own["sd"].fill_null(0)
        band(
            panel,
            own["step"],
            own["mean"],
            own["mean"] - spread,
            own["mean"] + spread,
            label=start,
            colour=_COLOUR[start],
        )
    panel.set_yscale("symlog", linthresh=1)
    panel.axhspan(-1e3, -1, color=AXIS, alpha=0.2, linewidth=0, zorder=0)
    panel.set_ylim(-4, 15)
    panel.set_yticks([-3, -1, 0, 1, 3, 10], labels=["-3", "-1", "0", "1", "3", "10"])
    panel.minorticks_off()


def _losses(panel: Axes, data: pl.DataFrame) -> None:
    for start, own in each_of(data, "start", _STARTS):
        colour = _COLOUR[start]
        for shown, style in (("bound", ":"), ("integrated", "--"), ("loss", "-")):
            line = own.filter((pl.col("shown") == shown) & (pl.col("mean") > 0))
            panel.plot(
                line["step"], line["mean"], color=colour, linestyle=style, linewidth=1.7 if style == "-" else 1.1
            )
    logarithmic(panel, "y")
