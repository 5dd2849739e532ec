"""What is stated of discrete dynamics, and how it is judged."""

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.lab.experiment.statistics import final

_RUN = ["scheme", "depth", "target", "share"]
_LEARNED = 1e-4
UNIVERSAL = 0.769
"""η_max ρ*/2 of two layers from zero weights, for every component."""
_SLOW = 0.1
"""Shares of η_max up to which the first order in η is looked at."""


def _groups(runs: pl.DataFrame, by: list[str]) -> list[tuple[tuple, pl.DataFrame]]:
    return [(values, own) for values, own in runs.sort(by).group_by(by, maintain_order=True)]


def _missing(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run, at its end: what is missing of the component."""
    return final(table, by=_RUN).with_columns(missing=(1 - pl.col("learned")).abs())


def _converges(table: pl.DataFrame) -> Reading:
    return Reading(
        checks=tuple(
            Check(
                label=f"{scheme}, {depth} layers, η = {share:g} η_max: most of {own.height}",
                measured=float(own["missing"].to_numpy().max()),
                high=_LEARNED,
            )
            for (scheme, depth, share), own in _groups(_missing(table), ["scheme", "depth", "share"])
        )
    )


def _fails_to_converge(table: pl.DataFrame) -> Reading:
    ends = _missing(table).with_columns(still=pl.when(pl.col("diverged") >= 0).then(1.0).otherwise(pl.col("missing")))
    return Reading(
        checks=tuple(
            Check(
                label=f"{depth} layers, η = {share:g} η_max: least of {own.height}",
                measured=float(own["still"].to_numpy().min()),
                low=_LEARNED,
            )
            for (depth, share), own in _groups(ends, ["depth", "share"])
        ),
        note=f"{int((ends['diverged'] >= 0).sum())} of {ends.height} left the finite numbers, which counts as 1",
    )


def _universal(table: pl.DataFrame) -> Reading:
    runs = final(table, by=_RUN).with_columns(half=pl.col("settling") / pl.col("share") / 2)
    return Reading(
        checks=tuple(
            Check(
                label=f"λ = {target:g}",
                measured=float(own["half"].to_numpy().mean()),
                low=UNIVERSAL - 1e-3,
                high=UNIVERSAL + 1e-3,
            )
            for (target,), own in _groups(runs, ["target"])
        )
    )


def _first_order(table: pl.DataFrame) -> Reading:
    slow = table.filter(pl.col("share") <= _SLOW)
    far = slow.with_columns(far=(pl.col("learned") - pl.col("flow")).abs())
    most = far.group_by(_RUN).agg(pl.col("far").max())
    checks = []
    for (scheme, depth, target), own in _groups(most, ["scheme", "depth", "target"]):
        if own.height < 2:
            raise Missing(f"a slope needs two step sizes up to {_SLOW:g} η_max, got {own.height}")
        found = float(np.polyfit(own["share"].log().to_numpy(), own["far"].log().to_numpy(), 1)[0])
        checks.append(
            Check(label=f"{scheme}, {depth} layers, λ = {target:g}: exponent of η", measured=found, low=0.8, high=1.2)
        )
    return Reading(checks=tuple(checks))


def _drifts(table: pl.DataFrame) -> Reading:
    """Slope of the logarithm of the drift of K against log η, and whether it ever rose."""
    ends = final(table, by=_RUN)
    checks = []
    for (scheme, depth, target), own in _groups(ends, ["scheme", "depth", "target"]):
        found = float(np.polyfit(own["share"].log().to_numpy(), (-own["drift"]).log().to_numpy(), 1)[0])
        checks.append(
            Check(label=f"{scheme}, {depth} layers, λ = {target:g}: exponent of η", measured=found, low=0.8, high=1.2)
        )
    return Reading(checks=tuple(checks))


def _exact(table: pl.DataFrame) -> Reading:
    runs = table.filter(pl.col("diverged") < 0)
    return Reading(
        checks=tuple(
            Check(label=label, measured=float(runs[column].drop_nulls().to_numpy().max()), high=1e-12)
            for label, column in (("K_l(t) - K_l(0) + ½Σ(Δθ_l)²", "account_left"), ("e⁺ - e(1 - ηρ̂)", "recursion_left"))
        ),
        note="runs that stayed finite",
    )


_BELOW = pl.col("share") < 1
_ABSTRACT = "Abstract: convergence guarantees “for both continuous and discrete dynamics”; "

CLAIMS = (
    Claim(
        name="steps-converge",
        statement="In steps every component converges, from every start tried, if the step size is below the largest "
        "stable one.",
        place=_ABSTRACT + "the bound on the step size is not readable, η_max is ours",
        how="What is missing of the component, |1 - θ_L…θ_1/λ|, at the end; the most.",
        because=f"At most {_LEARNED:g}.",
        read=_converges,
        scope=_BELOW,
    ),
    Claim(
        name="steps-diverge",
        statement="Beyond that step size they do not converge: η_max is sharp.",
        place="Derived",
        how="What is missing of the component at the end, from zero weights; the least.",
        because=f"More than {_LEARNED:g}.",
        read=_fails_to_converge,
        scope=~_BELOW & (pl.col("scheme") == "zero"),
    ),
    Claim(
        name="step-universal",
        statement="From zero weights η_max is 0.769 × 2/ρ*, whatever the component: the largest one limits the step "
        "size.",
        place="Derived: by scaling; the number is measured",
        how="η_max ρ*/2.",
        because="± 0.001.",
        read=_universal,
        scope=_BELOW & (pl.col("scheme") == "zero") & (pl.col("depth") == 2),
    ),
    Claim(
        name="steps-follow-the-flow",
        statement="Steps follow the flow, to first order in their size.",
        place=_ABSTRACT + "the order is Euler's",
        how="Slope of the logarithm of the largest distance from the flow against log η, for η ≤ 0.1 η_max.",
        because="1 ± 0.2, the next order.",
        read=_first_order,
        scope=pl.col("share") <= _SLOW,
    ),
    Claim(
        name="invariant-drifts",
        statement="K = θ_2 - θ_1²/(2m) only falls, by an amount of first order in η: the flow conserves it.",
        place="Derived",
        how="Slope of the logarithm of K_1(0) - K_1(t) at the end against log η, for η ≤ 0.1 η_max.",
        because="1 ± 0.2, the next order. A rise would have no logarithm.",
        read=_drifts,
        scope=pl.col("share") <= _SLOW,
    ),
    Claim(
        name="steps-exact",
        statement="In steps K_l falls by exactly ½(Δθ_l)² each (of two layers K by ½mη²e²), and the error is "
        "multiplied by exactly 1 - ηρ̂ (of two layers 1 - ηρ - η²mθ_1e).",
        place="Derived",
        how="The most that is left of either identity over all steps, relative to the sizes of what is in it.",
        because="At most 1e-12: rounding.",
        read=_exact,
        scope=_BELOW,
    ),
)
