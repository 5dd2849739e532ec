"""What is stated of the order of learning, and how it is judged."""

from collections.abc import Sequence

import polars as pl

from falign.lab.experiment import Check, Claim, Reading
from falign.papers.girotti2021.learned import orders
from falign.theory.deep_linear import critical_target

_KIND = ["rule", "depth", "scheme"]
_FEEDBACK = pl.col("rule") != "bp"
_TWO = pl.col("depth") == 2
_BELOW = float(critical_target(-0.5, 1.0))
"""λ_c of the anti-aligned start of two layers, θ_1 = -1, θ_2 = 0, for which K = -½."""
_AGAINST = (pl.col("rule") == "fa") & (pl.col("scheme") == "anti-aligned") & (pl.col("target") < _BELOW)
_SAME = (pl.col("rule") == "fa") & pl.col("scheme").is_in(["zero", "anti-aligned"]) & (pl.col("target") < _BELOW)


def ends(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run: when it was learned and begun."""
    return table.filter(pl.col("time") == 0)


def _label(values: Sequence[object]) -> str:
    rule, depth, scheme, *_ = values
    return f"{rule}, {depth} layers, {scheme}"


def _ordered(table: pl.DataFrame, low: float, high: float) -> Reading:
    found = orders(ends(table), by=_KIND)
    return Reading(
        checks=tuple(
            Check(
                label=f"{_label((row['rule'], row['depth'], row['scheme']))}: of {row['components']} components",
                measured=row["in_order"],
                low=low,
                high=high,
            )
            for row in found.to_dicts()
        )
    )


def _both(table: pl.DataFrame) -> Reading:
    zero, against = (
        float(orders(ends(table.filter(pl.col("scheme") == name)), by=_KIND)["in_order"][0])
        for name in ("zero", "anti-aligned")
    )
    return Reading(checks=(Check(label="zero less anti-aligned", measured=zero - against, low=1.0),))


def _simultaneous(table: pl.DataFrame) -> Reading:
    """Learning times of components well below K^(3/2), relative to ln 10/(mK)."""
    small = ends(table).filter(pl.col("target") <= 0.1)
    return Reading(
        checks=tuple(
            Check(label=f"λ = {row['target']:g}", measured=row["learned"] / _TEN, low=0.98, high=1.02)
            for row in small.sort("target").to_dicts()
        )
    )


_TEN = 2.302585092994046
"""ln 10."""


def _no_staircase(table: pl.DataFrame) -> Reading:
    """Of all the time that a component takes, the part before its first tenth is there."""
    waits = ends(table).with_columns(wait=pl.col("begun") / pl.col("learned"))
    checks = []
    for row in waits.sort("rule", "target", descending=[True, False]).to_dicts():
        own = {"high": 0.35} if row["rule"] == "fa" else {"low": 0.5}
        checks.append(Check(label=f"{row['rule']}, λ = {row['target']:g}", measured=row["wait"], **own))
    return Reading(checks=tuple(checks))


_PAIRS = (
    "Share of the pairs of components of which the larger is learned first, the time of 90 % being read off the flow."
)

CLAIMS = (
    Claim(
        name="regularises",
        statement="From some starts the components are learned approximately in decreasing order of importance: "
        "implicit regularisation.",
        place="Abstract; that zero and small weights are such a start, at any depth, is derived",
        how=_PAIRS,
        because="1: every pair. “Approximately” is the power law of the times, which parts components less sharply "
        "than gradient descent does: no-staircase.",
        read=lambda table: _ordered(table, 1.0, 1.0),
        scope=_FEEDBACK & pl.col("scheme").is_in(["zero", "small"]),
    ),
    Claim(
        name="anti-regularises",
        statement="From certain specific starts negligible components are learned before the principal ones: implicit "
        "anti-regularisation.",
        place="Abstract; that the hidden weight anti-aligned with its feedback is such a start, for λ < λ_c, is "
        "derived",
        how=_PAIRS + " Of components below λ_c = 0.192.",
        because="0: no pair.",
        read=lambda table: _ordered(table, 0.0, 0.0),
        scope=_AGAINST,
    ),
    Claim(
        name="only-the-start-differs",
        statement="Which of the two it is depends on the initialisation alone.",
        place="Abstract: “certain specific initializations imply …”, “we also provide initialization schemes where …”",
        how=_PAIRS
        + " The same components, feedback and flow from zero weights, and from an anti-aligned hidden weight.",
        because="1 from zero less 0 from the anti-aligned start.",
        read=_both,
        scope=_SAME,
    ),
    Claim(
        name="neutral",
        statement="From a large output weight along its feedback (θ_2 = K > 0, θ_1 = 0) all components are learned at "
        "the same time, ln 10/(mK).",
        place="Derived: neither of the two that the abstract names",
        how="Time of 90 % over ln 10/(mK), for components up to a tenth of K^(3/2).",
        because="1 ± 0.02, the next order in λ.",
        read=_simultaneous,
        scope=(pl.col("rule") == "fa") & (pl.col("scheme") == "positive"),
    ),
    Claim(
        name="gradient-in-order",
        statement="Gradient descent learns larger components first from every one of the starts from which it learns.",
        place="Derived: whatever anti-regularises is the feedback, not the start alone",
        how=_PAIRS,
        because="1: every pair.",
        read=lambda table: _ordered(table, 1.0, 1.0),
        scope=(pl.col("rule") == "bp") & (pl.col("scheme") != "zero"),
    ),
    Claim(
        name="no-staircase",
        statement="Feedback alignment learns without waiting: no saddle at the origin, no plateaus as of gradient "
        "descent.",
        place="Derived: θ_1' = mλ at the origin",
        how="Time of the first 10 % over that of 90 %, from small weights.",
        because="At most 0.35 for feedback alignment of two layers, for which it is 0.298 from zero; at least ½ for "
        "gradient descent, for which it tends to 1 as the weights tend to 0.",
        read=_no_staircase,
        scope=_TWO & (pl.col("scheme") == "small"),
    ),
)
