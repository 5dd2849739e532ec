"""Picture of predicted losses beside trained ones, a column a network."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import INK, each_of, legend, logarithmic, panels, sequence
from falign.papers.girotti2021.prediction_claims import WHOLE

_SHOWN = (0, 2, 4, 6, 8)
"""Components that are drawn."""
_PREDICTED = (0, (4, 2.5))
_KIND = ["dataset", "activation", "rule", "depth", "size"]


def beside(data: pl.DataFrame) -> Figure:
    """Whole losses above, those of components below, on a logarithmic axis; predictions dashed."""
    sets = each_of(data, "dataset")
    kinds = data.select(_KIND[1:]).unique().sort(pl.all()).rows()
    figure, axes = panels(
        len(kinds),
        2 * len(sets),
        titles=[f"{kind}, {rule},\n{depth} layers, × {size:g}" for kind, rule, depth, size in kinds],
        xlabels=["step"],
        ylabels=[label for name, _ in sets for label in (f"{name}: loss", "of components")],
        share="row",
        width=10.5,
        height=2.2,
    )
    for row, (_, whole) in enumerate(sets):
        for column, kind in enumerate(kinds):
            own = whole.filter(*(pl.col(name) == value for name, value in zip(_KIND[1:], kind, strict=True)))
            above, below = (axes[(2 * row + part) * len(kinds) + column] for part in (0, 1))
            _lines(above, own, (WHOLE,), [INK])
            above.set_ylim(bottom=0)
            _lines(below, own, _SHOWN, sequence(len(_SHOWN))[::-1])
            logarithmic(below, "y")
            below.set_ylim(bottom=3e-4)
    axes[0].plot([], [], color=INK, linestyle=_PREDICTED, linewidth=1.2, label="predicted")
    legend(figure, columns=7)
    return figure


def _lines(panel: Axes, own: pl.DataFrame, modes: tuple[int, ...], colours: list[str]) -> None:
    for colour, (mode, line) in zip(colours, each_of(own, "mode", modes), strict=False):
        label = "whole" if mode == WHOLE else f"component {mode + 1}"
        panel.plot(line["step"], line["trained"], color=colour, linewidth=1.4, label=label)
        panel.plot(line["step"], line["predicted"], color=colour, linewidth=1.2, linestyle=_PREDICTED)
