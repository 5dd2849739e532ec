"""Training of a block of networks by steps or by gradient flow, with measurements recorded by name."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign._validation import describe, positive, recording_steps, recording_times
from falign.theory._coerce import outermost, recording
from falign.theory._simulate import (
    RecordedInTime,
    integrate,
    judged,
    measurements_named,
    never,
    record,
    stacked,
    warn_of_divergence,
)
from falign.theory.conservation import _law
from falign.theory.conservation._network import Dynamics, Points, State, count_steps, gradients, loss_of, velocity

# Measurements of a network on its way.

Measurement = Callable[[State, Dynamics, Tensor, Tensor], Tensor]


def _descent(state: State, dynamics: Dynamics, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Measure the true gradient g and the rule's f, per layer [runs layers] with biases included, and D."""
    true, taken = gradients(state, dynamics, X, y, true=True), gradients(state, dynamics, X, y)
    rates = state.W[0].new_tensor(dynamics.of_layers(state)[0])
    descent, square = _dot(true, taken), _dot(true, true)
    return {
        "descent": descent,
        "gradient_norm": square.sqrt(),
        "taken_norm": _dot(taken, taken).sqrt(),
        "dominance": (rates * descent)[:, :-1].sum(-1) / (rates * square)[:, -1],
    }


def _dot(one: State, other: State) -> Float[Tensor, "runs layers"]:
    """Return the inner products of two gradients, a layer's weights and bias together."""
    weights = torch.stack([(a * b).sum((-1, -2)) for a, b in zip(one.W, other.W, strict=True)], -1)
    if not one.b:
        return weights
    return weights + torch.stack([(a * b).sum(-1) for a, b in zip(one.b, other.b, strict=True)], -1)


def _part(name: str) -> Measurement:
    return lambda state, dynamics, X, y: _descent(state, dynamics, X, y)[name]


EXPECTED_CHANGE = "expected_change"
"""Name of the change of C since the start [runs neurons] by the exact identity, which is summed on the way."""

MEASUREMENTS: dict[str, Measurement] = {
    "loss": loss_of,
    "incoming": lambda state, dynamics, X, y: _law.incoming(state, dynamics),
    "alignment_term": lambda state, dynamics, X, y: _law.alignment_term(state, dynamics),
    "invariant": lambda state, dynamics, X, y: _law.invariant(state, dynamics),
    "alignment": lambda state, dynamics, X, y: _law.alignment(state, dynamics),
    "map": lambda state, dynamics, X, y: reduce(lambda below, W: W @ below, state.W),
    **{name: _part(name) for name in ("descent", "gradient_norm", "taken_norm", "dominance")},
}
"""name -> measurement at a state.

``loss`` and ``dominance`` D [runs]; ``incoming`` P, ``alignment_term`` V,
``invariant`` C and ``alignment`` ⟨M, W⟩ [runs neurons]; ``descent`` ⟨g_l, f_l⟩, ``gradient_norm`` |g_l| and
``taken_norm`` |f_l| [runs layers], of a layer's weights and bias. Where layers differ in rate, D weighs each
by its rate. ``map`` W_L…W_1 [runs outputs inputs]: what a network with linear activations and no biases computes.
"""


_UNDEFINED = {"dominance"}
"""Measurements that may be no number of a finite network: where the last layer's gradient is 0."""


@dataclass(frozen=True, kw_only=True)
class Trajectory(RecordedInTime):
    """Measurements of a block of runs along their training, read by name: ``trajectory["loss"]``.

    Attributes:
        dynamics: Rule, activation, loss, rates and decays.
        start: The networks before training.
        end: The networks after it.
        rate: η of the steps; 0 in gradient flow.
        times: Recorded times [times]; of steps, η times their number.
        values: name -> [runs times …], the measurements that were asked for; nan from where a run diverged.
        diverged: The recorded step at which a run was first not finite, -1 where it always was.
        lost: name -> the same of this measurement, and of "weights".
    """

    what: ClassVar[str] = "networks under the conservation law"

    dynamics: Dynamics
    start: State
    end: State


@recording
def gradient_descent(
    state: State,
    dynamics: Dynamics,
    X: Points,
    y: Points,
    *,
    rate: float,
    steps: int | Int[Tensor, "steps batch"],
    names: Sequence[str],
    at: Sequence[int] | None = None,
) -> Trajectory:
    """Train by steps ``W ← W + η Ẇ`` on batches, all runs on the same ones.

    Feedback that follows the weights (adafa) moves towards them before each pass, with ``α = ηρ``; learned feedback
    (kp) moves in the step, with the gradient and decay of W.

    Args:
        state: The networks at the start.
        dynamics: Rule, activation, loss, layers' rates and decays.
        X: Inputs.
        y: Targets.
        rate: η.
        steps: Number of steps on all points, or the indices of the points of each batch.
        names: Measurements to record: keys of ``MEASUREMENTS``, taken on all points, and ``expected_change``.
        at: Steps to record at, increasing, the last at most ``steps``; None for about 100, evenly.

    Raises:
        ValueError: η is not positive, a name is unknown, the data do not fit the network or are not finite, or the
            batches or the recording steps are out of order or range.

    Warns:
        UserWarning: a run is no longer finite; the first recorded step from which on is named.
    """
    positive("rate", rate)
    names = measurements_named(names, [*MEASUREMENTS, EXPECTED_CHANGE])
    loss_of(state, dynamics, X, y)  # refuses data that do not fit the network
    count = count_steps(steps, X.shape[-2])
    at = recording_steps(count, at)
    now, taken, expected = state, 0, torch.zeros_like(_law.incoming(state, dynamics))
    finite: list[Tensor] = []

    def advance(count: int) -> None:
        nonlocal now, taken, expected
        for step in range(taken, taken + count):
            points = steps[step] if isinstance(steps, Tensor) else slice(None)
            moved, after = _step(now, dynamics, X[..., points, :], y[..., points, :], rate)
            if EXPECTED_CHANGE in names:
                expected = expected + _law.expected_change(now, after, dynamics, rate, moved)
            now = after
        taken += count

    def measure() -> dict[str, Tensor]:
        finite.append(torch.stack([part.isfinite().flatten(1).all(1) for part in now.W]).all(0))
        return _measured(names, now, expected, dynamics, X, y)

    found = judged(record(at, advance, measure), at, undefined=_UNDEFINED, weights=torch.stack(finite, 1))
    if outermost():  # a public function that called this one says it itself, with a rate that would do
        warn_of_divergence(found["diverged"], found["lost"])
    times = rate * torch.tensor(at, dtype=torch.float64)
    return Trajectory(dynamics=dynamics, start=state, end=now, rate=rate, times=times, **found)


@recording
def gradient_flow(
    state: State,
    dynamics: Dynamics,
    X: Points,
    y: Points,
    *,
    times: Float[Tensor, " times"],
    names: Sequence[str],
    tolerance: float = 1e-9,
    longest: int = 20_000,
) -> Trajectory:
    """Train by gradient flow on all points, integrated with adaptive steps, the expected change of C along with it.

    Exact to the tolerance for linear networks. Under relu and the other activations with a kink the right-hand side
    jumps wherever a neuron switches at a point, which costs tens of evaluations each; where it is pushed back from
    both sides it slides along the kink, and adaptive steps stall. ``gradient_descent`` with a small η has no such
    trouble.

    Args:
        state: The networks at the start, in float64.
        dynamics: Rule, activation, loss, layers' rates and decays.
        X: Inputs.
        y: Targets.
        times: Times to record at, increasing from 0.
        names: Measurements to record: keys of ``MEASUREMENTS``, and ``expected_change``.
        tolerance: Relative error of one step; the absolute one is a hundredth of it.
        longest: Most evaluations of the velocity.

    Raises:
        ValueError: a name is unknown, the data do not fit the network or are not finite, the state is not in float64,
            or the times do not increase from 0.
        RuntimeError: the integration stopped because the weights diverge, or needed more than ``longest`` evaluations.
    """
    names = measurements_named(names, [*MEASUREMENTS, EXPECTED_CHANGE])
    loss_of(state, dynamics, X, y)  # refuses data that do not fit the network
    if state.W[0].dtype != torch.float64:
        raise ValueError(f"the state is in {state.W[0].dtype}: gradient flow is integrated in float64")
    times = recording_times(times)
    if positive("tolerance", tolerance) >= 1:
        raise ValueError(f"tolerance is {describe(tolerance)}, expected a relative error, below 1")
    positive("longest", longest)
    # The expected change of C is integrated along, as one more matrix: at the times it is then as exact as the weights.
    expected = torch.zeros_like(_law.incoming(state, dynamics)).unsqueeze(-1)
    beginning = state._replace(W=(*state.W, expected))

    def split(parts: Iterable[Tensor]) -> tuple[State, Tensor]:
        following = iter(parts)
        whole = beginning.map(lambda _: next(following))
        return whole._replace(W=whole.W[:-1]), whole.W[-1][..., 0]

    def motion(parts: tuple[Tensor, ...]) -> Iterable[Tensor]:
        here, _ = split(parts)
        moves = velocity(here, dynamics, X, y)
        gain = _law.expected_rate(here, moves, dynamics)
        return (*moves.W, gain.unsqueeze(-1), *moves.b, *moves.B)

    states = integrate(
        motion,
        (*beginning.W, *beginning.b, *beginning.B),
        times,
        tolerance=tolerance,
        longest=longest,
        advice="allow more (longest), a larger tolerance, or use gradient_descent with a small rate",
        diverging="weights",
        # Of a kinked activation the right-hand side jumps: a high order would only make more steps fail.
        method="DOP853" if dynamics.activation.smooth else "RK45",
    )
    pairs = [split(parts) for parts in states]
    values = stacked([_measured(names, here, change, dynamics, X, y) for here, change in pairs])
    kept = never(len(state.W[0]))
    return Trajectory(
        dynamics=dynamics, start=state, end=pairs[-1][0], rate=0.0, times=times, values=values, diverged=kept
    )


def _measured(
    names: Sequence[str], state: State, expected: Tensor, dynamics: Dynamics, X: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Measure at a state what was asked for by name."""
    return {name: expected if name == EXPECTED_CHANGE else MEASUREMENTS[name](state, dynamics, X, y) for name in names}


def _step(state: State, dynamics: Dynamics, X: Tensor, y: Tensor, rate: float) -> tuple[State, State]:
    """Return the state with the feedback of the pass, and the state after the step."""
    if dynamics.rule.follows:
        pairs = zip(state.B, state.W[1:], strict=True)  # the feedback moves before the weights do: their Ẇ is 0
        moved = (B + rate * dynamics.rule.motion(B, W, torch.zeros_like(W), 0.0, dynamics.tracking) for B, W in pairs)
        state = state._replace(B=tuple(moved))
    moves = velocity(state, dynamics, X, y)
    after = state.map(lambda value, change: value + rate * change, moves)
    return state, after._replace(B=state.B) if dynamics.rule.follows else after
