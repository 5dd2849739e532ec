"""Picture of alignment over time."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, band, each_of, legend, logarithmic, panels
from falign.papers.garg2022.drawing import methods

_SHOWN = {
    "alignment": "tr(BZ)",
    "cosine": "cos∠(Z, Bᵀ)",
    "lyapunov": "|BR|²",
    "error": "|R| / |Y|",
}


def alignment_by_time(data: pl.DataFrame) -> Figure:
    """A row a matrix, a column a quantity."""
    sets = each_of(data, "data")
    titles = [f"{name}: {title}" if not column else title for name, _ in sets for column, title in _titles()]
    figure, axes = panels(len(_SHOWN), len(sets), titles=titles, xlabels=["η × steps"], height=2.6)
    for row, (_, whole) in enumerate(sets):
        for panel, shown in zip(axes[len(_SHOWN) * row :], _SHOWN, strict=False):
            own = whole.filter((pl.col("shown") == shown) & pl.col("median").is_not_null())
            timed = own.with_columns(time=pl.col("rate") * pl.col("step")).filter(pl.col("time") > 0).sort("time")
            for look, runs in methods(timed):
                band(
                    panel, runs["time"], runs["median"], runs["low"], runs["high"], label=look.label, colour=look.colour
                )
            logarithmic(panel, "x")
            if shown == "lyapunov":
                logarithmic(panel, "y")
            else:
                panel.axhline(0, color=AXIS, linewidth=0.8)
    legend(figure)
    return figure


def _titles() -> list[tuple[int, str]]:
    return list(enumerate(_SHOWN.values()))
