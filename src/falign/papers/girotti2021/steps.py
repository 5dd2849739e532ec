"""Steps of gradient descent beside its flow, at shares of the largest stable step size."""

from collections.abc import Sequence
from math import isfinite
from warnings import catch_warnings, simplefilter

import polars as pl
import torch
from torch import Tensor

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import final, largest, sorted_groups
from falign.lab.report.style import AXIS, COLOURS, INK, Figure, each_of, panels, thinned
from falign.papers.girotti2021._modes import batches, exponent, paced
from falign.theory.deep_linear import (
    Modes,
    asymptotic_rate,
    conserved_invariants,
    error_recursion,
    gradient_descent,
    gradient_flow,
    stable_rate,
)
from falign.theory.statement import TheoremCheck

__all__ = ["STEPS"]

_STARTS = (("zero", 1.0, 2), ("positive", 1.0, 2), ("anti-aligned", 1.0, 2), ("zero", 1.0, 3))


def _points(targets: Sequence[float], shares: Sequence[float], steps: int) -> tuple[Point, ...]:
    return tuple(
        point
        for scheme, size, depth in _STARTS
        for point in grid(
            rule="fa", depth=depth, scheme=scheme, size=size, target=_sizes(scheme, targets), share=shares, steps=steps
        )
    )


def _sizes(scheme: str, targets: Sequence[float]) -> tuple[float, ...]:
    """From the anti-aligned start also a component below λ_c."""
    return (0.1, *targets) if scheme == "anti-aligned" else tuple(targets)


_TOLERATED = 1e-12
"""Share that the identities' bounds allow of the sizes that are in them."""


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    rule: Sequence[str],
    depth: Sequence[int],
    scheme: Sequence[str],
    size: Sequence[float],
    target: Sequence[float],
    share: Sequence[float],
    steps: int,
) -> list[Outcome]:
    """Runs of a depth together, each in units of its step size, so that every step is one unit of time."""
    outcomes: dict[int, Outcome] = {}
    for places, initial in batches(rule, depth, scheme, size, target):
        shares = torch.tensor([share[place] for place in places], dtype=torch.float64)
        rates = shares * _stable(initial)
        paced_modes = paced(initial, rates)
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # beyond the stable rate is what some runs are about
            trajectory = gradient_descent(paced_modes, rate=1.0, steps=steps, at=range(steps + 1))
        flow = gradient_flow(paced_modes, times=trajectory.times).share
        columns = {
            "learned": trajectory.share,
            "flow": flow,
            "drift": (trajectory.invariants - trajectory.invariants[0])[:, 0] / rates ** (1 / (initial.depth - 1)),
        }
        left = {"account_left": conserved_invariants(trajectory), "recursion_left": error_recursion(trajectory)}
        settling = asymptotic_rate(initial) * rates
        for column, place in enumerate(places):
            count = int(trajectory.error[:, column].isfinite().sum())
            records = {name: values[:count, column].tolist() for name, values in columns.items()}
            records |= {name: [_relative(check, column)] * count for name, check in left.items()}
            outcomes[place] = Outcome(
                records={
                    "step": list(range(count)),
                    "time": (rates[column] * trajectory.times[:count]).tolist(),
                    "settling": [float(settling[column])] * count,
                    "diverged": [int(trajectory.diverged[column])] * count,
                    **records,
                }
            )
    return [outcomes[place] for place in range(len(seeds))]


def _stable(initial: Modes) -> Tensor:
    """η_max of each; starts that are the same are looked up once."""
    # η_max is found by trial on the recursion, which is slow: runs of one component at many shares of it have one.
    numbers = torch.cat([initial.weights, initial.target[None]])
    _, which = numbers.unique(dim=1, return_inverse=True)
    first = torch.stack([(which == kind).int().argmax() for kind in range(int(which.max()) + 1)])
    return stable_rate(initial.take(first))[which]


def _relative(check: TheoremCheck, run: int) -> float | None:
    """Residual of an identity, relative to the sizes of what is in it; None for a run that was not finite."""
    left = float((check.measured[run] / check.bound[run]).max()) * _TOLERATED
    return left if isfinite(left) else None


_RUN = ["scheme", "depth", "target", "share"]
_LEARNED = 1e-4
_UNIVERSAL = 0.769
"""η_max ρ*/2 of two layers from zero weights, for every component."""
_SLOW = 0.1
"""Shares of η_max up to which the first order in η is looked at."""


def _missing(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run, at its end: what is missing of the component."""
    return final(table, by=_RUN).with_columns(missing=(1 - pl.col("learned")).abs())


def _converges(table: pl.DataFrame) -> Evidence:
    kinds = [
        (f"{scheme}, {depth} layers, η = {share:g} η_max", runs)
        for (scheme, depth, share), runs in sorted_groups(_missing(table), ["scheme", "depth", "share"])
    ]
    return largest(kinds, "missing", _LEARNED, label="{label}: most of {rows}")


def _fails_to_converge(table: pl.DataFrame) -> Evidence:
    ends = _missing(table).with_columns(still=pl.when(pl.col("diverged") >= 0).then(1.0).otherwise(pl.col("missing")))
    return Evidence(
        checks=tuple(
            Check(
                label=f"{depth} layers, η = {share:g} η_max: least of {runs.height}",
                measured=float(runs["still"].to_numpy().min()),
                low=_LEARNED,
            )
            for (depth, share), runs in sorted_groups(ends, ["depth", "share"])
        ),
        note=f"{int((ends['diverged'] >= 0).sum())} of {ends.height} left the finite numbers, which counts as 1",
    )


def _universal(table: pl.DataFrame) -> Evidence:
    runs = final(table, by=_RUN).with_columns(half=pl.col("settling") / pl.col("share") / 2)
    return Evidence(
        checks=tuple(
            Check(
                label=f"λ = {target:g}",
                measured=float(rows["half"].to_numpy().mean()),
                low=_UNIVERSAL - 1e-3,
                high=_UNIVERSAL + 1e-3,
            )
            for (target,), rows in sorted_groups(runs, ["target"])
        )
    )


def _first_order(table: pl.DataFrame) -> Evidence:
    far = table.with_columns(far=(pl.col("learned") - pl.col("flow")).abs())
    return _exponents_of_the_step(far.group_by(_RUN).agg(pl.col("far").max()), "far")


def _drifts(table: pl.DataFrame) -> Evidence:
    """Exponent of the fall of K in η; a rise would have no logarithm."""
    return _exponents_of_the_step(final(table, by=_RUN).with_columns(fall=-pl.col("drift")), "fall")


def _exponents_of_the_step(runs: pl.DataFrame, column: str) -> Evidence:
    """Exponent of η in a column, for every component and start."""
    checks = []
    for (scheme, depth, target), rows in sorted_groups(runs, ["scheme", "depth", "target"]):
        if rows.height < 2:
            raise Missing(f"a slope needs two step sizes up to {_SLOW:g} η_max, got {rows.height}")
        label, measured = (
            f"{scheme}, {depth} layers, λ = {target:g}: exponent of η",
            exponent(rows["share"], rows[column]),
        )
        checks.append(Check(label=label, measured=measured, low=0.8, high=1.2))
    return Evidence(checks=tuple(checks))


_BELOW = pl.col("share") < 1
_ABSTRACT = "Abstract: convergence guarantees “for both continuous and discrete dynamics”; "

_CLAIMS = (
    Claim(
        name="steps-converge",
        statement="In steps every component converges, from every start tried, if the step size is below the largest "
        "stable one.",
        reference=_ABSTRACT + "the bound on the step size is not readable, η_max is ours",
        method="What is missing of the component, |1 - θ_L…θ_1/λ|, at the end; the most.",
        tolerance_reason=f"At most {_LEARNED:g}.",
        read=_converges,
        scope=_BELOW,
    ),
    Claim(
        name="steps-diverge",
        statement="Beyond that step size they do not converge: η_max is sharp.",
        origin="theory",
        reference="Derived",
        method="What is missing of the component at the end, from zero weights; the least.",
        tolerance_reason=f"More than {_LEARNED:g}.",
        read=_fails_to_converge,
        scope=~_BELOW & (pl.col("scheme") == "zero"),
    ),
    Claim(
        name="step-universal",
        statement="From zero weights η_max is 0.769 × 2/ρ*, whatever the component: the largest one limits the step "
        "size.",
        origin="theory",
        reference="Derived: by scaling; the number is measured",
        headline="largest stable step, in units of 2/ρ*",
        method="η_max ρ*/2.",
        tolerance_reason="± 0.001.",
        read=_universal,
        scope=_BELOW & (pl.col("scheme") == "zero") & (pl.col("depth") == 2),
    ),
    Claim(
        name="steps-follow-the-flow",
        statement="Steps follow the flow, to first order in their size.",
        reference=_ABSTRACT + "the order is Euler's",
        method="Slope of the logarithm of the largest distance from the flow against log η, for η ≤ 0.1 η_max.",
        tolerance_reason="1 ± 0.2, the next order.",
        read=_first_order,
        scope=pl.col("share") <= _SLOW,
    ),
    Claim(
        name="invariant-drifts",
        statement="K = θ_2 - θ_1²/(2m) only falls, by an amount of first order in η: the flow conserves it.",
        origin="theory",
        reference="Derived",
        method="Slope of the logarithm of K_1(0) - K_1(t) at the end against log η, for η ≤ 0.1 η_max.",
        tolerance_reason="1 ± 0.2, the next order. A rise would have no logarithm.",
        read=_drifts,
        scope=pl.col("share") <= _SLOW,
    ),
)

_MOST = 5


def _beside_the_flow(data: pl.DataFrame) -> Figure:
    """Shares learned over time."""
    shares = sorted(data["share"].unique().to_list())
    wanted = [share for share in (0.1, 0.5, 0.9, 1.02, 1.1) if share in shares] or shares[-_MOST:]
    figure, axes = panels(
        len(wanted),
        titles=[f"η = {share:g} η_max" for share in wanted],
        xlabels=["time"],
        ylabels=["share learned"],
        share="all",
        height=2.6,
    )
    flow = data.filter(pl.col("share") == shares[0]).sort("time")
    for panel, (_, runs) in zip(axes, each_of(data, "share", wanted), strict=True):
        line = runs.sort("step").filter(pl.col("time") <= 12)
        panel.plot(flow["time"], flow["flow"], color=INK, linewidth=1.2, label="flow")
        panel.plot(
            line["time"], line["learned"], color=COLOURS[1], marker="o", markersize=3, linewidth=0.9, label="steps"
        )
        panel.axhline(1, color=AXIS, linewidth=0.8, zorder=0)
        panel.set_xlim(0, 12)
        panel.set_ylim(-0.6, 2.4)
        panel.set_xticks(thinned(list(range(13)), 5))
    axes[0].legend(loc="upper right")
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    one = (pl.col("depth") == 2) & (pl.col("scheme") == "zero") & (pl.col("target") == 1.0)
    return table.filter(one).select("share", "step", "time", "learned", "flow").sort("share", "step")


STEPS = Experiment(
    name="girotti2021.steps",
    title="Steps beside the flow",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“continuous and discrete dynamics”); the conditions are "
    "derived",
    revision=1,
    grid={
        "smoke": _points((1.0,), (0.05, 0.1, 0.5, 0.9, 1.1), 400),
        "quick": _points((0.5, 1.0, 5.0), (0.05, 0.1, 0.5, 0.9, 1.1), 600),
        "paper": _points(
            (0.2, 0.5, 1.0, 5.0, 20.0), (0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.02, 1.1), 3000
        ),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=_run,
    agreement=1e-6,
    together=("scheme", "size", "depth", "target", "share"),
    pictures=(
        Picture(
            name="steps",
            caption="A component of size 1 from zero weights, two layers: in steps (points), at shares of the largest "
            "stable step size η_max, and in continuous time (line).",
            data=_picture_data,
            draw=_beside_the_flow,
        ),
    ),
    claims=_CLAIMS,
)
