"""What is stated of r < rank(Y) on ordinary matrices, and how it is judged."""

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import mean
from falign.papers.garg2022.groups import groups, most

_METHOD = pl.col("method")
_ZERO_OR_GD = (_METHOD == "gd") | (pl.col("scale") == 0)
_KIND = ["data", "r"]


def _closed_form(table: pl.DataFrame) -> Reading:
    return most(table, pl.col("distance"), _KIND, 1e-8)


def _optimal(table: pl.DataFrame) -> Reading:
    return most(table, pl.col("error") / pl.col("best") - 1, _KIND, 0.02)


def _starts(table: pl.DataFrame) -> Reading:
    return most(table, pl.col("distance"), ["data", "method", "scale"], 1e-8)


def _above(table: pl.DataFrame) -> Reading:
    """Logarithm of the ratio of FA's error to that of gradient descent of the same draw."""
    keys = [*_KIND, "seed"]
    fa, gd = (table.filter(method=method).select(*keys, "error") for method in ("fa", "gd"))
    both = fa.join(gd, on=keys, suffix="_gd").with_columns(ratio=pl.col("error") / pl.col("error_gd"))
    kinds = list(groups(both, _KIND))
    checks = []
    for label, own in kinds:
        found = mean(own["ratio"].log(), of=label)
        name = f"{label}: log of the ratio (median {own['ratio'].median():.3g})"
        checks.append(Check(label=name, measured=found.value, low=found.above(len(kinds))))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} draws a point")


CLAIMS = (
    Claim(
        name="gd-is-optimal-at-every-rank",
        statement="Gradient descent solves the problem optimally.",
        place="Abstract",
        how="Its error at the end over the optimum by singular values, less 1; the most of all starts.",
        because="At most 2 %: where σ_r and σ_(r+1) are close it takes long to tell them apart, and their order costs "
        "least.",
        read=_optimal,
        scope=_METHOD == "gd",
    ),
    Claim(
        name="above-the-optimum",
        statement="FA is not optimal when r < rank(Y): already on matrices that were not made against it.",
        place="Abstract: “FA can be far from optimal when r < rank(Y)”; on these matrices it is not stated there",
        how="Logarithm of FA's error over that of gradient descent, of the same draw.",
        because="Above 0 with 99 % confidence (Student's t over the draws, all together).",
        read=_above,
        scope=_ZERO_OR_GD,
    ),
    Claim(
        name="closed-form",
        statement="FA ends at Y(BY)⁺BY, Y projected onto the rows of BY.",
        place="Derived: BR = 0 and RWᵀ = 0 leave nothing else",
        how="|ZW - Y(BY)⁺BY|/|Y| at the end, from a zero start; the most of all draws.",
        because="At most 1e-8.",
        read=_closed_form,
        scope=(_METHOD == "fa") & (pl.col("scale") == 0),
    ),
    Claim(
        name="same-function-from-every-start",
        statement="Where it ends depends neither on the start nor on the method: FA from three starts, and FA*.",
        place="Derived",
        how="|ZW - Y(BY)⁺BY|/|Y| at the end; the most of all draws.",
        because="At most 1e-8.",
        read=_starts,
        scope=_METHOD != "gd",
    ),
)
