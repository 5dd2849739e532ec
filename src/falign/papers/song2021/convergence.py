"""Theorems 3.2, 4.2 and 4.3: the error falls geometrically, and the weights stay near where they began."""

from collections.abc import Sequence
from math import log

import polars as pl

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import Estimate, slope, summary
from falign.papers.song2021._drawing import distances
from falign.papers.song2021._shared import DELTA, outcome, shares
from falign.theory.two_layer import Penalty, bytes_needed, draw
from falign.theory.two_layer._width_free import sample
from falign.theory.two_layer.theorems import theorem_3_2, theorem_4_2, theorem_4_3

__all__ = ["CONVERGENCE"]

_ACTIVATIONS = ("tanh", "sigmoid")
"""The activations that the paper names for which the theorem's conditions hold."""


def _points(widths: Sequence[int], sizes: Sequence[int], steps: int) -> tuple[Point, ...]:
    """Widths at one sample size, sample sizes at one width, with and without a ridge, and linear networks."""
    base, wide = sizes[len(sizes) // 2], widths[-1]
    pairs = sorted({*((base, p) for p in widths), *((n, wide) for n in sizes)})
    bounded = [
        point
        for n, p in pairs
        for point in grid(activation=_ACTIVATIONS, strength=(0.0, 0.1), n=n, d=2 * n, p=p, rate=0.2, steps=steps)
    ]
    linear = [
        point
        for n, d in ((base, 10 * base), (10 * base, base))
        for point in grid(
            activation="identity", strength=(0.0, 0.1), n=n, d=d, p=1000 * wide, rate=0.1 * min(1.0, d / n), steps=steps
        )
    ]
    return (*bounded, *linear)


def _run(
    *, seed: int, setting: Setting, activation: str, strength: float, n: int, d: int, p: int, rate: float, steps: int
) -> Outcome:
    """Try the theorem that speaks of such a run, with γ of its inputs."""
    penalties = [Penalty(strength, "exponential", 20.0) if strength else Penalty()]
    if activation == "identity":
        gram = sample([seed], n=n, d=d, p=p, inputs="scaled")
        check = theorem_4_3(gram, d=d, rate=rate, steps=steps, penalties=penalties, delta=DELTA, on_column_space=n > d)
        return outcome(check)
    start = draw([seed], n=n, d=d, p=p, activation=activation, inputs="scaled")
    if strength:
        check = theorem_4_2(start, activation=activation, rate=rate, steps=steps, penalties=penalties, delta=DELTA)
    else:
        check = theorem_3_2(start, activation=activation, rate=rate, steps=steps, delta=DELTA)
    return outcome(check)


def _memory(*, activation: str, n: int, d: int, p: int) -> int:
    """Bytes of a block: its runs are computed one after the other, in float64."""
    if activation == "identity":
        return 2 * bytes_needed(engine="width-free", n=n, d=d, p=p)
    return 2 * (8 * p * d + bytes_needed(engine="dual", n=n, d=d, p=p))


def _theorem(name: str) -> pl.Expr:
    linear = pl.col("activation") == "identity"
    return {"3.2": ~linear & (pl.col("strength") == 0), "4.2": ~linear & (pl.col("strength") > 0), "4.3": linear}[name]


def _held(table: pl.DataFrame) -> Evidence:
    return Evidence(
        checks=shares(
            table,
            ["activation", "n", "d", "p", "strength"],
            "{activation}, n = {n}, d = {d}, p = {p}, λ(0) = {strength:g}",
        )
    )


def _distances(table: pl.DataFrame) -> pl.DataFrame:
    """Distances that the weights went, of runs without a ridge: from the constants that they imply."""
    plain = table.filter(_theorem("3.2"))
    root = pl.col("p").sqrt()
    return plain.with_columns(
        beta_change=pl.col("c2") * pl.col("n") / (pl.col("lambda_min") * root),
        weight_change=pl.col("c1") * pl.col("n") * pl.col("p").log().sqrt() / (pl.col("lambda_min") * root),
    )


def _along(table: pl.DataFrame, activation: str, value: str, axis: str) -> Estimate:
    """Exponent of a distance along widths or sample sizes, the other one fixed where there are most points."""
    other = {"p": "n", "n": "p"}[axis]
    runs = table.filter(pl.col("activation") == activation)
    points = runs.group_by(other).agg(points=pl.col(axis).n_unique()).sort("points", other)
    logs = runs.filter(pl.col(other) == points[other][-1]).with_columns(pl.col(axis).log(), pl.col(value).log())
    return slope(logs, axis, value)


def _scaling(table: pl.DataFrame) -> Evidence:
    moved = _distances(table)
    narrow, wide = min(moved["p"]), max(moved["p"])
    # The bound on w_r has √log p beside 1/√p: what its slope is above -½ between the narrowest and the widest.
    logarithm = 0.5 * log(log(wide) / log(narrow)) / log(wide / narrow)
    checks, count = [], 4 * len(_ACTIVATIONS)
    for activation in _ACTIVATIONS:
        for value, name in (("beta_change", "β_r"), ("weight_change", "w_r")):
            in_p = _along(moved, activation, value, "p")
            in_n = _along(moved.with_columns(pl.col(value) * pl.col("lambda_min")), activation, value, "n")
            checks += [
                Check(
                    label=f"{activation}, {name}: exponent of p",
                    measured=in_p.value,
                    high=-0.5 + logarithm + in_p.half(count),
                ),
                Check(label=f"{activation}, {name}: exponent of n", measured=in_n.value, high=1 + in_n.half(count)),
            ]
    return Evidence(checks=tuple(checks))


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    moved = _distances(table)
    return pl.concat(
        [
            summary(moved, value, by=["activation", "n", "p"]).with_columns(shown=pl.lit(value))
            for value in ("beta_change", "weight_change")
        ]
    )


CONVERGENCE = Experiment(
    name="song2021.convergence",
    title="Convergence, and how far the weights go",
    source="Song, Xu and Lafferty 2021, theorems 3.2, 4.2 and 4.3",
    revision=1,
    grid={
        "smoke": _points((100, 400), (3, 6), steps=50),
        "quick": _points((250, 1000, 4000), (5, 10, 20), steps=200),
        "paper": _points((500, 1000, 2000, 4000, 8000, 16000), (5, 10, 20, 40), steps=500),
    },
    seeds={"smoke": 3, "quick": 8, "paper": 50},
    run=_run,
    agreement=1e-7,
    at_most=10,
    memory=_memory,
    pictures=(
        Picture(
            name="distances",
            caption="How far the farthest neuron's weights go from their start, without a ridge: against the width, "
            "one line a sample size n. Both fall as 1/√p.",
            data=_picture_data,
            draw=distances,
        ),
    ),
    claims=(
        Claim(
            name="theorem-3-2",
            statement="|e(t+1)| ≤ (1 - ηγ/4)|e(t)| for all t, with probability at least 1 - δ.",
            reference="Theorem 3.2, equation 3.1",
            quotation="In the overparameterized setting, we prove that the error converges to zero exponentially fast",
            method="Share of runs in which the inequality holds at every step, with γ = λ_min(Ḡ) of the run's inputs, "
            "among those that meet the assumptions.",
            tolerance_reason=f"The least share of so many runs that does not contradict 1 - δ = {1 - DELTA:g} at 99 %, "
            "by the binomial law. The paper's constants C1 and C2 have no value: the widths are what they are.",
            read=_held,
            scope=_theorem("3.2"),
        ),
        Claim(
            name="theorem-3-2-parameters",
            statement="|w_r(t) - w_r(0)| ≤ c1 n√(log p)/(γ√p) and |β_r(t) - β_r(0)| ≤ c2 n/(γ√p).",
            reference="Theorem 3.2, equation 3.2",
            quotation="in the over-parameterized regime … the weights only change by a small amount",
            method="Slope of the logarithm of the farthest neuron's distance against log p, one a seed; against log n, "
            "the distance multiplied by γ.",
            tolerance_reason="The bound's exponents are -½ in p and 1 in n. The farthest of p neurons goes √log p "
            "farther than a typical one, a factor that the bound has for w_r and for β_r hides in c2: the slope that "
            "it has between these widths is allowed, and half the 99 % interval over the seeds. A bound: less agrees "
            "with it.",
            read=_scaling,
            scope=_theorem("3.2"),
        ),
        Claim(
            name="theorem-4-2",
            statement="With a summable ridge |e(t+1)| ≤ (1 - ηγ/4 - ηλ(t))|e(t)| + λ(t)|y|.",
            reference="Theorem 4.2, equation 4.2",
            quotation="convergence is preserved with regularization, for general activation functions",
            method="As for theorem 3.2, with λ(t) = 0.1 exp(-t/20).",
            tolerance_reason="As for theorem 3.2; c̃_S has no value.",
            read=_held,
            scope=_theorem("4.2"),
        ),
        Claim(
            name="theorem-4-3",
            statement="For linear networks |e(t+1)| ≤ (1 - ηγ/2 - ηλ(t))|e(t)| + λ(t)|y|; for n > d on the column "
            "space of X.",
            reference="Theorem 4.3, equation 4.3, and “large sample scenario”",
            quotation="we first provide a linear version of Theorem 4.2 that adopts slightly different conditions",
            method="As for theorem 3.2, with γ the smallest (for n > d: the smallest non-zero) eigenvalue of XXᵀ.",
            tolerance_reason="As for theorem 3.2; c_S has no value.",
            read=_held,
            scope=_theorem("4.3"),
        ),
    ),
)
