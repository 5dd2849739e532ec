"""Picture of the time that a component takes against its size: by depth, and from other starts."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, INK, MARKERS, each_of, law, logarithmic, panels, sequence
from falign.theory.deep_linear import critical_target, depth_slope

_SCHEMES = ("zero", "positive", "negative", "aligned", "anti-aligned")


def times_by_size(data: pl.DataFrame) -> Figure:
    """Zero start by depth on the left, starts of two layers and gradient descent on the right."""
    figure, (left, right) = panels(
        2,
        titles=["From zero weights", "Two layers, other starts"],
        xlabels=["λ"],
        ylabels=["time to 90 %"],
        share="all",
        height=3.8,
    )
    fa = data.filter(pl.col("rule") == "fa")
    depths = each_of(fa.filter(pl.col("scheme") == "zero"), "depth")
    for colour, marker, (depth, own) in zip(sequence(len(depths)), MARKERS, depths, strict=False):
        slope, middle = depth_slope(depth), own.height // 2
        _times(left, own, colour, marker, f"{depth} layers: slope {slope:.3f}")
        scale = own["predicted"][middle] / own["target"][middle] ** slope
        law(left, own["target"], scale * own["target"] ** slope, "")
    two = fa.filter(pl.col("depth") == 2)
    for colour, marker, (scheme, own) in zip(COLOURS, MARKERS, each_of(two, "scheme", _SCHEMES), strict=False):
        _times(right, own, colour, marker, scheme)
    _times(right, data.filter(pl.col("rule") == "bp"), INK, "", "gradient descent, small")
    right.axvline(float(critical_target(-0.5, 1.0)), color=AXIS, linestyle=":", linewidth=1.2)
    for panel in (left, right):
        logarithmic(panel, "both")
        panel.legend(fontsize=8)
    return figure


def _times(panel: Axes, own: pl.DataFrame, colour: str, marker: str, label: str) -> None:
    line = own.sort("target")
    panel.plot(line["target"], line["predicted"], color=colour, linewidth=1.2)
    panel.plot(
        line["target"], line["learned"], color=colour, marker=marker or "x", linestyle="none", label=label, markersize=4
    )
