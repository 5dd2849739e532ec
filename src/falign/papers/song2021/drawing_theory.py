"""Pictures of the theorems and the remarks, each as a function of what is drawn."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, COLOURS, each_of, law, logarithmic, panels, sequence, thinned
from falign.papers.song2021.drawing import NAMES, lines
from falign.papers.song2021.sizes import STEPS


def distances(data: pl.DataFrame) -> Figure:
    """How far the weights went against the width, a line a sample size; a row an activation."""
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
            own = data.filter((pl.col("activation") == name) & (pl.col("shown") == shown)).sort("p")
            for colour, (n, each) in zip(sequence(own["n"].n_unique()), each_of(own, "n"), strict=True):
                panel.errorbar(each["p"], each["mean"], yerr=each["sd"], color=colour, marker="o", label=f"n = {n}")
            longest = max((each for _, each in each_of(own, "n")), key=lambda each: each.height)
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
        own = cutoff.filter((pl.col("L") == L) & (pl.col("c") == c))
        _errors(left, own.filter(pl.col("norm") == 1), colour, f"L = {L:g}, c = {c:g}")
        larger = own.filter(pl.col("norm") > 1)
        left.plot(larger["p"], larger["mean"], color=colour, marker="o", fillstyle="none", linestyle=":")
    first = usual.filter((pl.col("L") == pairs[0][0]) & (pl.col("c") == pairs[0][1]) & (pl.col("norm") == 1))
    for colour, (name, own) in zip(COLOURS, each_of(first, "schedule"), strict=False):
        _errors(right, own, colour, "constant, no end" if name == "constant" else str(name))
    _errors(right, data.filter(pl.col("n") > pl.col("d")).sort("p"), COLOURS[-1], "cutoff, n > d")
    for panel in (left, right):
        logarithmic(panel, "x")
        panel.set_ylim(0, 1)
        panel.legend(fontsize=8)
    return figure


def _errors(axes: Axes, own: pl.DataFrame, colour: str, label: str) -> None:
    axes.errorbar(own["p"], own["mean"], yerr=own["sd"].fill_null(0), color=colour, marker="o", label=label, capsize=2)


def eigenvalues_and_isometry(data: pl.DataFrame) -> Figure:
    """Smallest eigenvalues against n, and the share of isometric draws against the constant of the dimension."""
    figure, (left, right) = panels(2, titles=["Proposition 3.3", "Proposition 4.5"], height=3.2)
    left.set(xlabel="sample size n", ylabel="λ_min(Ḡ)")
    smallest = data.filter(pl.col("shown") == "smallest")
    for colour, (name, own) in zip(COLOURS, each_of(smallest, "activation"), strict=False):
        own = own.sort("n")
        left.plot(own["n"], own["value"], color=colour, marker="o", label=f"{name}: mean")
        left.plot(own["n"], own["low"], color=colour, marker="v", linestyle=":", label=f"{name}: least")
        left.axhline(own["limit"][0], color=colour, linewidth=1, linestyle="--")
    logarithmic(left, "x", ticks=sorted(smallest["n"].unique().to_list()))
    logarithmic(left, "y")
    left.legend(fontsize=8)
    right.set(xlabel="constant C", ylabel="share of draws")
    isometric = data.filter(pl.col("shown") == "isometric").sort("constant")
    pairs = sorted(isometric.select("n", "epsilon").unique().rows(), key=lambda pair: (-pair[1], pair[0]))
    for colour, (n, epsilon) in zip(COLOURS, pairs, strict=False):
        own = isometric.filter((pl.col("n") == n) & (pl.col("epsilon") == epsilon))
        right.plot(own["constant"], own["value"], color=colour, marker="o", label=f"n = {n}, ε = {epsilon:g}")
    logarithmic(right, "x", ticks=sorted(isometric["constant"].unique().to_list()))
    right.legend(fontsize=8)
    return figure


def dropout_by_width(data: pl.DataFrame) -> Figure:
    """Final cosines against the width, with and without dropout."""
    figure, (axes,) = panels(1, xlabels=["width p"], ylabels=["cos∠(b, β)"], width=5.5, height=3.2)
    for colour, (share, own) in zip(COLOURS, each_of(data, "dropout"), strict=False):
        _errors(axes, own.sort("p"), colour, f"dropout {share:g}" if share else "no dropout")
    axes.axhline(0, color=AXIS, linewidth=0.8)
    logarithmic(axes, "x", ticks=thinned(sorted(data["p"].unique().to_list()), 8))
    axes.legend()
    return figure


def readings(data: pl.DataFrame) -> Figure:
    """Cosines along training: a column an activation, a row a law of the inputs."""
    names = [name for name in NAMES if name in data["activation"]]
    laws = {"standard": "N(0, I)", "scaled": "N(0, I/d)"}
    figure, axes = panels(
        len(names),
        2,
        titles=[f"{NAMES[name]}, inputs {law_}" for law_ in laws.values() for name in names],
        xlabels=["step"],
        ylabels=["cos∠(b, β)"] * 2,
        share="row",
        height=2.8,
    )
    for row, inputs in enumerate(laws):
        for column, name in enumerate(names):
            panel = axes[row * len(names) + column]
            own = data.filter((pl.col("activation") == name) & (pl.col("inputs") == inputs) & (pl.col("step") > 0))
            lines(panel, own.sort("step"), "step", sequence(own["strength"].n_unique()))
            panel.axvline(STEPS[name], color=AXIS, linewidth=0.8)
            logarithmic(panel, "x")
            if row == 0:
                panel.legend(title="ridge", fontsize=8)
    return figure
