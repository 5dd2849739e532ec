"""What is stated of FA as a range finder, and how it is judged."""

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import mean
from falign.papers.garg2022.groups import groups, most

_KIND = ["data", "oversampling"]
_ENOUGH = 5
"""Oversampling that Halko, Martinsson and Tropp recommend."""


def _one_pass(table: pl.DataFrame) -> Reading:
    rows = table.filter(pl.col("power") == 0)
    return most(rows, (pl.col("trained") / pl.col("ratio") - 1).abs(), _KIND, 1e-6)


def _bound(table: pl.DataFrame) -> Reading:
    rows = table.filter((pl.col("power") == 0) & (pl.col("oversampling") >= 2))
    checks = []
    for label, own in groups(rows, _KIND):
        r, p = int(own["r"][0]), int(own["oversampling"][0])
        square = float((own["ratio"] ** 2).to_numpy().mean())
        checks.append(Check(label=f"{label}: mean ratio²", measured=square, high=1 + r / (p - 1)))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} draws")


def _buys(table: pl.DataFrame, p: int, q: int) -> Reading:
    """Mean over the draws of ratio - 1 with p and q over that of FA with the same B."""
    keys = ["data", "seed"]
    plain, better = (
        table.filter(oversampling=a, power=b).select(*keys, excess=pl.col("ratio") - 1) for a, b in ((0, 0), (p, q))
    )
    both = better.join(plain, on=keys, suffix="_fa").with_columns(share=pl.col("excess") / pl.col("excess_fa"))
    kinds = list(groups(both, ["data"]))
    checks = []
    for label, own in kinds:
        found = mean(own["share"], of=label)
        name = f"{label}: share of FA's excess (median {own['excess_fa'].median():.2g}) that is taken away"
        checks.append(Check(label=name, measured=1 - found.value, low=found.above(len(kinds))))
    return Reading(checks=tuple(checks))


CLAIMS = (
    Claim(
        name="one-pass-of-a-range-finder",
        statement="FA computes what one pass of a randomised range finder computes; with p more hidden units, cut to "
        "rank r at the end, what one with oversampling p computes.",
        place="Derived, beyond the paper",
        how="Largest relative difference between the trained error and that of the range finder with the same B.",
        because="At most 1e-6.",
        read=_one_pass,
    ),
    Claim(
        name="oversampling-bounds-the-ratio",
        statement="With oversampling p ≥ 2 the mean squared ratio to the optimum is at most 1 + r/(p - 1); without it "
        "it has no bound.",
        place="Halko, Martinsson and Tropp 2011, theorem 10.5; that cutting to rank r keeps the bound is derived",
        how="Mean of ratio² over the draws, q = 0.",
        because="At most 1 + r/(p - 1).",
        read=_bound,
    ),
    Claim(
        name="what-oversampling-buys",
        statement=f"{_ENOUGH} more hidden units, cut to rank r at the end, take away a part of FA's excess over the "
        "optimum.",
        place="Beyond the paper; Halko, Martinsson and Tropp 2011 recommend that oversampling",
        how="1 less ratio - 1 over that of FA with the same B; mean over the draws.",
        because="Above 0 with 99 % confidence (Student's t over the draws, all together).",
        read=lambda table: _buys(table, _ENOUGH, 0),
    ),
    Claim(
        name="what-power-buys",
        statement="One power iteration, feedback BYYᵀ in place of B, takes away a part of FA's excess.",
        place="Beyond the paper",
        how="1 less ratio - 1 over that of FA with the same B; mean over the draws.",
        because="Above 0 with 99 % confidence (Student's t over the draws, all together).",
        read=lambda table: _buys(table, 0, 1),
    ),
)
