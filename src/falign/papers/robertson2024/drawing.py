"""What the pictures of Robertson and Koyejo 2024 share: how rules are told apart, and points with error bars."""

from typing import NamedTuple

import polars as pl
from matplotlib.axes import Axes

from falign.lab.report.style import COLOURS, INK


class Look(NamedTuple):
    """How a rule is drawn."""

    colour: str
    marker: str


LOOKS = {
    "bp": Look(INK, "s"),
    **{
        rule: Look(colour, marker)
        for rule, colour, marker in zip(("fa", "dfa", "usf", "frsf", "kp", "adafa"), COLOURS, "oDv^PX", strict=True)
    },
}
"""Of every rule of the paper's experiments: the same in all pictures."""


def points(axes: Axes, data: pl.DataFrame, x: str, rule: str, label: str | None = None) -> None:
    """Means of a rule along an axis, with bars of a standard deviation."""
    colour, marker = LOOKS[rule]
    axes.errorbar(
        data[x],
        data["mean"],
        yerr=data["sd"].fill_null(0),
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=1.4,
        elinewidth=0.9,
        label=label or rule,
    )
