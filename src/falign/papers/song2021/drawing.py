"""The pictures of Song, Xu and Lafferty 2021, each as a function of what is drawn."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, band, each_of, law, logarithmic, panels, sequence, thinned

NAMES = {"identity": "Linear", "relu": "ReLU", "tanh": "Tanh"}


def lines(axes: Axes, data: pl.DataFrame, x: str, colours: list[str], *, positive: bool = False) -> None:
    """One line a ridge, with its band of a standard deviation.

    Where only positive numbers can be drawn, the band's lower edge stays at a tenth of the mean.
    """
    for colour, (strength, each) in zip(colours, each_of(data, "strength"), strict=False):
        low, high = each["mean"] - each["sd"].fill_null(0), each["mean"] + each["sd"].fill_null(0)
        band(
            axes,
            each[x],
            each["mean"],
            pl.select(pl.max_horizontal(low, each["mean"] / 10)).to_series() if positive else low,
            high,
            label=f"λ = {strength:g}",
            colour=colour,
            marker="o" if each.height <= 12 else None,
        )


def alignment_and_loss(data: pl.DataFrame) -> Figure:
    """Final cosines by width above, losses by step below; a column an activation."""
    names = [name for name in NAMES if name in data["activation"]]
    width = data.filter(pl.col("shown") == "loss")["p"][0]
    figure, axes = panels(
        len(names),
        2,
        titles=[NAMES[name] for name in names],
        xlabels=["width p", f"step (p = {width})"],
        ylabels=["cos∠(b, β)", "training loss"],
        share="row",
        height=3.0,
    )
    for column, name in enumerate(names):
        above, below = axes[column], axes[len(names) + column]
        own = data.filter(pl.col("activation") == name)
        colours = sequence(own["strength"].n_unique())
        ends = own.filter(pl.col("shown") == "cosine").sort("p")
        lines(above, ends, "p", colours)
        above.axhline(0, color=AXIS, linewidth=0.8)
        logarithmic(above, "x", ticks=thinned(sorted(ends["p"].unique().to_list()), 4))
        above.set_ylim(-0.08, 1.35)
        above.set_yticks([0, 0.25, 0.5, 0.75, 1])
        above.legend(ncols=2, loc="upper right", fontsize=8)
        lines(below, own.filter(pl.col("shown") == "loss").sort("step"), "step", colours, positive=True)
        logarithmic(below, "y")
    return figure


def cosine_by_width(data: pl.DataFrame) -> Figure:
    """Final cosines of linear networks of any width on the left; what is gained against n/p on the right."""
    figure, (left, right) = panels(
        2, titles=["At the end", "Gained without a ridge"], xlabels=["width p"], ylabels=["cos∠(b, β)"], height=3.4
    )
    ends = data.filter(pl.col("shown") == "cosine").sort("p")
    lines(left, ends, "p", sequence(ends["strength"].n_unique()))
    logarithmic(left, "x")
    left.legend(title="ridge")
    gained = data.filter(pl.col("shown") == "gained").sort("p")
    right.errorbar(
        gained["p"],
        gained["mean"],
        yerr=gained["error"].fill_null(0),
        fmt="o",
        color=sequence(1)[0],
        label="measured, λ = 0",
    )
    law(right, gained["p"], gained["n"] / gained["p"], "n/p")
    logarithmic(right, "both")
    right.legend()
    return figure


def time_by_width(data: pl.DataFrame) -> Figure:
    """Steps until a cosine is reached, against the width."""
    figure, (axes,) = panels(1, xlabels=["width p"], ylabels=["steps until cos∠(b, β) = 0.5"], width=5.5, height=3.4)
    lines(axes, data.sort("p"), "p", sequence(data["strength"].n_unique()), positive=True)
    largest = data.filter(pl.col("strength") == data["strength"].max()).sort("p")
    law(axes, largest["p"], largest["mean"][-1] * (largest["p"] / largest["p"][-1]).sqrt(), "∝ √p")
    logarithmic(axes, "both")
    axes.legend(title="ridge")
    return figure


def alignment_and_accuracy(data: pl.DataFrame) -> Figure:
    """Cosine of the error signals and test accuracy along training; a row a data set and law of the weights."""
    rows = sorted(data.select("dataset", "weights").unique().rows(), key=lambda row: (row[0], row[1] == "scaled"))
    laws = {"standard": "W(0) ~ N(0, 1)", "scaled": "W(0) ~ N(0, 1/d)"}
    figure, axes = panels(
        2,
        len(rows),
        titles=[text for name, law_ in rows for text in (f"{name}, {laws[law_]}", "")],
        xlabels=["epoch"],
        ylabels=["cos∠(δ BP, δ FA)"] * len(rows),
        height=2.6,
    )
    for index, (name, weights) in enumerate(rows):
        own = data.filter((pl.col("dataset") == name) & (pl.col("weights") == weights)).sort("step")
        for panel, shown in zip(axes[2 * index :], ("error_cosine", "accuracy"), strict=False):
            lines(panel, own.filter(pl.col("shown") == shown), "step", sequence(own["strength"].n_unique()))
        axes[2 * index + 1].set_ylabel("test accuracy")
    axes[0].legend(title="ridge")
    return figure
