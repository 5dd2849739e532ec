"""Convergence at a guaranteed rate, in continuous and in discrete time, tried on random starts at three depths."""

import polars as pl
import torch
from torch import Tensor

from falign.feedback import generator
from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting, grid
from falign.lab.experiment.statistics import sorted_groups
from falign.lab.report.style import INK, Figure, each_of, logarithmic, panels, sequence
from falign.papers.girotti2021._modes import paced
from falign.theory.deep_linear import (
    Modes,
    exponential_convergence,
    gradient_descent,
    gradient_flow,
    learning_time,
    modes,
    sufficient_rate,
)
from falign.theory.deep_linear._theorems_modes import step_rates

__all__ = ["CONVERGENCE"]

_KINDS = (("fa", 2), ("fa", 3), ("fa", 4), ("dfa", 3))


def _points(draws: int) -> tuple[Point, ...]:
    sizes: dict[str, Scalar] = {"draws": draws}
    kinds = [{"rule": rule, "depth": depth} for rule, depth in _KINDS]
    cases = (
        *grid(start=("positive", "any"), dynamics="flow", share=0.0, **sizes),
        *grid(start="positive", dynamics="steps", share=(0.1, 0.25), **sizes),
        *grid(start="any", dynamics="steps", share=0.99, **sizes),
    )
    return tuple({**kind, **case} for kind in kinds for case in cases)


_LENGTH, _LONG = 30.0, 5000.0
"""Length of a trajectory in units of 1/ρ_max: with positive invariants; in steps from any start, as some pass close by
a fixed point that has just vanished."""
_LEFT = 1e-3
"""Share of the component, or of the first error, at which it has converged."""
_RECORDS = 40


def _run(
    *, seed: int, setting: Setting, rule: str, depth: int, start: str, dynamics: str, share: float, draws: int
) -> Outcome:
    """Follow a batch of random starts, in units in which ρ_max is 1, so that one step size fits all."""
    initial = _sample_modes(seed, rule, depth, start, draws)
    initial = paced(initial, sufficient_rate(initial))
    return (_guaranteed if start == "positive" else _reached)(initial, dynamics, share)


def _guaranteed(initial: Modes, dynamics: str, share: float) -> Outcome:
    """Errors beside their bound; of steps only where they meet the theorem's condition on their size."""
    steps = round(_LENGTH / (share or 1))
    if dynamics == "flow":
        trajectory = gradient_flow(initial, times=torch.linspace(0, _LENGTH, _RECORDS + 1, dtype=torch.float64))
        met = torch.ones_like(initial.target, dtype=torch.bool)
    else:
        trajectory = gradient_descent(initial, rate=share, steps=steps, at=range(steps + 1))
        met = (share * step_rates(trajectory) <= 1).all(0)
    check = exponential_convergence(trajectory)
    kept = torch.linspace(0, len(trajectory.times) - 1, _RECORDS + 1).round().long()
    over = (check.measured / check.bound)[met][:, kept].amax(0)
    count = len(kept)
    return Outcome(
        records={
            "time": trajectory.times[kept].tolist(),
            "over_bound": over.tolist(),
            "met": [int(met.sum())] * count,
            "held": [_share(check.held[met])] * count,
        }
    )


def _reached(initial: Modes, dynamics: str, share: float) -> Outcome:
    """Share of the starts whose error is gone: in the flow at the predicted time, in steps after very many."""
    if dynamics == "flow":
        initial = paced(initial, learning_time(initial, _LEFT))
        error = gradient_flow(initial, times=[0.0, 1.0]).error
    else:
        error = gradient_descent(initial, rate=share, steps=(steps := round(_LONG / share)), at=[0, steps]).error
    # A start may lie almost on its target: what is left is then measured by the target.
    left = error[-1].abs() / torch.maximum(initial.target, error[0].abs())
    met = len(left)  # no condition: all of them
    return Outcome(records={"time": [0.0], "over_bound": [None], "met": [met], "held": [_share(left <= 1.001 * _LEFT)]})


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _sample_modes(seed: int, rule: str, depth: int, start: str, draws: int) -> Modes:
    """Sizes and feedback log-normal, weights normal; with positive invariants the upper weights are raised."""

    def normal(purpose: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator(seed, f"convergence {depth}", purpose)).double()

    feedback = (normal("feedback", depth - 1, draws) / 2).exp()
    weights = list(normal("weights", depth, draws))
    initial = modes(normal("target", draws).exp(), weights, feedback=list(feedback), rule=rule)  # pyright: ignore
    if start == "any":
        return initial
    # From below, each weight is raised to where its invariant with the one below is positive, by a random gap.
    factors, gaps = initial.feedback_factors, normal("gaps", depth - 1, draws).exp()
    for layer in range(depth - 1):
        ratio = factors[layer + 1] / factors[layer]
        weights[layer + 1] = ratio * (weights[layer].square() / 2 + gaps[layer])
    return initial.at(torch.stack(weights))


_KIND = ["dynamics", "rule", "depth", "share"]
_POSITIVE = pl.col("start") == "positive"
_FLOW = pl.col("dynamics") == "flow"


def _held(table: pl.DataFrame) -> Evidence:
    runs = table.unique([*_KIND, "start", "seed"], keep="first", maintain_order=True)
    checks = []
    for (dynamics, rule, depth, share), rows in sorted_groups(runs, _KIND):
        step = f", η = {share:g}/ρ_max" if dynamics == "steps" else ""
        tried, met = int(rows["draws"].sum()), int(rows["met"].sum())
        left_out = f", {tried - met} are not under the condition" if met < tried else ""
        checks.append(
            Check(
                label=f"{dynamics}, {rule}, {depth} layers{step}: share of {met} starts{left_out}",
                measured=float(rows["held"].to_numpy().mean()),
                low=1.0,
            )
        )
    return Evidence(checks=tuple(checks))


_ABSTRACT = (
    "Abstract: “convergence guarantees with rates for deep linear networks for both continuous and discrete dynamics”; "
)

_CLAIMS = (
    Claim(
        name="guaranteed-flow",
        statement="In continuous time |e(t)| ≤ |e(0)| exp(-t ΠK_l) for every component all of whose invariants K_l are "
        "positive, at any depth.",
        reference=_ABSTRACT + "the paper's constants are not readable, this rate is derived",
        quotation="We provide convergence guarantees with rates for deep linear networks for both continuous and "
        "discrete dynamics.",
        method="Share of random starts for which it holds at all times recorded.",
        tolerance_reason="Every one.",
        read=_held,
        scope=_POSITIVE & _FLOW,
    ),
    Claim(
        name="guaranteed-steps",
        statement="In steps |e(t)| ≤ |e(0)| (1 - ηΠK_l)^t, with the invariants of the last step, at any depth.",
        reference=_ABSTRACT + "the paper's constants are not readable, this rate is derived",
        quotation="We provide convergence guarantees with rates for deep linear networks for both continuous and "
        "discrete dynamics.",
        method="Share of random starts for which it holds at all steps, of those with ηρ̂ ≤ 1 along the path, ρ̂ the "
        "exact rate of a step.",
        tolerance_reason="Every one.",
        read=_held,
        scope=_POSITIVE & ~_FLOW,
    ),
    Claim(
        name="converges-from-anywhere",
        statement="Components converge from any start, invariants of either sign, at any depth.",
        reference=_ABSTRACT + "in continuous time derived, in steps observed",
        quotation="We provide convergence guarantees with rates for deep linear networks for both continuous and "
        "discrete dynamics.",
        method="Share of random starts with at most a thousandth of the error left: in continuous time at the time "
        "predicted for that, in 5000 steps of 0.99/ρ_max.",
        tolerance_reason="Every one.",
        read=_held,
        scope=~_POSITIVE,
    ),
)


def _bounds(data: pl.DataFrame) -> Figure:
    """A panel a rule and depth."""
    figure, axes = panels(
        len(_KINDS),
        titles=[f"{rule}, {depth} layers" for rule, depth in _KINDS],
        xlabels=["time × ρ_max"],
        ylabels=["error / bound, largest"],
        share="all",
        height=2.6,
    )
    for panel, (rule, depth) in zip(axes, _KINDS, strict=True):
        runs = data.filter((pl.col("rule") == rule) & (pl.col("depth") == depth) & pl.col("over_bound").is_finite())
        shares = each_of(runs, "share")
        for colour, (share, line) in zip((INK, *sequence(len(shares) - 1)), shares, strict=False):
            label = f"steps, η = {share:g}/ρ_max" if share else "flow"
            panel.plot(line["time"], line["over_bound"], color=colour, linewidth=1.4, label=label)
        logarithmic(panel, "y")
        panel.set_ylim(1e-3, 2)
    axes[0].legend()
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    bound = table.filter(pl.col("start") == "positive")
    keys = ["rule", "depth", "dynamics", "share", "time"]
    return bound.group_by(keys).agg(pl.col("over_bound").max()).sort(keys)


CONVERGENCE = Experiment(
    name="girotti2021.convergence",
    title="Convergence at a rate",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“convergence guarantees with rates”); the theorems are "
    "derived",
    revision=1,
    grid={"smoke": _points(4), "quick": _points(20), "paper": _points(200)},
    seeds={"smoke": 1, "quick": 2, "paper": 15},
    run=_run,
    together=("rule", "depth", "start", "dynamics", "share"),
    at_most=15,
    pictures=(
        Picture(
            name="convergence",
            caption="The largest error of all random starts with K_l > 0 over the guaranteed "
            "|e(0)| exp(-t ΠK_l), in continuous time, and in steps, |e(0)| (1 - ηΠK_l)^t; units in which ρ_max = 1.",
            data=_picture_data,
            draw=_bounds,
        ),
    ),
    claims=_CLAIMS,
)
