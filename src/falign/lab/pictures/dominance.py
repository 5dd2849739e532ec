"""Why the loss falls: alignment dominance, and the three factors of what every layer adds to the descent."""

from collections.abc import Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.pictures.lines import TITLE, Line, by_layer, key, line, plot
from falign.lab.report.style import COLOURS, INK, expected, logarithmic, panels


def dominance(records: pl.DataFrame, alignment: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """D along the training, and the split of ``-dL/dt = Σ_l cos∠(g_l, f_l) |g_l| |f_l|``.

    Args:
        records: What was measured; its column ``dominance`` is D = Σ_{l<L} ⟨g_l, f_l⟩ / |g_L|².
        alignment: What was measured of every layer: ``cosine``, ``gradient_norm``, ``taken_norm``.
        colours: Of the layers.
        about: The run in a few words.

    Returns:
        Four panels: D with the line -1, below which the loss rises; the cosines; |g| and |f| on one logarithmic scale.
    """
    figure, (above, cosine, gradient, taken) = panels(
        2,
        2,
        titles=["Alignment dominance D", "Alignment cos∠(g, f)", "True gradient |g|", "Gradient taken |f|"],
        height=2.7,
    )
    figure.suptitle(f"What the descent is made of — {about}", **TITLE)
    against_minus_one(above, [line(records, "dominance", "", COLOURS[0])])
    plot(cosine, by_layer(alignment, "cosine", colours))
    cosine.axhline(0, color=INK, linewidth=1, zorder=1)
    low = min((y for each in cosine.get_lines() for y in each.get_ydata()), default=0.0)  # pyright: ignore
    cosine.set_ylim(min(-0.05, 1.1 * low), 1.05)
    positive = alignment.filter(pl.col("gradient_norm") > 0, pl.col("taken_norm") > 0)
    plot(gradient, by_layer(positive, "gradient_norm", colours))
    plot(taken, by_layer(positive, "taken_norm", colours))
    taken.sharey(gradient)
    logarithmic(gradient, "y")
    logarithmic(taken, "y")
    if colours:
        key(figure, colours)
    return figure


def against_minus_one(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw courses of D, and where the loss would rise; far values are pressed together."""
    plot(axes, lines)
    values = [value for each in lines for value in each.y]
    low, high = min([-1.0, *values]), max([1.0, *values])
    if high - low > 20:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(2 * low, 2 * high)
    else:
        axes.set_ylim(low - 0.15 * (high - low), high + 0.08 * (high - low))
    edge = axes.get_ylim()[0]
    expected(axes, edge, -1.0, "")
    axes.axhline(-1.0, color=INK, linewidth=1.2, linestyle=(0, (4, 2.5)))
    axes.set_ylim(bottom=edge)
    axes.text(0.02, 0.03, "the loss rises", transform=axes.transAxes, color=INK, fontsize=8.5)
