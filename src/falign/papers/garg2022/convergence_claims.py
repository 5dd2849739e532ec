"""What is stated of r ≥ rank(Y), and how it is judged."""

import polars as pl

from falign.lab.experiment import Check, Claim, Missing, Reading
from falign.lab.experiment.statistics import final, mean, slope
from falign.papers.garg2022.groups import groups, most

LONG = pl.col("fine") == 1
"""The runs that are to converge; the others are short, beside the flow."""
_ZERO = pl.col("scale") == 0
_METHOD = pl.col("method")
_KIND = ["data", "method", "scale", "r"]
_REACHED, _NEAR = 1e-6, 0.01


def _ends(table: pl.DataFrame, high: float) -> Reading:
    ends = final(table, by=_KIND)
    note = f"{table['seed'].n_unique()} draws a point, of all of them the median is {ends['error'].median():.1g}"
    return most(ends, pl.col("error"), _KIND, high, note)


def first_below(table: pl.DataFrame, error: float) -> pl.DataFrame:
    """The first recorded step of each run at which the error is at most so much; null where it never is."""
    keys = [*_KIND, "seed"]
    return table.group_by(keys).agg(step=pl.col("step").filter(pl.col("error") <= error).min()).sort(keys)


def _slower(table: pl.DataFrame) -> Reading:
    keys = ["data", "r", "seed"]
    steps = first_below(table, _NEAR)
    if steps["step"].has_nulls():
        raise Missing(f"{steps['step'].null_count()} runs did not come to an error of {_NEAR:g} in their steps")
    fa, gd = (steps.filter(method=method).select(*keys, "step") for method in ("fa", "gd"))
    both = fa.join(gd, on=keys, suffix="_gd").with_columns(ratio=pl.col("step") / pl.col("step_gd"))
    kinds = list(groups(both, ["data", "r"]))
    checks = []
    for label, own in kinds:
        found = mean(own["ratio"].log(), of=label)
        checks.append(
            Check(
                label=f"{label}: log of the ratio (median {own['ratio'].median():.3g})",
                measured=found.value,
                low=found.above(len(kinds)),
            )
        )
    return Reading(checks=tuple(checks))


def _order(table: pl.DataFrame) -> Reading:
    """Slope of the logarithm of the largest gap to the flow against that of the step size."""
    keys = [*_KIND, "seed", "step"]
    flow = table.filter(pl.col("fine") == 0).select(*keys, limit="error")
    both = table.filter(pl.col("fine") > 0).join(flow, on=keys)
    gap = (pl.col("error") - pl.col("limit")).abs().max().log()
    gaps = both.group_by([*_KIND, "seed", "fine"]).agg(gap=gap).with_columns(rate=-pl.col("fine").log())
    kinds = list(groups(gaps, ["data", "method", "scale"]))
    checks = []
    for label, own in kinds:
        found = slope(own, "rate", "gap")
        width = 0.1 + found.half(len(kinds))
        checks.append(Check(label=f"{label}: exponent of η", measured=found.value, low=1 - width, high=1 + width))
    return Reading(checks=tuple(checks))


_HOW = "|ZW - Y|/|Y| at the end of a run; the most of all draws of B and of the start."
_SLOW = (
    f"At most {_NEAR:g}, which stands for 0: convergence is exponential, but for unlucky draws so slow that the length "
    "of the runs decides how small the error gets. "
)

CLAIMS = (
    Claim(
        name="fa-reaches-the-optimum",
        statement="FA converges to the optimal solution when r ≥ rank(Y).",
        place="Abstract. Its initialisation is not readable: taken is the zero start, from which this can be derived",
        how=_HOW,
        because=f"At most {_REACHED:g}, which stands for 0.",
        read=lambda table: _ends(table, _REACHED),
        scope=LONG & (_METHOD == "fa") & _ZERO,
    ),
    Claim(
        name="fa-reaches-it-from-random-starts",
        statement="FA converges to the optimal solution when r ≥ rank(Y), from a random start as well.",
        place="Abstract, read for a start with small normal entries",
        how=_HOW,
        because=_SLOW + "What Z(0) has outside the columns of Y decays at the rate λ_min(WWᵀ) only, and a direction of "
        "W(0) against its feedback has to turn.",
        read=lambda table: _ends(table, _NEAR),
        scope=LONG & (_METHOD == "fa") & ~_ZERO,
    ),
    Claim(
        name="fa-star-reaches-the-optimum",
        statement="FA* converges, which forward and feedback matrices coming closer makes easy; when r ≥ rank(Y), to "
        "the optimum.",
        place="Abstract; that FA* has the best output layer for its hidden one is a choice",
        how=_HOW,
        because=_SLOW + "Its rate is set by the least singular value of BY.",
        read=lambda table: _ends(table, _NEAR),
        scope=LONG & (_METHOD == "fa*"),
    ),
    Claim(
        name="gd-reaches-the-optimum",
        statement="Gradient descent solves the problem optimally: r ≥ rank(Y).",
        place="Abstract",
        how=_HOW,
        because=_SLOW + "Where r > rank(Y), what the start has in the surplus directions decays slowly.",
        read=lambda table: _ends(table, _NEAR),
        scope=LONG & (_METHOD == "gd"),
    ),
    Claim(
        name="slower-than-gradient-descent",
        statement="FA converges more slowly than gradient descent.",
        place="As Bordelon and Pehlevan cite the paper; not in its abstract",
        how=f"Recorded steps to an error of {_NEAR:g}|Y| over those of gradient descent, from the same random start at "
        "the same η; logarithm of the ratio.",
        because="Above 0 with 99 % confidence (Student's t over the draws, all together). The scale of B sets FA's "
        "unit of time: N(0, 1/n) is a choice.",
        read=_slower,
        scope=LONG & _METHOD.is_in(["fa", "gd"]) & ~_ZERO,
    ),
    Claim(
        name="steps-follow-the-flow",
        statement="In small steps all three methods follow their continuous forms, to first order in η.",
        place="Derived",
        how="Slope of the logarithm of the largest difference between the errors of steps and of gradient flow at the "
        "same times, against log η; one a draw, η = 0.1 and 0.025.",
        because="1 ± 0.1 for the next order, and half the 99 % interval over the draws (Student's t, all together) on "
        "top.",
        read=_order,
        scope=~LONG,
    ),
)
