"""Pictures of one run, each a function of its tables, and the lines and axes that the comparison of runs draws, too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from falign._style import literal
from falign.lab._run_folder import RunFolder
from falign.lab._tables import Tables
from falign.lab.config import TrainConfig, rule_title
from falign.lab.report._figures import png
from falign.lab.report.style import AXIS, COLOURS, INK, RC_PARAMS, expected, legend, logarithmic, panels, sequence
from falign.lab.report.style import law as diagonal


def draw(run: RunFolder, tables: Tables, config: TrainConfig) -> None:
    """Write the pictures of a run.

    Args:
        run: Folder of the run.
        tables: Tables of the run.
        config: Configuration of the run, for the titles.

    Raises:
        WriteError: A picture cannot be written.
    """
    with matplotlib.rc_context(RC_PARAMS):
        for name, figure in figures(tables, config).items():
            run.write(name, png(figure))


def figures(tables: Tables, config: TrainConfig) -> dict[str, Figure]:
    """Make the figures of a run; a layer has the same colour in all of them.

    Args:
        tables: Tables of the run.
        config: Configuration of the run, for the titles.

    Returns:
        {file name: figure}, not yet drawn; that of the perplexity for texts only, that of the conservation law where it
        was checked.
    """
    about = literal(f"{rule_title(config)} · {config.dataset} · {config.model}")
    records, alignment, colours = tables.records, tables.alignment, _layer_colours(tables.records)
    pictures = {
        "loss.png": loss(records, about),
        "accuracy.png": accuracy(records, about),
        "angles.png": angles(records, alignment, colours, about),
        "neurons.png": neurons(tables.neurons, colours, about),
        "dominance.png": dominance(records, alignment, colours, about),
    }
    if "perplexity" in records.columns:
        pictures["perplexity.png"] = perplexity(records, about)
    return pictures if tables.law is None else pictures | {"law.png": law(tables.law, colours, about)}


# Lines against the epoch, their names and their axes.

TITLE: dict[str, Any] = {"x": 0.008, "ha": "left", "fontsize": 11, "fontweight": "bold", "color": INK}
"""Style of the title of a figure of several panels."""
_NAMED = 8
"""Layers that are named one by one; of more, a colour bar is drawn."""
_LETTERS = 13
"""Letters of a legend that fit into an inch."""
_MARKED = 12
"""Points of a line that get markers, so that a single point can be seen."""
_FAR = 1e100
"""Values are clipped to this: matplotlib cannot add margins to an axis up to the largest float."""


@dataclass(frozen=True)
class Line:
    """Label, points and colour of one line; points without a value are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def line(table: pl.DataFrame, column: str, label: str, colour: str, factor: float = 1.0) -> Line:
    """Take one column of a table against the epoch."""
    points = table.select("epoch", column).drop_nulls()
    return Line(label, points["epoch"].to_list(), (points[column].clip(-_FAR, _FAR) * factor).to_list(), colour)


def _layer_colours(records: pl.DataFrame) -> dict[str, str]:
    """Return {layer: colour}, darker from the first layer to the last."""
    names = [name.removeprefix("angle_") for name in records.columns if name.startswith("angle_")]
    return dict(zip(names, sequence(len(names)), strict=True))


def _covering(colours: dict[str, str], layers: Sequence[str]) -> dict[str, str]:
    """Return colours of these layers: new ones if a layer has no angle, as batch norm and parts of recurrent layers."""
    return colours if colours.keys() >= set(layers) else dict(zip(layers, sequence(len(layers)), strict=True))


def _by_layer(alignment: pl.DataFrame, column: str, colours: dict[str, str]) -> list[Line]:
    """Take one column of the table of the alignment, one line for each layer that has values."""
    lines = [line(alignment.filter(layer=name), column, name, colour) for name, colour in colours.items()]
    return [each for each in lines if each.y]


def plot(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw lines against the epoch."""
    for each in lines:
        marker = "o" if len(each.x) <= _MARKED else None
        axes.plot(each.x, each.y, color=each.colour, label=literal(each.label), marker=marker)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def decades(axes: Axes) -> None:
    """Scale the vertical axis by powers of ten, unless nothing drawn is above 0: a loss can be exactly 0."""
    drawn = [float(value) for each in axes.get_lines() for value in each.get_ydata()]  # pyright: ignore
    if not drawn or max(drawn) > 0:
        logarithmic(axes, "y")


def degrees(*panels: Axes) -> None:
    """Scale axes of angles alike: from 0 to 95 degrees, or beyond if needed, with a line at the right angle."""
    drawn = [float(value) for axes in panels for each in axes.get_lines() for value in each.get_ydata()]  # pyright: ignore
    high = max(95.0, *(value + 5 for value in drawn), 0.0)
    for axes in panels:
        axes.set_ylim(-2.0, high)
        axes.set_yticks(range(0, int(high) + 1, 15))
        axes.axhline(90, color=AXIS, linewidth=1, linestyle="--", zorder=1)


def key(figure: Figure, colours: dict[str, str]) -> None:
    """Draw the legend of the layers below the panels; for many layers a colour bar from the first to the last."""
    if len(colours) <= _NAMED:
        widest = max(map(len, colours), default=0) + 6
        legend(figure, columns=max(1, int(_LETTERS * figure.get_figwidth()) // widest))
        return
    scale = ScalarMappable(cmap=ListedColormap(list(colours.values())))
    first, *_, last = colours
    bar = figure.colorbar(scale, ax=figure.axes, location="bottom", shrink=0.5, aspect=50, ticks=[])
    bar.set_label(literal(f"{len(colours)} layers, from {first} to {last}"))


def _name_at_the_end(axes: Axes, lines: Sequence[Line]) -> None:
    """Write every line's label at its right end, moved up where two would overlap."""
    from_below = sorted((line for line in lines if line.y), key=lambda line: line.y[-1])
    low, high = axes.get_ylim()
    spacing = (high - low) * 0.065
    next_height = low
    for each in from_below:
        height = max(each.y[-1], next_height)
        next_height = height + spacing
        axes.annotate(
            literal(each.label),
            (each.x[-1], height),
            (8, 0),
            textcoords="offset points",
            color=each.colour,
            va="center",
        )


# Angles to the true gradient.


def angles(records: pl.DataFrame, alignment: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """Draw the angles of gradients and delivered errors to the true ones, one line for each layer.

    Args:
        records: Table of records, with the angle of every layer's gradient.
        alignment: Table of the alignment.
        colours: {layer: colour}.
        about: The run in a few words, for the title.

    Returns:
        The left panel: ∠(f, g) of the gradient f taken and the true one g. The right one: the error that a layer hands
        to its input, mean over samples; the first layer hands none on.
    """
    figure, (left, right) = panels(
        2, titles=["Gradient taken", "Error delivered"], ylabels=["degrees to the true one"], share="all", height=4.0
    )
    figure.suptitle(f"Angle to the true gradient — {about}", **TITLE)
    gradients = [line(records, f"angle_{name}", name, colour) for name, colour in colours.items()]
    errors = _by_layer(alignment, "delivered_angle", colours)
    plot(left, gradients)
    plot(right, errors)
    degrees(left, right)
    if len(colours) <= _NAMED:
        _name_at_the_end(left, gradients)
        _name_at_the_end(right, errors)
    else:
        key(figure, colours)
    return figure


# Loss and accuracy of training and test set, and perplexity of texts.


def loss(records: pl.DataFrame, about: str) -> Figure:
    """Draw the mean cross-entropy, on a logarithmic axis: losses fall by orders of magnitude."""
    figure = _training_and_test(records, "loss", f"Loss — {about}", 1.0, "cross-entropy")
    decades(figure.axes[0])
    return figure


def perplexity(records: pl.DataFrame, about: str) -> Figure:
    """Draw the perplexity of a text, exp of the loss of the test: so many characters as likely as each other."""
    figure, (axes,) = panels(1, titles=[f"Perplexity — {about}"], ylabels=["characters"], width=7, height=4.2)
    plot(axes, [line(records, "perplexity", "test", COLOURS[0])])
    decades(axes)
    return figure


def accuracy(records: pl.DataFrame, about: str) -> Figure:
    """Draw the accuracy in percent."""
    return _training_and_test(records, "accuracy", f"Accuracy — {about}", 100.0, "right answers, %")


def _training_and_test(records: pl.DataFrame, what: str, title: str, factor: float, ylabel: str) -> Figure:
    figure, (axes,) = panels(1, titles=[title], ylabels=[ylabel], width=7, height=4.2)
    lines = [
        line(records, f"train_{what}", "training (mean over the epoch)", AXIS, factor),
        line(records, f"test_{what}", "test", COLOURS[0], factor),
    ]
    if f"validation_{what}" in records.columns:
        lines.append(line(records, f"validation_{what}", "validation", COLOURS[1], factor))
    plot(axes, lines)
    axes.legend()
    return figure


# Alignment dominance, and the three factors of what every layer adds to the descent of the loss.


def dominance(records: pl.DataFrame, alignment: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """Draw D along the training, and the factors of ``-dL/dt = Σ_l cos∠(g_l, f_l) |g_l| |f_l|``.

    Args:
        records: Table of records; its column ``dominance`` is D = Σ_{l<L} ⟨g_l, f_l⟩ / |g_L|².
        alignment: Table of the alignment: ``cosine``, ``gradient_norm``, ``taken_norm``.
        colours: {layer: colour}.
        about: The run in a few words, for the title.

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
    plot(cosine, _by_layer(alignment, "cosine", colours))
    cosine.axhline(0, color=INK, linewidth=1, zorder=1)
    low = min((y for each in cosine.get_lines() for y in each.get_ydata()), default=0.0)  # pyright: ignore
    cosine.set_ylim(min(-0.05, 1.1 * low), 1.05)
    positive = alignment.filter(pl.col("gradient_norm") > 0, pl.col("taken_norm") > 0)
    plot(gradient, _by_layer(positive, "gradient_norm", colours))
    plot(taken, _by_layer(positive, "taken_norm", colours))
    taken.sharey(gradient)
    logarithmic(gradient, "y")
    logarithmic(taken, "y")
    if colours:
        key(figure, colours)
    return figure


def against_minus_one(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw D against the epoch, with the region below -1 where the loss rises; a wide range is drawn as symlog."""
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


# The conservation law as a diagonal: the change of every neuron's alignment against that of its weights.

_MARKERS = {"exact": "o", "accounted": "o", "drift": "^", "none": "x"}
"""{status of a law: marker}."""


def law(table: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """Draw Δ⟨B, w_out⟩ of every neuron against Δ(½|w_in|² + ½b²); neurons that keep the law are on the diagonal.

    A ring shows where a neuron would be without terms that the law accounts for, such as decay or moving feedback.

    Args:
        table: ``layer``, ``targets``, ``status``, ``neuron``; ``weights`` and ``alignment``, both changes since the
            beginning; ``residual``, what of their difference is not accounted for.
        colours: {layer: colour}.
        about: The run in a few words, for the title.

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
    colours = _covering(colours, layers)
    for name in layers:
        neurons_of_layer = table.filter(layer=name)
        status = neurons_of_layer["status"][0]
        axes.scatter(
            neurons_of_layer["weights"],
            neurons_of_layer["alignment"],
            s=14,
            color=colours[name],
            alpha=0.75,
            linewidths=0.8 if status == "none" else 0,
            marker=_MARKERS[status],
            label=literal(f"{name}, {status}"),
        )
        if status == "accounted":
            conserved = neurons_of_layer["weights"] - neurons_of_layer["residual"]
            axes.scatter(
                neurons_of_layer["weights"],
                conserved,
                s=22,
                facecolors="none",
                edgecolors=colours[name],
                linewidths=0.8,
            )
    low, high = _limits(table)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    diagonal(axes, [low, high], [low, high], "conserved")
    if len(layers) > _NAMED:
        _explain(axes, table["status"].unique(maintain_order=True).to_list())
    key(figure, {name: colours[name] for name in layers})
    if not layers:
        axes.text(0.5, 0.5, "no neuron of this network can be followed", ha="center", transform=axes.transAxes)
    return figure


def _explain(axes: Axes, statuses: list[str]) -> None:
    handles = [Line2D([], [], color=INK, marker=_MARKERS[status], linestyle="", label=status) for status in statuses]
    axes.legend(handles=handles, loc="upper left")


def _limits(table: pl.DataFrame) -> tuple[float, float]:
    values = [0.0, *table["weights"].to_list(), *table["alignment"].to_list()]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


# Alignment of the weights of every neuron with its feedback.


def neurons(table: pl.DataFrame, colours: dict[str, str], about: str) -> Figure:
    """Draw the alignment of every neuron, sorted, one curve for each layer; the legend has the share of aligned ones.

    Args:
        table: ``layer``, ``neuron`` and ``cosine``: cos∠(B[:, k], W[:, k]) of the weights of a layer that neuron k, at
            its input, feeds, and of those that feed the error back to it.
        colours: {layer: colour}.
        about: The run in a few words, for the title.

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
    colours, shares = _covering(colours, layers), []
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
    if len(layers) > _NAMED:
        key(figure, {name: colours[name] for name in layers})
        axes.text(1, 0.92, f"of a layer's neurons {min(shares):.0%} to {max(shares):.0%} are aligned")
    elif layers:
        axes.legend(loc="lower right")
    else:
        axes.text(50, 0.1, "this rule has no feedback of the shape of a layer's weights", ha="center")
    return figure
