"""The angle between what a rule gives to each layer and what backpropagation would give."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.pictures.lines import NAMED, TITLE, by_layer, degrees, key, line, name_at_the_end, plot
from falign.lab.report.style import panels


def angles(records: pl.DataFrame, alignment: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """Angles of the gradients, and of the errors as they are delivered, a line a layer.

    Args:
        records: What was measured; of every layer the angle of its gradient.
        alignment: What was measured of every layer.
        colours: Of the layers.
        about: The run in a few words.

    Returns:
        The left panel: ∠(f, g) of the gradient f taken and the true one g. The right one: the error that a layer hands
        to its input, mean over samples; the first layer hands none on.
    """
    figure, (left, right) = panels(
        2,
        titles=["Gradient taken", "Error delivered"],
        ylabels=["degrees to the true one"],
        share="all",
        height=4.0,
    )
    figure.suptitle(f"Angle to the true gradient — {about}", **TITLE)
    gradients = [line(records, f"angle_{name}", name, colour) for name, colour in colours.items()]
    errors = by_layer(alignment, "delivered_angle", colours)
    plot(left, gradients)
    plot(right, errors)
    degrees(left, right)
    if len(colours) <= NAMED:
        name_at_the_end(left, gradients)
        name_at_the_end(right, errors)
    else:
        key(figure, colours)
    return figure
