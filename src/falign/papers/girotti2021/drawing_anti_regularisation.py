"""Picture of implicit anti-regularisation: rate, hidden weight and learning time against the component's size."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, law, logarithmic, panels
from falign.papers.girotti2021.anti_regularisation_claims import CRITICAL


def rates_and_limits(data: pl.DataFrame) -> Figure:
    """Three panels over λ, those below λ_c in orange."""
    figure, (rate, hidden, time) = panels(
        3, titles=["Rate ρ*", "Hidden weight at the end", "Time to 90 %"], xlabels=["λ"], height=3.0
    )
    for panel, shown, closed in ((rate, "fitted", "rate"), (hidden, "hidden", "limit"), (time, "learned", "")):
        for below, colour in ((True, COLOURS[1]), (False, COLOURS[0])):
            own = data.filter((pl.col("target") < CRITICAL) == below)
            panel.plot(own["target"], own[shown], "o", color=colour, markersize=4)
            if closed:
                law(panel, own["target"], own[closed], "")
        _critical(panel)
    hidden.axhline(0, color=AXIS, linewidth=0.8)
    logarithmic(time, "y")
    return figure


def _critical(panel: Axes) -> None:
    panel.axvline(CRITICAL, color=AXIS, linestyle=":", linewidth=1.2)
    panel.annotate("λ_c", (CRITICAL, 0), xycoords=("data", "axes fraction"), xytext=(4, 5), textcoords="offset points")
