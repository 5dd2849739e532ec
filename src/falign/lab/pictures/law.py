"""The conservation law as a diagonal: what every neuron's alignment gained against what its weights gained."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from falign.lab.pictures.lines import NAMED, key, literal
from falign.lab.report.style import INK, panels, sequence
from falign.lab.report.style import law as diagonal

_MARKERS = {"exact": "o", "accounted": "o", "drift": "^", "none": "x"}
"""Of a law's status."""


def law(table: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """A point a neuron: Δ⟨B, w_out⟩ against Δ(½|w_in|² + ½b²); neurons that keep the law are on the diagonal.

    What moves a neuron off it and is accounted for (decay, feedback that moves) is put back by a ring.

    Args:
        table: ``layer``, ``targets``, ``status``, ``neuron``; ``weights`` and ``alignment``, both changes since the
            beginning; ``residual``, what of their difference is not accounted for.
        colours: Of the layers.
        about: The run in a few words.

    Returns:
        One panel with equal axes.
    """
    figure, (axes,) = panels(
        1,
        titles=[f"Conservation law — {about}"],
        xlabels=["change of ½|w_in|² + ½b²"],
        ylabels=["change of the alignment term ⟨B, w_out⟩"],
        width=6.0,
        height=6.2,
    )
    layers = table["layer"].unique(maintain_order=True).to_list()
    if not colours.keys() >= set(layers):  # batch norm has a law of its own
        colours = dict(zip(layers, sequence(len(layers)), strict=True))
    for name in layers:
        own = table.filter(layer=name)
        status = own["status"][0]
        axes.scatter(
            own["weights"],
            own["alignment"],
            s=14,
            color=colours[name],
            alpha=0.75,
            linewidths=0.8 if status == "none" else 0,
            marker=_MARKERS[status],
            label=literal(f"{name}, {status}"),
        )
        if status == "accounted":
            kept = own["weights"] - own["residual"]
            axes.scatter(own["weights"], kept, s=22, facecolors="none", edgecolors=colours[name], linewidths=0.8)
    low, high = _ends(table)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    diagonal(axes, [low, high], [low, high], "conserved")
    if len(layers) > NAMED:
        _explain(axes, table["status"].unique(maintain_order=True).to_list())
    key(figure, {name: colours[name] for name in layers})
    if not layers:
        axes.text(0.5, 0.5, "no neuron of this network can be followed", ha="center", transform=axes.transAxes)
    return figure


def _explain(axes: Axes, statuses: list[str]) -> None:
    handles = [Line2D([], [], color=INK, marker=_MARKERS[status], linestyle="", label=status) for status in statuses]
    axes.legend(handles=handles, loc="upper left")


def _ends(table: pl.DataFrame) -> tuple[float, float]:
    values = [0.0, *table["weights"].to_list(), *table["alignment"].to_list()]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room
