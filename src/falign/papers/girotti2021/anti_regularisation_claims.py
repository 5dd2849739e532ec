"""What is stated of implicit anti-regularisation, and how it is judged."""

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.theory.deep_linear import critical_target

CRITICAL = float(critical_target(-0.5, 1.0))
"""λ_c for θ_1 = -1, θ_2 = 0 and m = 1, which is 1/(3√3)."""
_RATES = {0.2: 0.880, 0.5: 0.674, 0.9: 0.279, 0.99: 0.084}
"""λ/λ_c -> ρ*."""
_BELOW = pl.col("target") < CRITICAL
_TABLE = pl.any_horizontal(*((pl.col("target") / CRITICAL - share).abs() < 1e-6 for share in _RATES))
_SIDES = pl.col("target").is_in([0.19, 0.195])
_TINY = float(np.finfo(float).tiny)


def _falls(table: pl.DataFrame) -> Reading:
    own = table.sort("target")
    steps = own["fitted"].diff().drop_nulls().to_numpy()
    times = own["learned"].diff().drop_nulls().to_numpy()
    return Reading(
        checks=(
            Check(label=f"least fall of the rate in {len(steps)} steps", measured=float(-steps.max()), low=_TINY),
            Check(label=f"least rise of the time in {len(times)} steps", measured=float(times.min()), low=_TINY),
        )
    )


def _values(table: pl.DataFrame) -> Reading:
    checks = []
    for row in table.sort("target").to_dicts():
        share = min(_RATES, key=lambda each: abs(row["target"] / CRITICAL - each))
        near = {"low": _RATES[share] - 5e-4, "high": _RATES[share] + 5e-4}
        checks.append(Check(label=f"λ = {share:g} λ_c: closed form", measured=row["rate"], **near))
        checks.append(Check(label="fitted over closed form", measured=row["fitted"] / row["rate"], low=0.99, high=1.01))
    return Reading(checks=tuple(checks))


def _sides(table: pl.DataFrame) -> Reading:
    checks = []
    for row in table.sort("target").to_dicts():
        sign = {"high": -_TINY} if row["target"] < CRITICAL else {"low": _TINY}
        checks.append(Check(label=f"λ = {row['target']:g}: θ_1 at the end", measured=row["hidden"], **sign))
    return Reading(checks=tuple(checks), note=f"λ_c = {CRITICAL:.5f}")


def _vanishes(table: pl.DataFrame) -> Reading:
    """ρ*² is a straight line in λ next to λ_c: where the one through the two largest components crosses zero."""
    near = table.sort("target").tail(2)
    (first, last), (low, high) = near["target"].to_list(), near["fitted"].pow(2).to_list()
    crossing = last + (last - first) * high / (low - high)
    return Reading(checks=(Check(label="zero of ρ*²", measured=crossing, low=CRITICAL - 1e-3, high=CRITICAL + 1e-3),))


CLAIMS = (
    Claim(
        name="slower-with-size",
        statement="Negligible components are learned before the principal ones: the larger the component below λ_c, "
        "the slower it is learned.",
        place="Abstract: “implicit anti-regularization”; that θ_1 = -c, θ_2 = 0 shows it is derived",
        how="Rate fitted to the flow, and time to 90 %, from each component below λ_c to the next.",
        because="Every step has its sign.",
        read=_falls,
        scope=_BELOW,
    ),
    Claim(
        name="rates",
        statement="The rates are ρ* = mK + 3/2 θ_1*², at 0.2, 0.5, 0.9 and 0.99 λ_c: 0.880, 0.674, 0.279, 0.084.",
        place="Derived",
        how="The closed form; and the slope of ln|e| of the flow over it.",
        because="Three digits; 1 ± 0.01 for the fit, to errors between 1e-4 and 1e-8 of the component.",
        read=_values,
        scope=_TABLE,
    ),
    Claim(
        name="critical-size",
        statement="λ_c = c³/(3√3m) = 0.19245 parts them: for λ = 0.19 the hidden weight ends negative, for 0.195 "
        "positive.",
        place="Derived",
        how="θ_1 at the end of the flow.",
        because="Its sign.",
        read=_sides,
        scope=_SIDES,
    ),
    Claim(
        name="rate-vanishes",
        statement="The rate falls to zero at λ_c, as the square root of the distance.",
        place="Derived: a stable and an unstable point meet",
        how="Zero of the straight line through ρ*² of the two largest components below λ_c, fitted to the flow.",
        because="λ_c ± 0.001, the next order.",
        read=_vanishes,
        scope=_BELOW,
    ),
)
