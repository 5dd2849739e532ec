"""The order in which components are learned, from six named starts, by feedback alignment and gradient descent."""

from collections.abc import Sequence
from math import log

import polars as pl

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting, grid
from falign.lab.report.style import AXIS, INK, Figure, each_of, legend, logarithmic, panels, sequence
from falign.papers.girotti2021._modes import CRITICAL, TOLERANCE, batches, crossing, logarithmic_times, orders, paced
from falign.theory.deep_linear import gradient_flow, learning_time

__all__ = ["ORDER"]

_SIZES = {"zero": 1.0, "small": 1e-3, "positive": 1.0, "negative": 1.0, "aligned": 1.0, "anti-aligned": 1.0}
"""Of each start: small weights are 0.001; K is 1 or -1; the hidden weight is 1 or -1. Zero has no size."""
_KINDS = (("fa", 2), ("dfa", 3), ("bp", 2))
"""With unit feedback dfa and fa are one chain at any depth; of two layers they are the same anyhow."""


def _points(targets: Sequence[float], records: int) -> tuple[Point, ...]:
    """All starts and components, a kind of network after the other."""
    return tuple(
        point
        for rule, depth in _KINDS
        for scheme, size in _SIZES.items()
        for point in grid(rule=rule, depth=depth, scheme=scheme, size=size, target=targets, records=records)
    )


_SPAN = 1e-3, 5.0
"""First and last record in units of the time to 90 %; where that is never, in units of 100."""
_NEVER = 100.0


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    rule: Sequence[str],
    depth: Sequence[int],
    scheme: Sequence[str],
    size: Sequence[float],
    target: Sequence[float],
    records: int,
) -> list[Outcome]:
    """Integrate the runs of a rule and depth together, each in units of the time that it takes."""
    outcomes: dict[int, Outcome] = {}
    for places, started in batches(rule, depth, scheme, size, target):
        # Gradient descent from zero never learns: its time is infinite, and no unit to record in.
        units = learning_time(started, TOLERANCE).nan_to_num(posinf=_NEVER)
        moments = logarithmic_times(*_SPAN, records)
        shares = gradient_flow(paced(started, units), times=moments).share
        for column, place in enumerate(places):
            learned, times = shares[:, column], units[column] * moments
            outcomes[place] = Outcome(
                records={
                    "time": times.tolist(),
                    "share": learned.tolist(),
                    "learned": [crossing(times, learned)] * len(times),
                    "begun": [crossing(times, learned, 1 - TOLERANCE)] * len(times),
                }
            )
    return [outcomes[place] for place in range(len(seeds))]


_KIND = ["rule", "depth", "scheme"]
_FEEDBACK = pl.col("rule") != "bp"
_TWO = pl.col("depth") == 2
_AGAINST = (pl.col("rule") == "fa") & (pl.col("scheme") == "anti-aligned") & (pl.col("target") < CRITICAL)
_SAME = (pl.col("rule") == "fa") & pl.col("scheme").is_in(["zero", "anti-aligned"]) & (pl.col("target") < CRITICAL)


def _one_row_a_run(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run: "learned" and "begun" are the same in all of its records, so that any one of them does."""
    return table.filter(pl.col("time") == 0)


def _label(values: Sequence[object]) -> str:
    rule, depth, scheme, *_ = values
    return f"{rule}, {depth} layers, {scheme}"


def _ordered(table: pl.DataFrame, low: float, high: float) -> Evidence:
    runs = orders(_one_row_a_run(table), by=_KIND)
    return Evidence(
        checks=tuple(
            Check(
                label=f"{_label((row['rule'], row['depth'], row['scheme']))}: of {row['components']} components",
                measured=row["in_order"],
                low=low,
                high=high,
            )
            for row in runs.to_dicts()
        )
    )


def _both(table: pl.DataFrame) -> Evidence:
    zero, against = (
        float(orders(_one_row_a_run(table.filter(pl.col("scheme") == name)), by=_KIND)["in_order"][0])
        for name in ("zero", "anti-aligned")
    )
    return Evidence(checks=(Check(label="zero less anti-aligned", measured=zero - against, low=1.0),))


def _simultaneous(table: pl.DataFrame) -> Evidence:
    """Learning times of components well below K^(3/2), relative to ln 10/(mK)."""
    small = _one_row_a_run(table).filter(pl.col("target") <= 0.1)
    return Evidence(
        checks=tuple(
            Check(label=f"λ = {row['target']:g}", measured=row["learned"] / log(10), low=0.98, high=1.02)
            for row in small.sort("target").to_dicts()
        )
    )


def _no_staircase(table: pl.DataFrame) -> Evidence:
    """Of all the time that a component takes, the part before its first tenth is there."""
    waits = _one_row_a_run(table).with_columns(wait=pl.col("begun") / pl.col("learned"))
    checks = []
    for row in waits.sort("rule", "target", descending=[True, False]).to_dicts():
        end = {"high": 0.35} if row["rule"] == "fa" else {"low": 0.5}
        checks.append(Check(label=f"{row['rule']}, λ = {row['target']:g}", measured=row["wait"], **end))
    return Evidence(checks=tuple(checks))


_PAIRS = (
    "Share of the pairs of components of which the larger is learned first, the time of 90 % being read off the flow."
)

_CLAIMS = (
    Claim(
        name="regularises",
        statement="From some starts the components are learned approximately in decreasing order of importance: "
        "implicit regularisation.",
        reference="Abstract; that zero and small weights are such a start, at any depth, is derived",
        quotation="we also provide initialization schemes where the components of the problem are approximately "
        "learned by decreasing order of importance",
        method=_PAIRS,
        tolerance_reason="1: every pair. “Approximately” is the power law of the times, which parts components less "
        "sharply than gradient descent does: no-staircase.",
        read=lambda table: _ordered(table, 1.0, 1.0),
        scope=_FEEDBACK & pl.col("scheme").is_in(["zero", "small"]),
    ),
    Claim(
        name="anti-regularises",
        statement="From certain specific starts negligible components are learned before the principal ones: implicit "
        "anti-regularisation.",
        reference="Abstract; that the hidden weight anti-aligned with its feedback is such a start, for λ < λ_c, is "
        "derived",
        quotation="certain specific initializations imply that negligible components are learned before the "
        "principal ones",
        method=_PAIRS + " Of components below λ_c = 0.192.",
        tolerance_reason="0: no pair.",
        read=lambda table: _ordered(table, 0.0, 0.0),
        scope=_AGAINST,
    ),
    Claim(
        name="only-the-start-differs",
        statement="Which of the two it is depends on the initialisation alone.",
        reference="Abstract: “certain specific initializations imply …”, “we also provide initialization schemes where "
        "…”",
        method=_PAIRS
        + " The same components, feedback and flow from zero weights, and from an anti-aligned hidden weight.",
        tolerance_reason="1 from zero less 0 from the anti-aligned start.",
        read=_both,
        scope=_SAME,
    ),
    Claim(
        name="neutral",
        statement="From a large output weight along its feedback (θ_2 = K > 0, θ_1 = 0) all components are learned at "
        "the same time, ln 10/(mK).",
        origin="theory",
        reference="Derived: neither of the two that the abstract names",
        method="Time of 90 % over ln 10/(mK), for components up to a tenth of K^(3/2).",
        tolerance_reason="1 ± 0.02, the next order in λ.",
        read=_simultaneous,
        scope=(pl.col("rule") == "fa") & (pl.col("scheme") == "positive"),
    ),
    Claim(
        name="gradient-in-order",
        statement="Gradient descent learns larger components first from every one of the starts from which it learns.",
        origin="theory",
        reference="Derived: whatever anti-regularises is the feedback, not the start alone",
        method=_PAIRS,
        tolerance_reason="1: every pair.",
        read=lambda table: _ordered(table, 1.0, 1.0),
        scope=(pl.col("rule") == "bp") & (pl.col("scheme") != "zero"),
    ),
    Claim(
        name="no-staircase",
        statement="Feedback alignment learns without waiting: no saddle at the origin, no plateaus as of gradient "
        "descent.",
        origin="theory",
        reference="Derived: θ_1' = mλ at the origin",
        method="Time of the first 10 % over that of 90 %, from small weights.",
        tolerance_reason="At most 0.35 for feedback alignment of two layers, for which it is 0.298 from zero; at least "
        "½ for gradient descent, for which it tends to 1 as the weights tend to 0.",
        read=_no_staircase,
        scope=_TWO & (pl.col("scheme") == "small"),
    ),
)


def _shares_over_time(data: pl.DataFrame) -> Figure:
    """One line a component; the larger, the darker."""
    figure, axes = panels(
        len(_SIZES),
        len(_KINDS),
        titles=[scheme if row == 0 else "" for row in range(len(_KINDS)) for scheme in _SIZES],
        xlabels=["time"],
        ylabels=[f"{rule}, {depth} layers" for rule, depth in _KINDS],
        share="all",
        width=10.5,
        height=1.9,
    )
    colours = dict(zip(sorted(data["target"].unique()), sequence(data["target"].n_unique()), strict=True))
    for index, panel in enumerate(axes):
        (rule, depth), scheme = _KINDS[index // len(_SIZES)], list(_SIZES)[index % len(_SIZES)]
        runs = data.filter((pl.col("rule") == rule) & (pl.col("depth") == depth) & (pl.col("scheme") == scheme))
        for target, line in each_of(runs, "target"):
            panel.plot(line["time"], line["share"], color=colours[target], linewidth=1.3, label=f"λ = {target:g}")
        panel.axhline(0.9, color=INK, linewidth=0.8, linestyle=(0, (4, 2.5)))
        panel.axhline(0.0, color=AXIS, linewidth=0.8)
        panel.set_ylim(-0.5, 1.15)
        panel.set_xlim(0.05, 500)
        logarithmic(panel, "x", ticks=(0.1, 1, 10, 100))
    legend(figure, columns=8)
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    columns: list[Scalar] = ["rule", "depth", "scheme", "target", "time", "share", "learned"]
    return table.filter(pl.col("time") > 0).select(columns)


ORDER = Experiment(
    name="girotti2021.order",
    title="Which components are learned first",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“incremental learning phenomena”); starts and times are "
    "derived",
    revision=1,
    grid={
        "smoke": _points((0.05, 0.1, 1.0, 3.0), 80),
        "quick": _points((0.02, 0.05, 0.1, 0.15, 0.5, 1.0, 3.0, 10.0), 100),
        "paper": _points(
            (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.15, 0.17, 0.19, 0.3, 0.5, 1.0, 2.0, 3.0, 10.0), 400
        ),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=_run,
    agreement=1e-6,
    together=("rule", "depth", "scheme", "size", "target"),
    pictures=(
        Picture(
            name="order",
            caption="Share of each component that is learned, θ_L…θ_1/λ, over time from six starts: feedback alignment "
            "of two and of three layers (direct feedback alignment is the same, the feedback being 1), gradient "
            "descent of two. Dashed: learned, 90 %. From zero and small weights larger components come first; from an "
            "anti-aligned hidden weight those below λ_c = 0.19 come in the reverse order. Negative products are cut "
            "off at -½.",
            data=_picture_data,
            draw=_shares_over_time,
        ),
    ),
    claims=_CLAIMS,
)
