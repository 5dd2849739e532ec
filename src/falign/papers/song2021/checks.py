"""Theorems tried run by run, as experiments: what a check leaves in the table, and how often it held."""

from collections.abc import Sequence
from math import isfinite, sqrt

import polars as pl

from falign.lab.experiment import Check, Missing, Outcome
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
    """For every group, the share of runs in which the inequality held, if its assumptions did.

    Args:
        table: One row a run.
        by: Columns that make a group.
        label: With a place for each of them, such as "n = {n}".

    Returns:
        One check a group: at least 1 - δ, less 3 standard errors of a share of so many runs.

    Raises:
        Missing: In no run all assumptions held.
    """
    met = table.filter(pl.col("verdict") != "assumption fails")
    if met.is_empty():
        failing = ", ".join(sorted(set(table["failing"].drop_nulls().to_list())))
        raise Missing(f"in no run that is done the assumptions hold: {failing or 'no run is done'}")
    groups = met.group_by(by).agg(pl.col("held").mean(), runs=pl.len(), slack=pl.col("slack").min()).sort(by)
    return tuple(
        Check(
            label=f"{label.format(**row)}: share of {row['runs']} runs (least slack {row['slack']:.2g})",
            measured=row["held"],
            low=1 - DELTA - 3 * sqrt(DELTA * (1 - DELTA) / row["runs"]),
        )
        for row in groups.to_dicts()
    )
