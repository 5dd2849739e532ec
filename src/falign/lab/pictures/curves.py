"""Loss and accuracy of the training and the test set against the epoch."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.pictures.lines import decades, line, plot
from falign.lab.report.style import AXIS, COLOURS, panels


def loss(records: pl.DataFrame, about: str) -> Figure:
    """Mean cross-entropy, on a logarithmic axis: losses fall by orders of magnitude."""
    figure = _both(records, "loss", f"Loss — {about}", 1.0, "cross-entropy")
    decades(figure.axes[0])
    return figure


def accuracy(records: pl.DataFrame, about: str) -> Figure:
    """Share of right answers."""
    return _both(records, "accuracy", f"Accuracy — {about}", 100.0, "right answers, %")


def _both(records: pl.DataFrame, what: str, title: str, factor: float, ylabel: str) -> Figure:
    figure, (axes,) = panels(1, titles=[title], ylabels=[ylabel], width=7, height=4.2)
    lines = [
        line(records, f"train_{what}", "training (mean over the epoch)", AXIS, factor),
        line(records, f"test_{what}", "test", COLOURS[0], factor),
    ]
    plot(axes, lines)
    axes.legend()
    return figure
