"""What is stated of the representations that FA and gradient descent find, and how it is judged."""

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.lab.experiment.statistics import mean, slope
from falign.papers.garg2022.groups import groups

_CLOSED = pl.col("found") == "closed form"
_EQUAL, _ORTHOGONAL = 1.05, 0.1
_WITHIN = 0.01


def _orthogonal(table: pl.DataFrame) -> Reading:
    widest = table.filter(pl.col("m") == pl.col("m").max())
    kinds = list(groups(widest, ["data", "m", "r"]))
    checks = []
    for label, own in kinds:
        for name, words, high in (("ratio", "ratio of errors", _EQUAL), ("overlap", "overlap", _ORTHOGONAL)):
            found = mean(own[name], of=f"{label}: {words}")
            half = found.half(2 * len(kinds))
            checks.append(Check(label=f"{label}: {words}", measured=found.value, high=high - half))
    return Reading(checks=tuple(checks), note=f"{table['seed'].n_unique()} draws")


def _falls(table: pl.DataFrame) -> Reading:
    found = slope(table.select("seed", pl.col("m").log(), pl.col("overlap").log()), "m", "overlap")
    width = 0.1 + found.half()
    return Reading(checks=(Check(label="exponent of m", measured=found.value, low=-1 - width, high=-1 + width),))


def _agree(table: pl.DataFrame) -> Reading:
    """Most difference between trained and closed form, draw by draw."""
    keys = ["data", "m", "r", "seed"]
    closed, trained = (table.filter(own).select(*keys, "ratio", "overlap") for own in (_CLOSED, ~_CLOSED))
    both = trained.join(closed, on=keys, suffix="_closed")
    return Reading(
        checks=tuple(
            Check(
                label=f"{label}: {name}, most",
                measured=float((own[name] - own[f"{name}_closed"]).abs().to_numpy().max()),
                high=_WITHIN,
            )
            for label, own in groups(both, ["data", "m"])
            for name in ("ratio", "overlap")
        )
    )


CLAIMS = (
    Claim(
        name="almost-orthogonal",
        statement="The representations found by gradient descent and FA can be almost orthogonal even when their "
        "errors are approximately equal.",
        place="Abstract; its matrices and its measure are not readable",
        how="Mean ratio of the errors and mean overlap |P_FA P_GD|²/r of the row spaces of W, at the largest m; 1 is "
        "the same representation, r/m what two at random have.",
        because=f"At most {_EQUAL:g} and {_ORTHOGONAL:g}, by half the 99 % interval over the draws (Student's t, all "
        "together).",
        read=_orthogonal,
        scope=_CLOSED,
    ),
    Claim(
        name="overlap-vanishes",
        statement="On a nearly flat spectrum the overlap is that of a random subspace: it vanishes as r/m.",
        place="Derived: BY is nearly as random as B",
        how="Slope of log overlap against log m, one a draw.",
        because="-1 ± 0.1, and half the 99 % interval over the draws (Student's t) on top.",
        read=_falls,
        scope=_CLOSED & (pl.col("data") == "flat"),
    ),
    Claim(
        name="trained-representations",
        statement="Trained networks have these errors and these representations.",
        place="Derived",
        how="Difference of ratio and overlap between training and closed form, draw by draw; the most.",
        because=f"At most {_WITHIN:g}: gradient descent tells close singular values apart slowly.",
        read=_agree,
    ),
)
