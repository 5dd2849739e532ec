"""Picture of training on wrong labels."""

import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from falign.lab.report.style import AXIS, band, each_of, panels
from falign.papers.robertson2024.drawing import LOOKS


def errors_and_norms(data: pl.DataFrame) -> Figure:
    """Training error, test error and squared norm of the weights by epoch; a row a data set."""
    sets = each_of(data, "dataset")
    figure, axes = panels(
        3,
        len(sets),
        titles=[title for name, _ in sets for title in (f"{name}: training error", "Test error", "Weights")],
        xlabels=["epoch"],
        ylabels=["share of labels not given"] * len(sets),
        height=3.0,
    )
    noise = float(data["noise"].to_numpy().max())
    for row, (_, own) in enumerate(sets):
        for panel, shown in zip(axes[3 * row :], ("train_error", "test_error", "norm"), strict=False):
            for rule, runs in each_of(own.filter(pl.col("shown") == shown), "rule", tuple(LOOKS)):
                clean = runs.filter(pl.col("noise") == 0).sort("epoch")
                panel.plot(clean["epoch"], clean["mean"], color=LOOKS[rule].colour, linestyle=":", linewidth=1.4)
                noisy = runs.filter(pl.col("noise") > 0).sort("epoch")
                spread = noisy["sd"].fill_null(0)
                low, high = noisy["mean"] - spread, noisy["mean"] + spread
                band(panel, noisy["epoch"], noisy["mean"], low, high, label=rule, colour=LOOKS[rule].colour)
            if shown != "norm":
                panel.axhline(noise, color=AXIS, linewidth=0.9, linestyle="--")
                panel.set_ylim(0, 2 * noise)
        axes[3 * row + 2].set_ylabel("Σ|W|²")
    handles, labels = axes[0].get_legend_handles_labels()
    handles += [
        Line2D([], [], color=AXIS, linewidth=1.7),
        Line2D([], [], color=AXIS, linestyle=":", linewidth=1.4),
        Line2D([], [], color=AXIS, linestyle="--", linewidth=0.9),
    ]
    labels += [f"{noise:.0%} of the labels wrong", "all labels right", "share of wrong labels"]
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure
