"""Propositions 3.3 and 4.5: Gaussian inputs meet what the theorems ask of them."""

from collections.abc import Sequence
from math import log, sqrt

import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import share_at_least, sorted_groups
from falign.papers.song2021._drawing import eigenvalues_and_isometry
from falign.papers.song2021._shared import DELTA
from falign.theory.two_layer import activation as named_activation
from falign.theory.two_layer._start import inputs_of
from falign.theory.two_layer.kernels import hermite_coefficients, limiting_kernel
from falign.theory.two_layer.theorems import is_isometric

__all__ = ["INPUTS"]

_RATIO = 2.0
"""d/n for proposition 3.3."""


def _unit(n: int, epsilon: float) -> float:
    """``(1/ε) log(n/δ) + (n/ε) log(1/ε)``: the dimension of proposition 4.5 but for its constant."""
    return log(n / DELTA) / epsilon + n / epsilon * log(1 / epsilon)


def _points(sizes: Sequence[int], isometric: Sequence[int], constants: Sequence[float]) -> tuple[Point, ...]:
    smallest = [
        point
        for n in sizes
        for point in grid(
            proposition="3.3", activation=("tanh", "sigmoid"), n=n, d=round(_RATIO * n), epsilon=0.0, constant=0.0
        )
    ]
    pairs = [*((n, 0.4) for n in isometric), *((isometric[0], epsilon) for epsilon in (0.2, 0.1))]
    return (
        *smallest,
        *(
            point
            for n, epsilon in pairs
            for c in constants
            for point in grid(
                proposition="4.5", activation="none", n=n, d=round(c * _unit(n, epsilon)), epsilon=epsilon, constant=c
            )
        ),
    )


def _run(
    *, seed: int, setting: Setting, proposition: str, activation: str, n: int, d: int, epsilon: float, constant: float
) -> Outcome:
    """Draw inputs and measure of them what a proposition is about."""
    X = inputs_of(seed, n, d, "scaled")
    if proposition == "4.5":
        return Outcome(records={"isometric": [float(is_isometric(X, 1 - epsilon, 4 * epsilon))]})
    psi = named_activation(activation)
    smallest = float(torch.linalg.eigvalsh(limiting_kernel(X, psi))[0])
    return Outcome(records={"smallest": [smallest], "limit": [_limit(psi.name, _RATIO)]})


def _memory(*, n: Sequence[int], d: Sequence[int]) -> int:
    """Bytes of the largest draw: its inputs thrice, its kernel and its terms; draws are made one after the other."""
    return max(8 * rows * (3 * columns + 6 * rows + 4096) for rows, columns in zip(n, d, strict=True))


def _limit(name: str, ratio: float) -> float:
    """``λ_min(Ḡ) → a_1² (1 - √(n/d))² + Σ_{k≥2} a_k²`` for n → ∞, a_k the Hermite coefficients of ψ."""
    squares = hermite_coefficients(named_activation(name).value, torch.ones(1), 192)[0].square()
    return float(squares[2:].sum()) + float(squares[1]) * max(0.0, 1 - sqrt(1 / ratio)) ** 2


def _away(table: pl.DataFrame) -> Evidence:
    runs = table.filter(pl.col("proposition") == "3.3")
    checks: list[Check] = []
    for (name, n), rows in sorted_groups(runs, ["activation", "n"]):
        checks.append(
            Check(
                label=f"{name}, n = {n}, d = {rows['d'][0]}: least λ_min(Ḡ) of {rows.height} draws",
                measured=float(rows["smallest"].to_numpy().min()),
                low=rows["limit"][0] / 2,
            )
        )
    return Evidence(checks=tuple(checks))


def _frequency(table: pl.DataFrame) -> pl.DataFrame:
    runs = table.filter(pl.col("proposition") == "4.5")
    keys = ["n", "epsilon", "constant", "d"]
    return runs.group_by(keys).agg(pl.col("isometric").mean().alias("frequency"), runs=pl.len()).sort(keys)


def _enough(frequencies: pl.DataFrame, n: int, epsilon: float) -> float:
    """The smallest constant from which on the frequency is at least 1 - δ."""
    runs = frequencies.filter((pl.col("n") == n) & (pl.col("epsilon") == epsilon))
    # By chance a smaller constant may do where a larger one does not: it has to be enough from there on.
    short = runs.filter(pl.col("frequency") < 1 - DELTA)["constant"].to_list()
    enough = [c for c in runs["constant"].to_list() if c > max(short, default=0.0)]
    if not enough:
        raise Missing(f"n = {n}, ε = {epsilon:g}: the isometry is too rare at every constant that was tried")
    return min(enough)


def _serves(table: pl.DataFrame, axis: str) -> Evidence:
    frequencies = _frequency(table)
    n, epsilon = int(frequencies["n"].to_numpy().min()), float(frequencies["epsilon"].to_numpy().max())
    enough = _enough(frequencies, n, epsilon)
    fixed = pl.col("epsilon") == epsilon if axis == "n" else pl.col("n") == n
    others = frequencies.filter(fixed & (pl.col("constant") == enough)).sort(axis)
    others = others.filter((pl.col("n") != n) | (pl.col("epsilon") != epsilon))
    shares = [
        (
            f"n = {row['n']}, ε = {row['epsilon']:g}, d = {row['d']}: share of {row['runs']} draws",
            row["frequency"],
            row["runs"],
        )
        for row in others.to_dicts()
    ]
    note = f"with the constant {enough:g}, which is enough for n = {n}, ε = {epsilon:g}"
    return share_at_least(shares, 1 - DELTA, note=note)


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    smallest = table.filter(pl.col("proposition") == "3.3")
    least = smallest.group_by("activation", "n").agg(
        value=pl.col("smallest").mean(), low=pl.col("smallest").min(), limit=pl.col("limit").first()
    )
    parts = [
        least.with_columns(shown=pl.lit("smallest")).sort("activation", "n"),
        _frequency(table).rename({"frequency": "value"}).with_columns(shown=pl.lit("isometric")),
    ]
    return pl.concat(parts, how="diagonal")


INPUTS = Experiment(
    name="song2021.inputs",
    title="What Gaussian inputs are like",
    source="Song, Xu and Lafferty 2021, propositions 3.3 and 4.5",
    revision=1,
    grid={
        "smoke": _points((10, 20), (5, 10), (1.0, 4.0, 16.0, 64.0)),
        "quick": _points((20, 40, 80, 160), (10, 20, 40), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)),
        "paper": _points((20, 40, 80, 160, 320), (10, 20, 40, 80), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)),
    },
    seeds={"smoke": 5, "quick": 20, "paper": 200},
    run=_run,
    together=("proposition", "activation", "n", "d", "epsilon", "constant"),
    memory=_memory,
    pictures=(
        Picture(
            name="inputs",
            caption="Left: smallest eigenvalue of Ḡ, mean and least of the draws, and its limit (dashed). Right: share "
            "of draws that are (1-ε, 4ε)-isometric, against the constant in d = C((1/ε) log(n/δ) + (n/ε) log(1/ε)).",
            data=_picture_data,
            draw=eigenvalues_and_isometry,
        ),
    ),
    claims=(
        Claim(
            name="proposition-3-3",
            statement="For x_i ~ N(0, I_d/d), ψ sigmoid or tanh and d = Ω(n), λ_min(Ḡ) ≥ γ > 0 with high probability.",
            reference="Proposition 3.3",
            quotation="If d = Ω(n), then Assumption 3.1 holds with high probability.",
            method=f"Least λ_min(Ḡ) of all draws at each n, d = {_RATIO:g}n.",
            tolerance_reason="At least half of the limit for n → ∞, derived here from the Hermite coefficients of ψ; "
            "any positive number that does not depend on n would do.",
            read=_away,
            scope=pl.col("proposition") == "3.3",
        ),
        Claim(
            name="proposition-4-5-n",
            statement="d = Ω((1/ε) log(n/δ) + (n/ε) log(1/ε)) makes X (1-ε, 4ε)-isometric with probability 1 - δ: as n "
            "grows.",
            reference="Proposition 4.5",
            quotation="then X is (1-ε,4ε)-isometric with probability 1-δ",
            method="The least constant that is enough for the smallest n, tried at the larger ones; ε = 0.4.",
            tolerance_reason="The least share of so many draws that does not contradict 0.9 at 99 % (binomial law).",
            read=lambda table: _serves(table, "n"),
            scope=pl.col("proposition") == "4.5",
        ),
        Claim(
            name="proposition-4-5-epsilon",
            statement="d = Ω((1/ε) log(n/δ) + (n/ε) log(1/ε)) makes X (1-ε, 4ε)-isometric with probability 1 - δ: as ε "
            "falls.",
            reference="Proposition 4.5",
            quotation="then X is (1-ε,4ε)-isometric with probability 1-δ",
            method="The least constant that is enough for ε = 0.4, tried at smaller ε.",
            tolerance_reason="As for proposition-4-5-n. For n = 1 the only eigenvalue is χ²_d/d, of variance 2/d, so "
            "that d must grow as 1/ε², faster than the printed condition: one constant cannot serve every ε.",
            read=lambda table: _serves(table, "epsilon"),
            scope=pl.col("proposition") == "4.5",
        ),
    ),
)
