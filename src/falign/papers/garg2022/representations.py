"""Equal errors, representations that are almost orthogonal: ratio and overlap against m at fixed r."""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Setting
from falign.lab.experiment.statistics import around, mean, slope
from falign.lab.report.style import AXIS, COLOURS, MARKERS, Figure, each_of, error_bars, law, logarithmic, panels
from falign.papers.garg2022._shared import groups, matrix, sample_feedback, train
from falign.theory.factorisation import best_error, flat_spectrum, optimal_rows, overlap, stationary_error

__all__ = ["REPRESENTATIONS"]


def _points(sizes: Sequence[int], tried: Sequence[int], *, r: int, steps: int) -> tuple[Point, ...]:
    """Closed forms for every m, trainings for some."""
    return tuple(
        {"data": data, "m": m, "r": r, "found": source, "rate": 0.3, "steps": steps if source == "trained" else 0}
        for data in ("flat", "gaussian")
        for source, those in (("closed form", sizes), ("trained", tried))
        for m in those
    )


_SCALE = 0.02
"""Of the entries of gradient descent's start."""


def _run(
    *, seeds: Sequence[int], setting: Setting, data: str, m: int, r: int, found: str, rate: float, steps: int
) -> list[Outcome]:
    """Errors and representations of the draws of a block together, found in closed form or by training."""
    whole = flat_spectrum(m, r) if data == "flat" else matrix(data, m, m, setting)
    Y = (whole / torch.linalg.matrix_norm(whole, 2)).to(setting.device)
    B = sample_feedback(seeds, Y, r)
    if found == "trained":
        ratio, shared = _trained(seeds, Y, B, setting, rate=rate, steps=steps)
    else:
        ratio = stationary_error(Y, B) / best_error(Y, r)
        shared = overlap(B @ Y, optimal_rows(Y, r).expand(len(B), r, m))
    columns = {"ratio": ratio.tolist(), "overlap": shared.tolist()}
    return [Outcome(records={name: [values[run]] for name, values in columns.items()}) for run in range(len(seeds))]


def _trained(
    seeds: Sequence[int],
    Y: Float[Tensor, "m m"],
    B: Float[Tensor, "runs r m"],
    setting: Setting,
    *,
    rate: float,
    steps: int,
) -> tuple[Float[Tensor, " runs"], Float[Tensor, " runs"]]:
    """FA from zero, gradient descent from a random start; at the end of both."""
    # Gradient descent never leaves the zero start.
    fa = train(seeds, Y, B, method="fa", scale=0.0, rate=rate, at=[steps], names=["error"])
    setting.report(0.5)
    gd = train(seeds, Y, B, method="gd", scale=_SCALE, rate=rate, at=[steps], names=["error"])
    setting.report(1.0)
    return (fa.values["error"] / gd.values["error"])[:, 0], overlap(fa.end.W, gd.end.W)


_CLOSED = pl.col("found") == "closed form"
_EQUAL, _ORTHOGONAL = 1.05, 0.1
_WITHIN = 0.01


def _orthogonal(table: pl.DataFrame) -> Evidence:
    widest = table.filter(pl.col("m") == pl.col("m").max())
    kinds = list(groups(widest, ["data", "m", "r"]))
    checks = []
    for label, runs in kinds:
        for name, words, high in (("ratio", "ratio of errors", _EQUAL), ("overlap", "overlap", _ORTHOGONAL)):
            estimate = mean(runs[name], of=f"{label}: {words}")
            half = estimate.half(2 * len(kinds))
            checks.append(Check(label=f"{label}: {words}", measured=estimate.value, high=high - half))
    return Evidence(checks=tuple(checks), note=f"{table['seed'].n_unique()} draws")


def _falls(table: pl.DataFrame) -> Evidence:
    logs = table.select("seed", pl.col("m").log(), pl.col("overlap").log())
    return around([("exponent of m", slope(logs, "m", "overlap"))], -1, 0.1)


def _agree(table: pl.DataFrame) -> Evidence:
    """Most difference between trained and closed form, draw by draw."""
    keys = ["data", "m", "r", "seed"]
    closed, trained = (table.filter(kind).select(*keys, "ratio", "overlap") for kind in (_CLOSED, ~_CLOSED))
    both = trained.join(closed, on=keys, suffix="_closed")
    return Evidence(
        checks=tuple(
            Check(
                label=f"{label}: {name}, most",
                measured=float((runs[name] - runs[f"{name}_closed"]).abs().to_numpy().max()),
                high=_WITHIN,
            )
            for label, runs in groups(both, ["data", "m"])
            for name in ("ratio", "overlap")
        )
    )


_CLAIMS = (
    Claim(
        name="almost-orthogonal",
        statement="The representations found by gradient descent and FA can be almost orthogonal even when their "
        "errors are approximately equal.",
        reference="Abstract; its matrices and its measure are not readable",
        quotation="the representations found by gradient descent and FA can be almost orthogonal even when their "
        "error ‖ZW-Y‖_F is approximately equal",
        headline="error of FA over gradient descent’s",
        method="Mean ratio of the errors and mean overlap |P_FA P_GD|²/r of the row spaces of W, at the largest m; 1 "
        "is the same representation, r/m what two at random have.",
        tolerance_reason=f"At most {_EQUAL:g} and {_ORTHOGONAL:g}, by half the 99 % interval over the draws (Student's "
        "t, all together).",
        read=_orthogonal,
        scope=_CLOSED,
    ),
    Claim(
        name="overlap-vanishes",
        statement="On a nearly flat spectrum the overlap is that of a random subspace: it vanishes as r/m.",
        origin="theory",
        reference="Derived: BY is nearly as random as B",
        headline="exponent of m in the overlap of representations",
        method="Slope of log overlap against log m, one a draw.",
        tolerance_reason="-1 ± 0.1, and half the 99 % interval over the draws (Student's t) on top.",
        read=_falls,
        scope=_CLOSED & (pl.col("data") == "flat"),
    ),
    Claim(
        name="trained-representations",
        statement="Trained networks have these errors and these representations.",
        origin="theory",
        reference="Derived",
        method="Difference of ratio and overlap between training and closed form, draw by draw; the most.",
        tolerance_reason=f"At most {_WITHIN:g}: gradient descent tells close singular values apart slowly.",
        read=_agree,
    ),
)


def _ratio_and_overlap(data: pl.DataFrame) -> Figure:
    """Ratio of errors on the left, overlap on the right."""
    figure, (left, right) = panels(
        2, titles=["FA's error / gradient descent's", "Overlap of representations"], xlabels=["size m"], height=3.4
    )
    sizes = sorted(data["m"].unique().to_list())
    for colour, marker, (name, whole) in zip(COLOURS, MARKERS, each_of(data, "data"), strict=False):
        for source, runs in each_of(whole, "found"):
            trained = source == "trained"
            for panel, value in ((left, "ratio"), (right, "overlap")):
                middle, sd = runs[f"{value}_mean"], runs[f"{value}_sd"]
                panel.errorbar(
                    runs["m"],
                    middle,
                    yerr=None if trained else error_bars(middle, sd),
                    color=colour,
                    marker=marker,
                    markersize=9 if trained else 4.5,
                    fillstyle="none" if trained else "full",
                    linestyle="none" if trained else "-",
                    linewidth=1.4,
                    elinewidth=0.9,
                    label=f"{name}, trained" if trained else name,
                )
    left.axhline(1, color=AXIS, linewidth=0.8)
    law(right, sizes, [data["r"][0] / m for m in sizes], "r/m")
    least = float(data["overlap_mean"].to_numpy().min())
    logarithmic(right, "y", ticks=[at for at in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if at > least / 2])
    for panel in (left, right):
        logarithmic(panel, "x", ticks=sizes)
    left.legend()
    right.legend()
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["data", "found", "r", "m"]
    values = [
        expression.alias(f"{name}_{word}")
        for name in ("ratio", "overlap")
        for word, expression in (("mean", pl.col(name).mean()), ("sd", pl.col(name).std()))
    ]
    return table.group_by(keys).agg(*values).sort(keys)


REPRESENTATIONS = Experiment(
    name="garg2022.representations",
    title="Almost orthogonal representations at equal error",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        "smoke": _points((10, 20, 40), (20,), r=2, steps=1000),
        "quick": _points((25, 50, 100, 200, 400), (25, 50), r=5, steps=3000),
        "paper": _points((25, 50, 100, 200, 400, 800), (50, 100, 400), r=5, steps=50000),
    },
    seeds={"smoke": 3, "quick": 10, "paper": 100},
    run=_run,
    agreement=1e-11,
    memory=lambda *, seeds, m: 8 * 6 * (len(seeds) + 1) * m**2,
    cost=lambda *, m, steps: float(m**2 * (1 + steps / 100)),
    pictures=(
        Picture(
            name="representations",
            caption="FA's error over that of gradient descent, and the overlap |P_FA P_GD|²/r of their "
            "representations, the row spaces of W, against the size of Y, m × m; mean ± standard deviation over the "
            "draws of B. Flat: singular values 1.1 (r of them) and 1. Filled: closed forms; open: trained. Dashed: "
            "r/m, two subspaces at random.",
            data=_picture_data,
            draw=_ratio_and_overlap,
        ),
    ),
    claims=_CLAIMS,
)
