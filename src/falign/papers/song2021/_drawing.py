"""The pictures of Song, Xu and Lafferty 2021, each as a function of what is drawn."""

import polars as pl

from falign.lab.report.style import (
    AXIS,
    COLOURS,
    Axes,
    Figure,
    band,
    each_of,
    facets,
    law,
    logarithmic,
    panels,
    sequence,
    thinned,
)
from falign.papers.song2021._shared import STEPS

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
    width = data.filter(pl.col("shown") == "loss")["p"][0]
    figure, activations = facets(
        data,
        "activation",
        2,
        order=tuple(NAMES),
        names=NAMES,
        xlabels=["width p", f"step (p = {width})"],
        ylabels=["cos∠(b, β)", "training loss"],
        share="row",
        height=3.0,
    )
    for _, runs, (above, below) in activations:
        colours = sequence(runs["strength"].n_unique())
        ends = runs.filter(pl.col("shown") == "cosine").sort("p")
        lines(above, ends, "p", colours)
        above.axhline(0, color=AXIS, linewidth=0.8)
        logarithmic(above, "x", ticks=thinned(sorted(ends["p"].unique().to_list()), 4))
        above.set_ylim(-0.08, 1.35)
        above.set_yticks([0, 0.25, 0.5, 0.75, 1])
        above.legend(ncols=2, loc="upper right", fontsize=8)
        lines(below, runs.filter(pl.col("shown") == "loss").sort("step"), "step", colours, positive=True)
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
        runs = data.filter((pl.col("dataset") == name) & (pl.col("weights") == weights)).sort("step")
        for panel, shown in zip(axes[2 * index :], ("error_cosine", "accuracy"), strict=False):
            lines(panel, runs.filter(pl.col("shown") == shown), "step", sequence(runs["strength"].n_unique()))
        axes[2 * index + 1].set_ylabel("test accuracy")
    axes[0].legend(title="ridge")
    return figure


# Pictures of the theorems and the remarks, each as a function of what is drawn.


def distances(data: pl.DataFrame) -> Figure:
    """Distances that the weights went against the width, a line a sample size; a row an activation."""
    names = sorted(data["activation"].unique().to_list())
    figure, axes = panels(
        2,
        len(names),
        titles=[title for name in names for title in (f"{name}: output weights", "first layer")],
        xlabels=["width p"],
        ylabels=["max |β_r(t) - β_r(0)|"] * len(names),
        height=2.7,
    )
    for index, name in enumerate(names):
        for panel, shown in zip(axes[2 * index :], ("beta_change", "weight_change"), strict=False):
            runs = data.filter((pl.col("activation") == name) & (pl.col("shown") == shown)).sort("p")
            for colour, (n, each) in zip(sequence(runs["n"].n_unique()), each_of(runs, "n"), strict=True):
                panel.errorbar(each["p"], each["mean"], yerr=each["sd"], color=colour, marker="o", label=f"n = {n}")
            longest = max((each for _, each in each_of(runs, "n")), key=lambda each: each.height)
            law(panel, longest["p"], longest["mean"][0] * (longest["p"][0] / longest["p"]).sqrt(), "∝ 1/√p")
            logarithmic(panel, "both", ticks=None)
        axes[2 * index + 1].set_ylabel("max |w_r(t) - w_r(0)|")
    axes[0].legend()
    return figure


def constant_cosine(data: pl.DataFrame) -> Figure:
    """Final cosines against the width: all strengths and sums with the cutoff, and all schedules."""
    figure, (left, right) = panels(
        2,
        titles=["Ridge until T", "Other schedules, and n > d"],
        xlabels=["width p"],
        ylabels=["cos∠(b, β)"],
        share="row",
    )
    usual = data.filter(pl.col("n") < pl.col("d")).sort("p")
    cutoff = usual.filter(pl.col("schedule") == "cutoff")
    pairs = sorted(cutoff.select("L", "c").unique().rows())
    for colour, (L, c) in zip(COLOURS, pairs, strict=False):
        runs = cutoff.filter((pl.col("L") == L) & (pl.col("c") == c))
        _errors(left, runs.filter(pl.col("norm") == 1), colour, f"L = {L:g}, c = {c:g}")
        larger = runs.filter(pl.col("norm") > 1)
        left.plot(larger["p"], larger["mean"], color=colour, marker="o", fillstyle="none", linestyle=":")
    first = usual.filter((pl.col("L") == pairs[0][0]) & (pl.col("c") == pairs[0][1]) & (pl.col("norm") == 1))
    for colour, (name, runs) in zip(COLOURS, each_of(first, "schedule"), strict=False):
        _errors(right, runs, colour, "constant, no end" if name == "constant" else str(name))
    _errors(right, data.filter(pl.col("n") > pl.col("d")).sort("p"), COLOURS[-1], "cutoff, n > d")
    for panel in (left, right):
        logarithmic(panel, "x")
        panel.set_ylim(0, 1)
        panel.legend(fontsize=8)
    return figure


def _errors(axes: Axes, runs: pl.DataFrame, colour: str, label: str) -> None:
    axes.errorbar(
        runs["p"], runs["mean"], yerr=runs["sd"].fill_null(0), color=colour, marker="o", label=label, capsize=2
    )


def eigenvalues_and_isometry(data: pl.DataFrame) -> Figure:
    """Smallest eigenvalues against n, and the share of isometric draws against the constant of the dimension."""
    figure, (left, right) = panels(2, titles=["Proposition 3.3", "Proposition 4.5"], height=3.2)
    left.set(xlabel="sample size n", ylabel="λ_min(Ḡ)")
    smallest = data.filter(pl.col("shown") == "smallest")
    for colour, (name, runs) in zip(COLOURS, each_of(smallest, "activation"), strict=False):
        runs = runs.sort("n")
        left.plot(runs["n"], runs["value"], color=colour, marker="o", label=f"{name}: mean")
        left.plot(runs["n"], runs["low"], color=colour, marker="v", linestyle=":", label=f"{name}: least")
        left.axhline(runs["limit"][0], color=colour, linewidth=1, linestyle="--")
    logarithmic(left, "x", ticks=sorted(smallest["n"].unique().to_list()))
    logarithmic(left, "y")
    left.legend(fontsize=8)
    right.set(xlabel="constant C", ylabel="share of draws")
    isometric = data.filter(pl.col("shown") == "isometric").sort("constant")
    pairs = sorted(isometric.select("n", "epsilon").unique().rows(), key=lambda pair: (-pair[1], pair[0]))
    for colour, (n, epsilon) in zip(COLOURS, pairs, strict=False):
        runs = isometric.filter((pl.col("n") == n) & (pl.col("epsilon") == epsilon))
        right.plot(runs["constant"], runs["value"], color=colour, marker="o", label=f"n = {n}, ε = {epsilon:g}")
    logarithmic(right, "x", ticks=sorted(isometric["constant"].unique().to_list()))
    right.legend(fontsize=8)
    return figure


def dropout_by_width(data: pl.DataFrame) -> Figure:
    """Final cosines against the width, with and without dropout."""
    figure, (axes,) = panels(1, xlabels=["width p"], ylabels=["cos∠(b, β)"], width=5.5, height=3.2)
    for colour, (share, runs) in zip(COLOURS, each_of(data, "dropout"), strict=False):
        _errors(axes, runs.sort("p"), colour, f"dropout {share:g}" if share else "no dropout")
    axes.axhline(0, color=AXIS, linewidth=0.8)
    logarithmic(axes, "x", ticks=thinned(sorted(data["p"].unique().to_list()), 8))
    axes.legend()
    return figure


def readings(data: pl.DataFrame) -> Figure:
    """Cosines along training: a column an activation, a row a law of the inputs."""
    laws = {"standard": "N(0, I)", "scaled": "N(0, I/d)"}
    figure, activations = facets(
        data,
        "activation",
        2,
        order=tuple(NAMES),
        titles=[f"{{}}, inputs {law_}" for law_ in laws.values()],
        names=NAMES,
        xlabels=["step"],
        ylabels=["cos∠(b, β)"] * 2,
        share="row",
        height=2.8,
    )
    for name, whole, axes in activations:
        for row, (panel, inputs) in enumerate(zip(axes, laws, strict=True)):
            runs = whole.filter((pl.col("inputs") == inputs) & (pl.col("step") > 0))
            lines(panel, runs.sort("step"), "step", sequence(runs["strength"].n_unique()))
            panel.axvline(STEPS[name], color=AXIS, linewidth=0.8)
            logarithmic(panel, "x")
            if row == 0:
                panel.legend(title="ridge", fontsize=8)
    return figure
