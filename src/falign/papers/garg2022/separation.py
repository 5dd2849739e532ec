"""Matrices on which FA is far from optimal, over thousands of draws of the feedback."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Setting
from falign.lab.experiment.statistics import CONFIDENCE, around, share_at_least, slope
from falign.lab.report.style import Figure, each_of, law, logarithmic, panels, sequence
from falign.papers.garg2022._shared import groups, largest_in_groups, train
from falign.theory import factorisation
from falign.theory.factorisation import (
    RatioLaw,
    best_error,
    flat_tail,
    flat_tail_error,
    last_direction,
    stationary_error,
)

__all__ = ["SEPARATION"]


def _points(
    ranks: Sequence[int], tails: Sequence[tuple[int, int, float]], *, draws: int, trained: int, steps: int
) -> tuple[Point, ...]:
    """diag(1, …, 1, ε) for every r, and r ones with a flat tail of N values that hold a share of |Y|².

    The ratio on these hardly varies, so that a quarter of the draws does.
    """
    same = {"trained": trained, "rate": 0.2, "steps": steps}
    return (
        *({"r": r, "tail": 1, "epsilon": 1e-3, "share": 0.0, "draws": draws, **same} for r in ranks),
        *({"r": r, "tail": N, "epsilon": 0.0, "share": share, "draws": draws // 4, **same} for r, N, share in tails),
    )


_SCALE = 0.02
"""Of the entries of gradient descent's start."""
_AT_ONCE = 50
"""Draws whose errors are computed at once."""


def _run(
    *,
    seed: int,
    setting: Setting,
    r: int,
    tail: int,
    epsilon: float,
    share: float,
    draws: int,
    trained: int,
    rate: float,
    steps: int,
) -> Outcome:
    """Many draws of B, a record a draw; some of them are trained as well."""
    Y = (last_direction(r, epsilon) if tail == 1 else flat_tail(r, tail, share)).to(setting.device)
    seeds = [seed * draws + index for index in range(draws)]
    B, best = factorisation.feedback(len(Y), r, seeds=seeds).to(Y), float(best_error(Y, r))
    errors: dict[str, list[float]] = {
        "ratio": torch.cat([stationary_error(Y, part) for part in B.split(_AT_ONCE)]).tolist(),
        "estimate": [],
        "fa": _trained("fa", Y, B[:trained], seeds[:trained], rate, steps),
        "gd": _trained("gd", Y, B[:trained], seeds[:trained], rate, steps) if tail == 1 else [],
    }
    if tail > 1:
        energy = float(Y.diagonal()[r:].square().sum())
        errors["estimate"] = flat_tail_error(B[:, :, :r] * len(Y) ** 0.5, energy).tolist()
    columns = {name: [value / best for value in values] for name, values in errors.items()}
    gaps = {name: [*values, *[None] * (draws - len(values))] for name, values in columns.items()}
    return Outcome(records={"draw": list(range(draws)), **gaps})


def _trained(
    method: str, Y: Float[Tensor, "n n"], B: Float[Tensor, "runs r n"], seeds: Sequence[int], rate: float, steps: int
) -> list[float]:
    """Errors at the end of a training: FA from zero; gradient descent from a random start, a quarter as long."""
    scale, last = (0.0, steps) if method == "fa" else (_SCALE, steps // 4)
    trajectory = train(seeds, Y, B, method=method, scale=scale, rate=rate, at=[last], names=["error"])
    return trajectory.values["error"][:, 0].tolist()


_LAST = pl.col("tail") == 1
"""The instance diag(1, …, 1, ε)."""
_LEAST_R = 5
"""From where on the median ratio² is of the order of r."""


def _far(table: pl.DataFrame) -> Evidence:
    """Share of the draws with ``ratio² ≥ 1/(1/(δ(r+1)) + ε²)``, which Markov's inequality promises with 1 - δ."""
    checks: list[Check] = []
    for label, draws in groups(table, ["r"]):
        r, epsilon = int(draws["r"][0]), float(draws["epsilon"][0])
        for delta in (0.5, 0.1):
            least = (1 / (delta * (r + 1)) + epsilon**2) ** -0.5
            if least <= 1:  # which every ratio reaches
                continue
            share = float((draws["ratio"] >= least).to_numpy().mean())
            name = f"{label}: share of {draws.height} draws with a ratio of at least {least:.3g}"
            checks += share_at_least([(name, share, draws.height)], 1 - delta).checks
    return Evidence(checks=tuple(checks))


def _law(table: pl.DataFrame) -> Evidence:
    """Largest distance between the distribution of ratio² and its law (Kolmogorov and Smirnov)."""
    kinds = list(groups(table, ["r"]))
    checks = []
    for label, runs in kinds:
        law, squares = RatioLaw(r=int(runs["r"][0]), epsilon=float(runs["epsilon"][0])), runs["ratio"].to_numpy() ** 2
        low, middle, high = law.quantile([0.1, 0.5, 0.9])
        distance = scipy.stats.kstest(squares, law.cdf).statistic
        limit = scipy.stats.kstwo.ppf(1 - (1 - CONFIDENCE) / len(kinds), len(squares))
        name = f"{label}: distance of distributions (10, 50, 90 %: {low:.3g}, {middle:.3g}, {high:.4g})"
        checks.append(Check(label=name, measured=float(distance), high=float(limit)))
    return Evidence(checks=tuple(checks))


def _grows(table: pl.DataFrame) -> Evidence:
    medians = table.filter(pl.col("r") >= _LEAST_R).group_by("r", "seed").agg(square=pl.col("ratio").median() ** 2)
    logs = medians.select("seed", pl.col("r").log(), pl.col("square").log())
    return around([("exponent of r", slope(logs, "r", "square"))], 1, 0.1)


def _reached(table: pl.DataFrame) -> Evidence:
    fa = largest_in_groups(
        table.drop_nulls("fa"), (pl.col("fa") / pl.col("ratio") - 1).abs(), ["tail", "r", "share"], 0.01
    )
    gd = largest_in_groups(table.drop_nulls("gd"), (pl.col("gd") - 1).abs(), ["tail", "r", "share"], 0.01)
    named = [
        Check(label=f"{method}, {check.label}", measured=check.measured, high=check.high)
        for method, evidence in (("fa", fa), ("gd", gd))
        for check in evidence.checks
    ]
    return Evidence(checks=tuple(named))


def _tails(table: pl.DataFrame) -> Evidence:
    checks = []
    for label, runs in groups(table, ["r", "tail", "share"]):
        squares = runs["ratio"] ** 2
        name = f"{label}: median of error² over its estimate (error²/optimum²: median {squares.median():.3g})"
        measured = float(((runs["ratio"] / runs["estimate"]) ** 2).median())  # pyright: ignore[reportArgumentType]
        checks.append(Check(label=name, measured=measured, low=0.9, high=1.1))
    return Evidence(checks=tuple(checks))


_CLAIMS = (
    Claim(
        name="separation",
        statement="FA can be far from optimal when r < rank(Y), a provable separation from gradient descent: on "
        "diag(1, …, 1, ε) it is √(δ(r+1)) times worse with probability 1 - δ, for small ε.",
        reference="Abstract, “the first provable separation result between gradient descent and FA”; its instance is "
        "not readable, this one and its bound are derived: E c² = 1/(r+1), and Markov's inequality",
        quotation="This is the first provable separation result between gradient descent and FA.",
        headline="share of draws in which FA is far from optimal",
        method="Share of the draws of B with error/optimum ≥ (1/(δ(r+1)) + ε²)^(-1/2), δ = 0.5 and 0.1.",
        tolerance_reason="The least share of so many draws that does not contradict 1 - δ at 99 % (binomial law).",
        read=_far,
        scope=_LAST,
    ),
    Claim(
        name="law-of-the-ratio",
        statement="On diag(1, …, 1, ε) ratio² = 1/(c² + ε²(1 - c²)) with c² ~ Beta(½, r/2): its tail is heavy.",
        origin="theory",
        reference="Derived: FA leaves out the one direction that B does not see, of which c is the last coordinate",
        method="Largest distance between the distribution of the draws and the law.",
        tolerance_reason="At most what so many draws of the law exceed in 1 % of the cases (Kolmogorov and Smirnov; "
        "all r together, Bonferroni).",
        read=_law,
        scope=_LAST,
    ),
    Claim(
        name="worse-with-r",
        statement="The typical ratio² of errors grows in proportion to r.",
        origin="theory",
        reference="Derived",
        method=f"Slope of log median ratio² against log r, r ≥ {_LEAST_R}; one a seed.",
        tolerance_reason="1 ± 0.1, and half the 99 % interval over the seeds (Student's t) on top.",
        read=_grows,
        scope=_LAST,
    ),
    Claim(
        name="trained-errors",
        statement="Training gets there: FA to the error of its closed form, gradient descent to the optimum.",
        origin="theory",
        reference="Derived; of gradient descent in the abstract",
        method="Largest relative deviation of the errors at the end of trainings.",
        tolerance_reason="At most 1 %: directions that B hardly sees are learned slowly.",
        read=_reached,
    ),
    Claim(
        name="far-in-every-draw",
        statement="With r ones and a long flat tail FA is far from optimal, without luck or misfortune: its error² is "
        "about τ + Σ τ/(s_i² + τ), τ the tail's energy, s_i the singular values of a square Gaussian matrix.",
        origin="theory",
        reference="Derived",
        method="Median over the draws of error² over this estimate.",
        tolerance_reason="1 ± 0.1: the estimate is for infinitely long tails.",
        read=_tails,
        scope=~_LAST,
    ),
)


def _ratios(data: pl.DataFrame) -> Figure:
    """Share of the draws below a ratio: one cheap direction on the left, a flat tail on the right."""
    figure, (left, right) = panels(
        2,
        titles=["One cheap direction", "Flat tail"],
        xlabels=["FA's error / optimum"],
        ylabels=["share of draws below"],
        height=3.4,
    )
    last = each_of(data.filter(pl.col("tail") == 1), "r")
    for colour, (index, (r, runs)) in zip(sequence(len(last)), enumerate(last), strict=True):
        left.plot(runs["ratio"], runs["quantile"], color=colour, label=f"r = {r}", linewidth=2.4, alpha=0.75)
        at = np.linspace(0.002, 0.998, 400)
        exact = RatioLaw(r=int(r), epsilon=float(runs["epsilon"][0])).quantile(at) ** 0.5
        law(left, exact, at, "" if index else "law")
    logarithmic(left, "x")
    kinds = list(data.filter(pl.col("tail") > 1).group_by(["r", "tail", "share"], maintain_order=True))
    for colour, (index, ((r, tail, share), runs)) in zip(sequence(len(kinds)), enumerate(kinds), strict=True):
        label = f"r = {r}, tail {tail}, {100 * share:g} % of |Y|²"
        right.plot(runs["ratio"], runs["quantile"], color=colour, label=label, linewidth=2.4, alpha=0.75)
        law(right, sorted(runs["estimate"]), runs["quantile"], "" if index else "estimate")
    for panel, columns in ((left, 3), (right, 2)):
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)
    return figure


_SHOWN = 200
"""Quantiles that a distribution is drawn with."""


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Evenly spaced quantiles of the ratio of each instance, over all seeds."""
    keys = ["tail", "r", "share", "epsilon"]
    ordered = table.sort([*keys, "ratio"]).with_columns(
        quantile=(pl.int_range(pl.len()).over(keys) + 0.5) / pl.len().over(keys)
    )
    kept = (pl.int_range(pl.len()).over(keys) % pl.max_horizontal(pl.len().over(keys) // _SHOWN, 1)) == 0
    return ordered.filter(kept).select(*keys, "quantile", "ratio", "estimate")


SEPARATION = Experiment(
    name="garg2022.separation",
    title="A separation between FA and gradient descent",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        "smoke": _points((1, 5, 10), ((5, 45, 0.01),), draws=100, trained=2, steps=1000),
        "quick": _points((1, 5, 20, 50), ((5, 95, 0.01), (20, 380, 0.0025)), draws=280, trained=2, steps=4000),
        "paper": _points(
            (1, 2, 5, 10, 20, 50, 100),
            ((5, 95, 0.01), (20, 380, 0.0025), (20, 380, 0.05), (50, 550, 0.0004)),
            draws=2000,
            trained=50,
            steps=50000,
        ),
    },
    seeds={"smoke": 2, "quick": 4, "paper": 20},
    run=_run,
    agreement=1e-12,
    at_most=1,
    cost=lambda *, r, tail, draws: float((r + tail) * draws),
    pictures=(
        Picture(
            name="separation",
            caption="Distribution over draws of B of the ratio of FA's error to the optimum. Left: Y = diag(1, …, 1, "
            "ε) with r ones, ε = 0.001; dashed the law, ratio² = 1/(c² + ε²(1 - c²)), c² ~ Beta(½, r/2). Right: r ones "
            "and a long flat tail that holds a share of |Y|²; dashed an estimate for infinitely long tails.",
            data=_picture_data,
            draw=_ratios,
        ),
    ),
    claims=_CLAIMS,
)
