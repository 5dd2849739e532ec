"""The picture of the kernels: how they shrink and stay with the width, and how the error keeps to its prediction."""

import polars as pl
from matplotlib.figure import Figure

from falign.lab.report.style import COLOURS, MARKERS, each_of, law, logarithmic, panels, sequence
from falign.papers.song2021.drawing import NAMES

_SHOWN = {"H_norm": ("|H(0)|", "-"), "G_change": ("max |G(t) - G(0)|", ":")}
"""Column -> its name and its line."""


def kernels_by_width(data: pl.DataFrame) -> Figure:
    """|H(0)| and the largest change of G against the width; how far the error is from its prediction along training."""
    figure, (left, right) = panels(
        2,
        titles=["Kernels against the width", f"{NAMES['tanh']}: error, less its limit"],
        ylabels=["spectral norm / λ_min(Ḡ)"],
        height=3.4,
    )
    left.set_xlabel("width p")
    ends = data.filter(pl.col("shown").is_in(list(_SHOWN))).sort("p")
    for colour, marker, (activation, own) in zip(COLOURS, MARKERS, each_of(ends, "activation"), strict=False):
        for column, (name, style) in _SHOWN.items():
            each = own.filter(pl.col("shown") == column)
            sd = each["sd"].fill_null(0)
            left.errorbar(
                each["p"],
                each["mean"],
                yerr=[pl.select(pl.min_horizontal(sd, 0.9 * each["mean"])).to_series(), sd],
                color=colour,
                marker=marker,
                linestyle=style,
                capsize=2,
                label=f"{NAMES[activation]}: {name}",
            )
    first = ends.filter(pl.col("shown") == "H_norm").group_by("p").agg(pl.col("mean").max()).sort("p")
    law(left, first["p"], 1.6 * first["mean"][0] * (first["p"][0] / first["p"]).sqrt(), "∝ 1/√p")
    logarithmic(left, "both")
    left.legend(fontsize=8)
    right.set(xlabel="step", ylabel="|e(t) - e∞(t)| / |y|")
    along = data.filter((pl.col("shown") == "discrepancy") & (pl.col("step") > 0)).sort("step")
    for colour, (p, own) in zip(sequence(along["p"].n_unique()), each_of(along, "p"), strict=True):
        for strength, style in zip(sorted(own["strength"].unique().to_list()), ("-", ":"), strict=False):
            each = own.filter(pl.col("strength") == strength)
            label = f"p = {p}" if strength == 0 else None
            right.plot(each["step"], each["mean"], color=colour, linestyle=style, label=label)
    logarithmic(right, "both")
    right.legend(fontsize=8, ncols=2)
    return figure
