"""Identities that hold to rounding whatever a run does: no claims of a report, but asserted of every run here."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import polars as pl
import pytest

from falign.lab.experiment._results import Results


class Identity(NamedTuple):
    """An identity, and columns that break it.

    Attributes:
        experiment: Whose records it is about.
        scope: The records for which it holds.
        residual: What is left of it at a record.
        most: By how much it may be missed.
        broken: Columns with which it does not hold.
    """

    experiment: str
    scope: pl.Expr
    residual: pl.Expr
    most: float
    broken: Mapping[str, pl.Expr]


FINITE_STEPS = (pl.col("share") < 1) & (pl.col("diverged") < 0)
ALIGNMENT_RUN = ["data", "method", "scale", "rate", "seed"]
GAIN = (pl.col("weighted").shift(-1) - pl.col("weighted")).over(ALIGNMENT_RUN, order_by="step")
IDENTITIES = {
    # K_l(t) - K_l(0) + ½Σ(Δθ_l)² = 0: in steps each invariant falls by half the squares
    "invariants of steps": Identity(
        "girotti2021.steps", FINITE_STEPS, pl.col("account_left"), 1e-12, {"account_left": pl.lit(1e-9)}
    ),
    # e⁺ = e(1 - ηρ̂)
    "recursion of the error": Identity(
        "girotti2021.steps", FINITE_STEPS, pl.col("recursion_left"), 1e-12, {"recursion_left": pl.lit(1e-9)}
    ),
    # what falign trains is the dynamics that the theory is about
    "networks are the matrix dynamics": Identity(
        "girotti2021.networks", pl.lit(True), pl.col("apart"), 1e-9, {"apart": pl.lit(1e-6)}
    ),
    # at most as many points as inputs stand for all data; mode -1 is the whole loss
    "compressed data are the data": Identity(
        "girotti2021.prediction",
        (pl.col("activation") == "linear") & (pl.col("mode") == -1),
        pl.col("exact") / pl.col("trained") - 1,
        1e-9,
        {"exact": 1.001 * pl.col("trained")},
    ),
    # C(t) - C(0) = η² Σ BR(BR)ᵀ with C = WWᵀ - BZ - (BZ)ᵀ
    "invariant of the factorisation": Identity(
        "garg2022.alignment", pl.col("method") == "fa", pl.col("account"), 1e-10, {"account": pl.lit(1e-9)}
    ),
    # a step of FA* gains tr(BZWWᵀ) = tr(BYWᵀ) exactly η|BR|²; the last record has no next one
    "gain of alignment": Identity(
        "garg2022.alignment",
        (pl.col("method") == "fa*") & (pl.col("step") < pl.col("steps")),
        GAIN - pl.col("rate") * pl.col("lyapunov"),
        1e-10,
        {"weighted": pl.lit(0.0)},
    ),
    # on inputs that are isotropic on the training points a step of the network is one of the factorisation
    "networks are the factorisation": Identity(
        "garg2022.networks",
        pl.col("inputs") != "fresh",
        pl.col("error") - pl.col("predicted"),
        1e-10,
        {"predicted": pl.col("error") + 1e-6},
    ),
    # each neuron conserves C but for what the discrete identity accounts for
    "conservation law in steps": Identity(
        "robertson2024.conservation",
        pl.col("law").is_in(["exact", "accounted"]),
        pl.col("residual"),
        1e-10,
        {"residual": pl.lit(1e-9)},
    ),
}
CASES = [
    pytest.param(each, id=name, marks=pytest.mark.xdist_group(each.experiment.partition(".")[0]))
    for name, each in IDENTITIES.items()
]


def largest(identity: Identity, table: pl.DataFrame) -> float:
    residuals = table.with_columns(left=identity.residual.abs()).filter(identity.scope)["left"].drop_nulls()
    assert len(residuals) > 0
    return float(residuals.to_numpy().max())


@pytest.mark.parametrize("identity", CASES)
def test_an_identity_holds_to_rounding_in_every_run(
    identity: Identity, smoke: Callable[[str], Mapping[str, Results]]
) -> None:
    results = smoke(identity.experiment.partition(".")[0])[identity.experiment]
    assert results.count("done") == results.runs.height
    assert largest(identity, results.table) <= identity.most
    assert largest(identity, results.table.with_columns(**identity.broken)) > identity.most
