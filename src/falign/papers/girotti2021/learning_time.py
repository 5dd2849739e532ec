"""The time in which a component is learned against its size: power laws by depth, and what other starts do to them."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import largest, sorted_groups
from falign.lab.report.style import (
    AXIS,
    COLOURS,
    INK,
    MARKERS,
    Axes,
    Figure,
    each_of,
    law,
    logarithmic,
    panels,
    sequence,
)
from falign.papers.girotti2021._modes import CRITICAL, TINY, TOLERANCE, batches, crossing, exponent, paced
from falign.theory.deep_linear import depth_slope, gradient_flow, learning_time

__all__ = ["LEARNING_TIME"]

_STARTS = (
    *(("fa", depth, "zero", 1.0) for depth in (2, 3, 4)),
    ("fa", 2, "small", 1e-3),
    *(("fa", 2, scheme, 1.0) for scheme in ("positive", "negative", "aligned", "anti-aligned")),
    ("bp", 2, "small", 1e-3),
)


def _points(targets: Sequence[float], records: int) -> tuple[Point, ...]:
    return tuple(
        point
        for rule, depth, scheme, size in _STARTS
        for point in grid(rule=rule, depth=depth, scheme=scheme, size=size, target=targets, records=records)
    )


def _targets(count: int) -> tuple[float, ...]:
    """From 0.01 to 30, evenly on a logarithmic axis, with four digits."""
    return tuple(float(f"{value:.4g}") for value in np.geomspace(0.01, 30, count))


_BEYOND = 1.02
"""The flow is recorded to so much of the predicted time, so that a prediction that is too early is seen."""


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
    """Integrate the runs of a rule and depth together, each in units of its predicted time, and read off the time."""
    outcomes: dict[int, Outcome] = {}
    for places, started in batches(rule, depth, scheme, size, target):
        predicted = learning_time(started, TOLERANCE)
        times = torch.linspace(0, _BEYOND, records, dtype=torch.float64)
        shares = gradient_flow(paced(started, predicted), times=times).share
        for column, place in enumerate(places):
            unit, share = float(predicted[column]), crossing(times, shares[:, column])
            learned = None if share is None else unit * share
            outcomes[place] = Outcome(records={"learned": [learned], "predicted": [unit]})
    return [outcomes[place] for place in range(len(seeds))]


_CONSTANT = 2.0107
"""Time to 90 % of a component of size 1 from zero weights, two layers, m = 1."""
_FA = pl.col("rule") == "fa"
_ZERO = _FA & (pl.col("scheme") == "zero")


def _slopes(table: pl.DataFrame) -> Evidence:
    checks = []
    for (depth,), runs in sorted_groups(table.sort("depth", "target"), ["depth"]):
        measured = exponent(runs["target"], runs["learned"])
        law = depth_slope(int(str(depth)))
        checks.append(Check(label=f"{depth} layers: exponent of λ", measured=measured, low=law - 1e-3, high=law + 1e-3))
    return Evidence(checks=tuple(checks), note=f"{table['target'].n_unique()} sizes from 0.01 to 30")


def _constant(table: pl.DataFrame) -> Evidence:
    scaled = (table["learned"] * table["target"] ** (2 / 3)).to_numpy()
    return Evidence(
        checks=tuple(
            Check(label=label, measured=float(value), low=_CONSTANT - 1e-3, high=_CONSTANT + 1e-3)
            for label, value in (("least", scaled.min()), ("most", scaled.max()))
        )
    )


def _small(table: pl.DataFrame, most: float) -> pl.DataFrame:
    small = table.filter(pl.col("target") <= most).sort("target")
    if small.height < 2:
        raise Missing(f"{small.height} components are at most {most:g}, expected at least 2")
    return small


def _simultaneous(table: pl.DataFrame) -> Evidence:
    runs = _small(table, 0.1)
    measured = float(runs["learned"].to_numpy().max() / runs["learned"].to_numpy().min())
    return Evidence(checks=(Check(label="longest over shortest time", measured=measured, high=1.02),))


def _logarithmic(table: pl.DataFrame) -> Evidence:
    runs = _small(table, 0.1)
    measured = float(np.polyfit(-runs["target"].log().to_numpy(), runs["learned"].to_numpy(), 1)[0])
    return Evidence(checks=(Check(label="time per unit of ln 1/λ", measured=measured, low=1.4, high=1.6),))


def _turns(table: pl.DataFrame) -> Evidence:
    """Steps of the logarithm of the time between neighbouring sizes, below λ_c and above twice λ_c."""
    below = _small(table, CRITICAL)["learned"].log().diff().drop_nulls().to_numpy()
    above = table.filter(pl.col("target") > 2 * CRITICAL).sort("target")["learned"].log().diff().drop_nulls().to_numpy()
    return Evidence(
        checks=(
            Check(label=f"least rise of {len(below)}, λ < λ_c", measured=float(below.min()), low=TINY),
            Check(label=f"least fall of {len(above)}, λ > 2λ_c", measured=float(-above.max()), low=TINY),
        )
    )


def _exact(table: pl.DataFrame) -> Evidence:
    far = table.with_columns(far=(pl.col("learned") / pl.col("predicted") - 1).abs().fill_null(1.0))
    starts = [
        (f"{rule}, {depth} layers, {scheme}", runs)
        for (rule, depth, scheme), runs in sorted_groups(far, ["rule", "depth", "scheme"])
    ]
    return largest(starts, "far", 1e-3, label="{label}: farthest of {rows}")


def _gradient(table: pl.DataFrame) -> Evidence:
    """Slope of log time on log λ of gradient descent, where the start is small beside the component."""
    runs = table.filter(pl.col("target") >= 0.1).sort("target")
    measured = exponent(runs["target"], runs["learned"])
    return Evidence(checks=(Check(label="exponent of λ", measured=measured, high=-0.75),))


_CLAIMS = (
    Claim(
        name="power-law",
        statement="From zero weights the time falls with the size of the component as a power, λ^(-(2^L-2)/(2^L-1)): "
        "-2/3, -6/7, -14/15 for two, three and four layers.",
        reference="Abstract: “approximately learned by decreasing order of importance”; the law is derived",
        quotation="the components of the problem are approximately learned by decreasing order of importance",
        headline="exponent of λ in a component’s learning time",
        method="Slope of the logarithm of the time to 90 %, read off the flow, against log λ.",
        tolerance_reason="The law ± 0.001.",
        read=_slopes,
        scope=_ZERO,
    ),
    Claim(
        name="constant",
        statement="Of two layers from zero weights the time to 90 % is 2.0107 (mλ)^(-2/3).",
        origin="theory",
        reference="Derived: closed form",
        method="Time × λ^(2/3), least and most of all sizes.",
        tolerance_reason="± 0.001.",
        read=_constant,
        scope=_ZERO & (pl.col("depth") == 2),
    ),
    Claim(
        name="times-exact",
        statement="The times are those of the closed form and the quadrature, from every start and at every depth.",
        origin="theory",
        reference="Derived",
        method="Time read off the flow over the predicted one; the farthest from 1. A time that is not reached counts "
        "as 1.",
        tolerance_reason="0.001: the records lie so close that a straight line between two is right to that.",
        read=_exact,
    ),
    Claim(
        name="turns-at-the-critical-size",
        statement="From the anti-aligned start the time rises with the component's size below λ_c and falls above.",
        reference="Abstract: negligible components before the principal ones; λ_c = c³/(3√3m) is derived",
        quotation="certain specific initializations imply that negligible components are learned before the "
        "principal ones",
        method="Steps of the logarithm of the time between neighbouring sizes. Between λ_c and 2λ_c the bottleneck of "
        "the vanished fixed points is left out.",
        tolerance_reason="Every step has its sign.",
        read=_turns,
        scope=_FA & (pl.col("scheme") == "anti-aligned"),
    ),
    Claim(
        name="simultaneous",
        statement="From a large output weight along its feedback, small components take the same time.",
        origin="theory",
        reference="Derived: neutral",
        method="Longest over shortest time of the components up to 0.1, K = 1.",
        tolerance_reason="At most 1.02, the next order in λ.",
        read=_simultaneous,
        scope=_FA & (pl.col("scheme") == "positive"),
    ),
    Claim(
        name="logarithmic",
        statement="From an output weight against its feedback the time rises with 3/2 ln(1/λ)/(m|K|) as λ falls.",
        origin="theory",
        reference="Derived",
        method="Slope of the time against ln(1/λ) of the components up to 0.1, K = -1.",
        tolerance_reason="1.5 ± 0.1, the next order in λ.",
        read=_logarithmic,
        scope=_FA & (pl.col("scheme") == "negative"),
    ),
    Claim(
        name="gradient-parts-more",
        statement="Gradient descent parts the components more than feedback alignment of two layers does.",
        origin="theory",
        reference="Derived: ln(1/ε)/λ against λ^(-2/3)",
        method="Slope of the logarithm of the time against log λ, from small weights, for components of 0.1 and more.",
        tolerance_reason="Below -0.75: -1 but for the logarithm, where feedback alignment has -2/3.",
        read=_gradient,
        scope=pl.col("rule") == "bp",
    ),
)

_SCHEMES = ("zero", "positive", "negative", "aligned", "anti-aligned")


def _times_by_size(data: pl.DataFrame) -> Figure:
    """Zero start by depth on the left, starts of two layers and gradient descent on the right."""
    figure, (left, right) = panels(
        2,
        titles=["From zero weights", "Two layers, other starts"],
        xlabels=["λ"],
        ylabels=["time to 90 %"],
        share="all",
        height=3.8,
    )
    fa = data.filter(pl.col("rule") == "fa")
    depths = each_of(fa.filter(pl.col("scheme") == "zero"), "depth")
    for colour, marker, (depth, runs) in zip(sequence(len(depths)), MARKERS, depths, strict=False):
        slope, middle = depth_slope(depth), runs.height // 2
        _times(left, runs, colour, marker, f"{depth} layers: slope {slope:.3f}")
        scale = runs["predicted"][middle] / runs["target"][middle] ** slope
        law(left, runs["target"], scale * runs["target"] ** slope, "")
    two = fa.filter(pl.col("depth") == 2)
    for colour, marker, (scheme, runs) in zip(COLOURS, MARKERS, each_of(two, "scheme", _SCHEMES), strict=False):
        _times(right, runs, colour, marker, scheme)
    _times(right, data.filter(pl.col("rule") == "bp"), INK, "", "gradient descent, small")
    right.axvline(CRITICAL, color=AXIS, linestyle=":", linewidth=1.2)
    for panel in (left, right):
        logarithmic(panel, "both")
        panel.legend(fontsize=8)
    return figure


def _times(panel: Axes, runs: pl.DataFrame, colour: str, marker: str, label: str) -> None:
    line = runs.sort("target")
    panel.plot(line["target"], line["predicted"], color=colour, linewidth=1.2)
    panel.plot(
        line["target"], line["learned"], color=colour, marker=marker or "x", linestyle="none", label=label, markersize=4
    )


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    return table.select("rule", "depth", "scheme", "target", "learned", "predicted").sort(
        "rule", "depth", "scheme", "target"
    )


LEARNING_TIME = Experiment(
    name="girotti2021.learning-time",
    title="How long a component takes",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“approximately learned by decreasing order”); the laws are "
    "derived",
    revision=1,
    grid={"smoke": _points(_targets(7), 201), "quick": _points(_targets(22), 401), "paper": _points(_targets(85), 801)},
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=_run,
    agreement=1e-6,
    together=("rule", "depth", "scheme", "size", "target"),
    pictures=(
        Picture(
            name="learning-time",
            caption="Time to 90 % of a component against its size λ. Left: from zero weights, by depth; dashed: the "
            "slopes -2/3, -6/7 and -14/15. Right: two layers from other starts, and gradient descent; the anti-aligned "
            "start's times rise up to λ_c = 0.19 (dotted) and past the bottleneck behind it. Points: the flow; lines: "
            "closed form and quadrature.",
            data=_picture_data,
            draw=_times_by_size,
        ),
    ),
    claims=_CLAIMS,
)
