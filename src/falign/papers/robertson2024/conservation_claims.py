"""What is stated of the conservation law, and how it is judged."""

from math import inf

import polars as pl

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.lab.experiment.statistics import mean, slope

MOMENTUM = 0.9
_POINT = ["dataset", "case", "rule", "model", "rate"]
_KIND = _POINT[:-1]
_TOLERANCE = 1e-10
_NEAR = 5.0
"""Degrees from the diagonal that count as on it."""
_KEPT = (pl.col("case") == "plain") & (pl.col("rule") != "adafa")


def off_diagonal(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run, at its end.

    ``apart``: ``Σ_k |C_k(T) - C_k(0)|`` over the neurons of all layers. ``degrees``: the angle between the diagonal and
    the layers' changes, ``arctan(Σ|x - y| / Σ(|x| + |y|))`` with x that of ½|W|² + ½|b|² and y that of ⟨B, W⟩.
    """
    last = table.filter(pl.col("step") == pl.col("steps"))
    difference = pl.col("incoming_change") - pl.col("outgoing_change")
    sizes = pl.col("incoming_change").abs() + pl.col("outgoing_change").abs()
    return (
        last.group_by([*_POINT, "seed"])
        .agg(
            apart=pl.col("apart").sum(),
            degrees=(difference.abs().sum() / sizes.sum()).arctan().degrees(),
            incoming=pl.col("incoming").sum(),
            value=pl.col("value").sum(),
            negative=pl.col("negative").mean(),
            residual=pl.col("residual").max(),
        )
        .sort([*_POINT, "seed"])
    )


def _named(values: tuple) -> str:
    """Such as "digits, plain, fa, pooled"."""
    return ", ".join(str(value).rpartition("networks:")[2] for value in values)


def _kinds(runs: pl.DataFrame, by: list[str]) -> list[tuple[str, pl.DataFrame]]:
    return [(_named(values), own) for values, own in runs.sort(by).group_by(by, maintain_order=True)]


def _identity(table: pl.DataFrame) -> Reading:
    lawful = table.filter(pl.col("law").is_in(["exact", "accounted"]))
    if lawful.is_empty():
        raise Missing("no layer is under a law that is exact or accounted for")
    checks = (
        Check(
            label=f"{label}: most of {own.select('layer', 'rate', 'seed').n_unique()} layers and runs",
            measured=float(own["residual"].to_numpy().max()),
            high=_TOLERANCE,
        )
        for label, own in _kinds(lawful, _KIND)
    )
    return Reading(checks=tuple(checks))


def _exponents(table: pl.DataFrame, low: float, high: float) -> Reading:
    """Slope of log drift against log η: within the bounds by half its interval, or around 1 with it on top."""
    logs = off_diagonal(table).with_columns(pl.col("rate").log(), pl.col("apart").log())
    kinds = _kinds(logs, _KIND)
    checks = []
    for label, own in kinds:
        found = slope(own, "rate", "apart")
        half = found.half(len(kinds)) * (1 if low < 1 < high < inf else -1)
        checks.append(Check(label=f"{label}: exponent of η", measured=found.value, low=low - half, high=high + half))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a point")


def _near(table: pl.DataFrame) -> Reading:
    runs = off_diagonal(table)
    kinds = _kinds(runs.filter(pl.col("rate") == pl.col("rate").min().over(_KIND)), _POINT)
    checks = []
    for label, own in kinds:
        found = mean(own["degrees"], of=label)
        checks.append(Check(label=f"{label}: degrees", measured=found.value, high=_NEAR - found.half(len(kinds))))
    return Reading(checks=tuple(checks))


def _momentum(table: pl.DataFrame) -> Reading:
    runs = off_diagonal(table)
    keys = ["dataset", "rule", "model", "rate", "seed"]
    plain = runs.filter(pl.col("case") == "plain").select(*keys, than="apart")
    both = runs.filter(pl.col("case") == "momentum").join(plain, on=keys)
    both = both.with_columns(ratio=pl.col("apart") / pl.col("than"))
    kinds, most = _kinds(both, _POINT), (1 + MOMENTUM) / (1 - MOMENTUM)
    checks = []
    for label, own in kinds:
        found = mean(own["ratio"], of=label)
        half = found.above(len(kinds))
        checks.append(Check(label=f"{label}: times, less 1", measured=found.value - 1, low=half, high=most - 1 - half))
    return Reading(checks=tuple(checks))


def _rests(table: pl.DataFrame) -> Reading:
    runs = off_diagonal(table).with_columns(ratio=(pl.col("incoming") - pl.col("value")) / (2 * pl.col("incoming")))
    kinds = _kinds(runs, _POINT)
    checks = []
    for label, own in kinds:
        found = mean(own["ratio"], of=label)
        width = 0.1 + found.half(len(kinds))
        checks.append(Check(label=label, measured=found.value, low=1 - width, high=1 + width))
    return Reading(checks=tuple(checks), note=f"C < 0 for {runs['negative'].to_numpy().mean():.0%} of the neurons")


_LAW = (
    "Abstract: “a novel conservation law linking changes in synaptic weights to implicit regularization that maintains "
    "alignment”, “with support from experiments”. "
)
_DRIFT = (
    "Slope of log Σ|C(T) - C(0)|, over the neurons of all layers, against log η for trainings of the same length in "
    "η × steps; one a seed. "
)
_HALF = "Half the 99 % interval over the seeds (Student's t, all together) on top."
_BY_HALF = " by half the 99 % interval over the seeds (Student's t, all together)"

CLAIMS = (
    Claim(
        name="conserved-to-rounding",
        statement="Each neuron conserves C = ½|w_in|² + ½b² - ⟨B, w_out⟩ but for what is known: the squares of the "
        "steps, decay, the feedback's own motion, the ε of batch normalization.",
        place=_LAW + "The discrete identity, and the forms for other rules and layers, are derived",
        how="Largest relative residual of all neurons, in float64: C(T) - C(0) less what the identity accounts for.",
        because="At most 1e-10: rounding.",
        read=_identity,
    ),
    Claim(
        name="on-the-diagonal",
        statement="Under plain descent the change of ½|W_l|² + ½|b_l|² of a layer is that of ⟨B, W_l+1⟩.",
        place=_LAW + "Its layerwise form; the paper's figure is not readable",
        how="Angle between the diagonal and the point that both changes make, sizes summed over the layers, at the "
        "smallest rate.",
        because=f"Below {_NEAR:g}°" + _BY_HALF + ": ½Ση²|g|², which is of first order in η, is left.",
        read=_near,
        scope=_KEPT,
    ),
    Claim(
        name="on-the-diagonal-adafa",
        statement="Under plain descent the change of ½|W_l|² + ½|b_l|² is that of ⟨B, W_l+1⟩ for adaFA as well.",
        place="A summary of the paper names adaFA among the rules that converge; that it is the tracking "
        "B ← (1-α)B + αW is a choice",
        how="As for on-the-diagonal, adafa.",
        because="As for on-the-diagonal. For moving feedback Ċ = -⟨Ḃ, W⟩, so that there is no reason why it should be.",
        read=_near,
        scope=(pl.col("case") == "plain") & (pl.col("rule") == "adafa"),
    ),
    Claim(
        name="drift-of-first-order",
        statement="The law is that of gradient flow: what plain descent drifts from it is of first order in η.",
        place="Derived: the drift is ½Ση²|g|²",
        how=_DRIFT + "Feedback alignment.",
        because="1 ± 0.1. " + _HALF,
        read=lambda table: _exponents(table, 0.9, 1.1),
        scope=_KEPT & (pl.col("rule") == "fa"),
    ),
    Claim(
        name="drift-of-other-rules",
        statement="The drift vanishes with η for sign feedback, Kolen-Pollack and batch normalization as well.",
        place="Derived: sign feedback drifts at changes of sign besides, Kolen-Pollack by a difference of squares",
        how=_DRIFT,
        because="Above ½, halfway between first order and none," + _BY_HALF + ".",
        read=lambda table: _exponents(table, 0.5, inf),
        scope=(_KEPT & (pl.col("rule") != "fa")) | (pl.col("case") == "batch norm"),
    ),
    Claim(
        name="momentum-drifts-more",
        statement="Momentum drifts more than plain descent at the same effective rate η/(1-μ), up to (1+μ)/(1-μ) "
        "times.",
        place="Derived: (1+μ)/(1-μ) times for gradients that change slowly, once for those that are noise",
        how="Drift over that of plain descent, paired by seed: the same weights and batches.",
        because=f"Between 1 and {(1 + MOMENTUM) / (1 - MOMENTUM):.0f}," + _BY_HALF + ".",
        read=_momentum,
        scope=pl.col("case").is_in(["plain", "momentum"]) & (pl.col("rule") == "fa"),
    ),
    Claim(
        name="momentum-vanishes",
        statement="With momentum the law still holds in the limit of small steps.",
        place="Derived",
        how=_DRIFT,
        because="Above ½" + _BY_HALF + ".",
        read=lambda table: _exponents(table, 0.5, inf),
        scope=pl.col("case") == "momentum",
    ),
    Claim(
        name="broken-at-any-rate",
        statement="With Adam, tanh, and around a shortcut the law does not hold, however small the steps.",
        place="Derived",
        how=_DRIFT,
        because="Below ½" + _BY_HALF + ".",
        read=lambda table: _exponents(table, -inf, 0.5),
        scope=pl.col("case").is_in(["Adam", "tanh", "residual"]),
    ),
    Claim(
        name="decay-aligns",
        statement="Weight decay drives ⟨B, w_out⟩ to |w_in|² + b²: in the end it aligns every neuron that is alive.",
        place="Derived: at rest 0 = λ(⟨B, w_out⟩ - |w_in|² - b²)",
        how="Σ⟨B, w_out⟩ over Σ(|w_in|² + b²) of all hidden neurons at the end of a training with decay.",
        because="1 ± 0.1, for the noise of the batches and what is left of the start. " + _HALF,
        read=_rests,
        scope=pl.col("case") == "equilibrium",
    ),
)
