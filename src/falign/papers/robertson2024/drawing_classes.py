"""Pictures of accuracy and alignment against the number of classes."""

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from falign.lab.report.style import AXIS, INK, each_of, legend, logarithmic, panels, thinned
from falign.papers.robertson2024.drawing import LOOKS, points


def by_classes(data: pl.DataFrame) -> Figure:
    """Test accuracy, cosine and their correlation against the number of classes; a row a data set."""
    sets = each_of(data, "dataset")
    figure, axes = panels(
        3,
        len(sets),
        titles=[title for name, _ in sets for title in (f"{name}: test accuracy", "Alignment", "Correlation of both")],
        xlabels=["classes"],
        ylabels=["test accuracy"] * len(sets),
        height=3.0,
    )
    for row, (_, own) in enumerate(sets):
        left, middle, right = axes[3 * row : 3 * row + 3]
        for panel, shown in ((left, "accuracy"), (middle, "cosine")):
            for rule, runs in each_of(own.filter(pl.col("shown") == shown), "rule", tuple(LOOKS)):
                points(panel, runs.sort("classes"), "classes", str(rule))
        middle.set_ylabel("cos∠(taken, true gradient)")
        _correlation(right, own.filter(pl.col("shown") == "correlation").sort("classes"))
        counts = sorted(own["classes"].unique().to_list())
        for panel in (left, middle, right):
            logarithmic(panel, "x", ticks=thinned(counts, 6))
            panel.set_xlim(counts[0] * 0.9, counts[-1] * 1.1)
    legend(figure, columns=9)
    return figure


def _correlation(panel: Axes, data: pl.DataFrame) -> None:
    panel.axhline(0, color=AXIS, linewidth=0.8)
    for shift, (words, own) in zip((1.0, 1.04), each_of(data, "of"), strict=False):
        hollow = words != "all rules"
        panel.errorbar(
            own["classes"] * shift,
            own["mean"],
            yerr=[own["mean"] - own["low"], own["high"] - own["mean"]],
            color=AXIS if hollow else INK,
            marker="o",
            fillstyle="none" if hollow else "full",
            linestyle="none",
            label=str(words),
        )
    panel.set_ylim(-1.05, 1.05)
    panel.set_ylabel("Pearson's r over the rules")


def by_alignment(data: pl.DataFrame) -> Figure:
    """Test accuracy against cosine at the largest number of classes, the dial as a line; a panel a data set."""
    sets = each_of(data, "dataset")
    figure, axes = panels(
        len(sets),
        titles=[f"{name}, {own['classes'][0]} classes" for name, own in sets],
        xlabels=["cos∠(taken, true gradient)"],
        ylabels=["test accuracy"],
        width=max(5.5, 3.2 * len(sets)),
        height=3.4,
    )
    for panel, (_, own) in zip(axes, sets, strict=True):
        turned = own.filter(pl.col("alpha").is_not_null()).sort("alpha")
        panel.plot(turned["cosine"], turned["accuracy"], color=AXIS, linewidth=1.2, label="the dial α", zorder=1)
        for row in own.sort(pl.col("rule").replace_strict({rule: k for k, rule in enumerate(LOOKS)})).to_dicts():
            colour, marker = LOOKS[row["rule"]]
            panel.errorbar(
                row["cosine"],
                row["accuracy"],
                xerr=row["cosine_sd"] or 0,
                yerr=row["accuracy_sd"] or 0,
                color=colour,
                marker=marker,
                markersize=5,
                elinewidth=0.9,
                linestyle="none",
                label=row["rule"],
            )
        for row in turned.filter(pl.col("rule") == "adafa").to_dicts():
            panel.annotate(
                f"{row['alpha']:g}",
                (row["cosine"], row["accuracy"]),
                xytext=(4, -11),
                textcoords="offset points",
                fontsize=8,
                color=LOOKS["adafa"].colour,
            )
    legend(figure, columns=4)
    return figure
