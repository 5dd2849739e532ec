"""Theorems tried run by run, as experiments: what a check leaves in the table, and how often it held."""

from collections.abc import Sequence
from math import isfinite

import polars as pl

from falign.lab.experiment import Check, Missing, Outcome
from falign.lab.experiment.statistics import least_share
from falign.theory.two_layer.theorems import TheoremCheck

DELTA = 0.1
"""δ: the share of runs in which a theorem that holds "with probability at least 1 - δ" may fail."""


def outcome(check: TheoremCheck) -> Outcome:
    """One record: verdict, whether the inequality held, slack, what failed, and every constant that was measured."""
    numbers = {name.replace(" ", "_"): value for name, value in check.constants.items()}
    if "rate" in numbers:
        numbers["contraction"] = numbers.pop("rate")  # the point's "rate" is η
    numbers["slack"] = check.slack
    return Outcome(
        records={
            "verdict": [check.verdict],
            "held": [check.share],
            "failing": [", ".join(assumption.name for assumption in check.failing) or None],
            **{name: [value if isfinite(value) else None] for name, value in numbers.items()},
        }
    )


def shares(table: pl.DataFrame, by: Sequence[str], label: str) -> tuple[Check, ...]:
    """For every group, the share of runs in which the inequality held, among those that meet the assumptions.

    Args:
        table: One row a run.
        by: Columns that make a group.
        label: With a place for each of them, such as "n = {n}".

    Returns:
        One check a group: the least share that does not contradict 1 - δ at 99 %, by the binomial law.

    Raises:
        Missing: A group has no run that meets the assumptions, or too few to contradict anything.
    """
    checks = []
    for values, runs in table.sort(by).group_by(by, maintain_order=True):
        name = label.format(**dict(zip(by, values, strict=True)))
        met = runs.filter(pl.col("verdict") != "assumption fails")
        if met.is_empty():
            failing = ", ".join(sorted(set(runs["failing"].drop_nulls().to_list())))
            raise Missing(f"{name}: no run meets the assumptions: {failing}")
        left_out = f", {runs.height - met.height} do not meet the assumptions" if met.height < runs.height else ""
        checks.append(
            Check(
                label=f"{name}: share of {met.height} runs (least slack {met['slack'].min():.2g}{left_out})",
                measured=float(met["held"].mean()),  # pyright: ignore[reportArgumentType]  # a column of numbers
                low=least_share(met.height, 1 - DELTA),
            )
        )
    return tuple(checks)
