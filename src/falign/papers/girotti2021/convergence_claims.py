"""What is stated of convergence, and how it is judged."""

import polars as pl

from falign.lab.experiment import Check, Claim, Reading

_KIND = ["dynamics", "rule", "depth", "share"]
_POSITIVE = pl.col("start") == "positive"
_FLOW = pl.col("dynamics") == "flow"


def _held(table: pl.DataFrame) -> Reading:
    runs = table.unique([*_KIND, "start", "seed"], keep="first", maintain_order=True)
    checks = []
    for (dynamics, rule, depth, share), own in runs.sort(_KIND).group_by(_KIND, maintain_order=True):
        step = f", η = {share:g}/ρ_max" if dynamics == "steps" else ""
        tried, met = int(own["draws"].sum()), int(own["met"].sum())
        left_out = f", {tried - met} are not under the condition" if met < tried else ""
        checks.append(
            Check(
                label=f"{dynamics}, {rule}, {depth} layers{step}: share of {met} starts{left_out}",
                measured=float(own["held"].to_numpy().mean()),
                low=1.0,
            )
        )
    return Reading(checks=tuple(checks))


_ABSTRACT = (
    "Abstract: “convergence guarantees with rates for deep linear networks for both continuous and discrete dynamics”; "
)

CLAIMS = (
    Claim(
        name="guaranteed-flow",
        statement="In continuous time |e(t)| ≤ |e(0)| exp(-t ΠK_l) for every component all of whose invariants K_l are "
        "positive, at any depth.",
        place=_ABSTRACT + "the paper's constants are not readable, this rate is derived",
        how="Share of random starts for which it holds at all times recorded.",
        because="Every one.",
        read=_held,
        scope=_POSITIVE & _FLOW,
    ),
    Claim(
        name="guaranteed-steps",
        statement="In steps |e(t)| ≤ |e(0)| (1 - ηΠK_l)^t, with the invariants of the last step, at any depth.",
        place=_ABSTRACT + "the paper's constants are not readable, this rate is derived",
        how="Share of random starts for which it holds at all steps, of those with ηρ̂ ≤ 1 along the path, ρ̂ the "
        "exact rate of a step.",
        because="Every one.",
        read=_held,
        scope=_POSITIVE & ~_FLOW,
    ),
    Claim(
        name="converges-from-anywhere",
        statement="Components converge from any start, invariants of either sign, at any depth.",
        place=_ABSTRACT + "in continuous time derived, in steps observed",
        how="Share of random starts with at most a thousandth of the error left: in continuous time at the time "
        "predicted for that, in 5000 steps of 0.99/ρ_max.",
        because="Every one.",
        read=_held,
        scope=~_POSITIVE,
    ),
)
