"""How well the weights of every single neuron agree with its feedback."""

import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from falign.lab.pictures.lines import NAMED, key, literal
from falign.lab.report.style import INK, panels


def neurons(table: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """Per-neuron alignment, sorted, a curve a layer; in the legend the share of neurons that are aligned.

    Args:
        table: ``layer``, ``neuron`` and ``cosine``: cos∠(B[:, k], W[:, k]) of the weights of a layer that neuron k, at
            its input, feeds, and of those that feed the error back to it.
        colours: Of the layers.
        about: The run in a few words.

    Returns:
        The figure. Layers whose feedback has another shape, as under direct rules, have no curve.
    """
    figure, (axes,) = panels(
        1,
        titles=[f"Alignment of every neuron — {about}"],
        xlabels=["neurons, from the least aligned to the most"],
        ylabels=["cosine of its feedback and its weights"],
        width=7,
        height=4.2,
    )
    layers = table["layer"].unique(maintain_order=True).to_list()
    shares = []
    for name in layers:
        cosines = table.filter(layer=name)["cosine"].sort()
        count = len(cosines)
        share = (cosines > 0).mean()
        assert isinstance(share, float)
        shares.append(share)
        label = f"into {literal(name)}: {share:.0%} of {count:,} aligned"
        places = [100 * (place + 0.5) / count for place in range(count)]
        axes.plot(places, cosines, color=colours[name], label=label, marker="o" if count <= 40 else None, markersize=3)
    axes.axhline(0, color=INK, linewidth=1, zorder=1)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlim(-1, 101)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    if len(layers) > NAMED:
        key(figure, {name: colours[name] for name in layers})
        axes.text(1, 0.92, f"of a layer's neurons {min(shares):.0%} to {max(shares):.0%} are aligned")
    elif layers:
        axes.legend(loc="lower right")
    else:
        axes.text(50, 0.1, "this rule has no feedback of the shape of a layer's weights", ha="center")
    return figure
