"""The conservation laws of attention, simulated: neurons, one layer of attention, neurons, with gradients by hand.

For every head, ``W_Q W_Qᵀ - W_K W_Kᵀ`` is constant in gradient flow, under every rule and for any function of the
scores: the error reaches queries and keys through their product alone, and no B is between them. Where the weights of
the values are homogeneous of degree p in the scores (relu, not softmax), so is ``½|W_Q|² - p ½|W_V|²``. The laws in
which feedback is are those of layers: ``W_V W_Vᵀ - BᵀW_O - W_OᵀB`` of the values, one number a neuron below and above.

``draw`` a start, train it by ``gradient_descent`` (steps, for which every law is an exact identity) or by
``gradient_flow``, and try each law by ``conservation``. The laws are stated as ours.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import (
    as_list,
    check_floating,
    check_memory,
    is_whole,
    positive,
    recording_steps,
    recording_times,
)
from falign.feedback import generator
from falign.theory._coerce import outermost, public, recording
from falign.theory._simulate import RecordedInTime, integrate, judged, never, record, stacked, warn_of_divergence
from falign.theory.conservation import Dynamics
from falign.theory.statement import Assumption, TheoremCheck

__all__ = [
    "Block",
    "Law",
    "Scores",
    "Trajectory",
    "conservation",
    "draw",
    "gradient_descent",
    "gradient_flow",
    "gradients",
    "invariants",
]

Law = Literal["neurons", "queries", "scores", "values", "outputs"]
"""The laws, from the input up; under direct rules those of ``neurons`` and ``values`` are none."""

Scores = Literal["softmax", "relu", "squared", "linear", "normalised"]
"""What is made of the scores of a query; ``squared`` is relu(s)², ``normalised`` abs(s) / Σ abs(s)."""


class _Function(NamedTuple):
    """A function of the scores s over the keys, in the last axis.

    Attributes:
        value: s -> A, the weights of the values.
        error: (s, A, error at A) -> error at s.
        degree: p with ``A(c s) = c^p A(s)`` for c > 0; None where there is none.
    """

    value: Callable[[Tensor], Tensor]
    error: Callable[[Tensor, Tensor, Tensor], Tensor]
    degree: float | None = None


_FUNCTIONS: dict[Scores, _Function] = {
    "softmax": _Function(lambda s: s.softmax(-1), lambda s, A, e: A * (e - (A * e).sum(-1, keepdim=True))),
    "relu": _Function(torch.relu, lambda s, A, e: e * (s > 0), 1.0),
    "squared": _Function(lambda s: torch.relu(s) ** 2, lambda s, A, e: 2 * e * torch.relu(s), 2.0),
    "linear": _Function(torch.clone, lambda s, A, e: e.clone(), 1.0),
    "normalised": _Function(
        lambda s: s.abs() / s.abs().sum(-1, keepdim=True),
        lambda s, A, e: s.sign() * (e - (A * e).sum(-1, keepdim=True)) / s.abs().sum(-1, keepdim=True),
        0.0,
    ),
}

# The block and how it learns.


class Block(NamedTuple):
    """Weights and feedback of a block of runs, the bias of each map in its last column; gradients are Blocks as well.

    ``x = φ(E x_0)`` at every position; per head ``q = Q x``, ``k = K x``, ``v = V x``, scores ``q kᵀ / √d`` and
    ``a = A v``, the values weighed; over all heads ``z = φ(O a)``, and the output ``f = R z``, a mean over positions.

    Attributes:
        E: Into the neurons below [runs width inputs+1].
        Q: Queries [runs heads d width+1].
        K: Keys.
        V: Values.
        O: Into the neurons above [runs above heads·d+1].
        R: Readout [runs outputs above+1].
        B: Feedback of Q, K, V, O and R as the rule stores it, without a column for the bias; empty where there is none.
    """

    E: Float[Tensor, "runs _ _"]
    Q: Float[Tensor, "runs _ _ _"]
    K: Float[Tensor, "runs _ _ _"]
    V: Float[Tensor, "runs _ _ _"]
    O: Float[Tensor, "runs _ _"]  # noqa: E741  (the letter of papers)
    R: Float[Tensor, "runs _ _"]
    B: tuple[Tensor, ...] = ()

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """E, Q, K, V, O and R."""
        return self[:6]

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Q, K, V, O and R without their biases: what carries an error down."""
        return tuple(W[..., :-1] for W in self[1:6])


@public
def draw(
    *,
    seeds: Sequence[int],
    dynamics: Dynamics,
    inputs: int = 3,
    width: int = 6,
    heads: int = 2,
    d: int = 3,
    above: int = 5,
    outputs: int = 2,
    scale: float = 1.0,
) -> Block:
    """Draw a start: independent normal entries of variance 1/inputs of each map, biases too, in float64.

    Args:
        seeds: One run each.
        dynamics: Its rule makes the feedback from the draw.
        inputs: Features of x_0.
        width: Neurons below.
        heads: Heads of attention.
        d: Width of a head.
        above: Neurons above.
        outputs: Of the readout.
        scale: Factor of all weights.

    Raises:
        ValueError: a number is below 1 or not whole, or there is no seed.
    """
    seeds, sizes = as_list("seeds", seeds), (inputs, width, heads, d, above, outputs)
    if not seeds or not all(is_whole(size) and size >= 1 for size in sizes):
        raise ValueError(f"a block needs a seed and sizes from 1, got {len(seeds)} seeds and {list(sizes)}")
    for pair in ((width, inputs), (3 * heads * d, width), (above, heads * d), (outputs, above)):
        check_memory("a map a run", len(seeds), *pair)

    def normal(purpose: str, *shape: int) -> Tensor:
        drawn = [torch.randn(shape, generator=generator(seed, "attention", purpose)) for seed in seeds]
        return torch.stack(drawn).double() / sqrt(shape[-1])

    attended = (heads, d, width)
    shapes = {"Q": attended, "K": attended, "V": attended, "O": (above, heads * d), "R": (outputs, above)}
    below = {name: (outputs, shape[-1]) if dynamics.rule.direct else shape for name, shape in shapes.items()}
    make = dynamics.rule.init_feedback
    weights = (
        scale * normal(f"W{name}", *shape[:-1], shape[-1] + 1)
        for name, shape in {"E": (width, inputs), **shapes}.items()
    )
    return _block(weights, [make(normal(f"B{name}", *shape)) for name, shape in below.items()] if make else ())


@public
def gradients(
    block: Block,
    dynamics: Dynamics,
    X: Float[Tensor, "n positions inputs"],
    y: Float[Tensor, "n outputs"],
    *,
    scores: Scores,
) -> Block:
    """Return the gradients of all weights as the rule computes them, written out; B is empty.

    Queries, keys and values get the true derivative of ``a = A v`` for the error that is handed to a.

    Args:
        block: The weights.
        dynamics: Activation, rule and loss.
        X: Inputs.
        y: Targets.
        scores: What is made of the scores.
    """
    _check(block, dynamics, X, y)
    slope, width = dynamics.activation.slope, block.Q.shape[2]
    x0 = _with_one(X.expand(len(block.E), *X.shape))
    below = torch.einsum("rij,rntj->rnti", block.E, x0)
    x = _with_one(dynamics.activation.value(below))
    q, k, v = (torch.einsum("rhij,rntj->rhnti", W, x) for W in (block.Q, block.K, block.V))
    s = q @ k.mT / sqrt(width)
    function = _FUNCTIONS[scores]
    A = function.value(s)
    a = _with_one((A @ v).movedim(1, 3).flatten(3))
    above = torch.einsum("rij,rntj->rnti", block.O, a)
    z = _with_one(dynamics.activation.value(above))
    f = torch.einsum("rij,rntj->rnti", block.R, z).mean(2)
    at_output = (dynamics.loss.error(f, y) / X.shape[1])[:, :, None].expand(*z.shape[:3], -1)

    MQ, MK, MV, MO, MR = _feedback_matrices(block, dynamics)
    direct = dynamics.rule.direct
    at_above = slope(above) * torch.einsum("rnti,rij->rntj", at_output, MR)
    at_a = torch.einsum("rnti,rij->rntj", at_output if direct else at_above, MO)
    at_a = at_a.unflatten(3, (block.Q.shape[1], width)).movedim(3, 1)
    at_s = function.error(s, A, at_a @ v.mT) / sqrt(width)
    at_q, at_k, at_v = at_s @ k, at_s.mT @ q, A.mT @ at_a
    if direct:
        at_x = torch.einsum("rnti,rij->rntj", at_output, MQ + MK + MV)
    else:
        pairs = ((at_q, MQ), (at_k, MK), (at_v, MV))
        at_x = sum((torch.einsum("rhnti,rhij->rntj", error, M) for error, M in pairs), torch.zeros_like(below))
    at_below = slope(below) * at_x
    attended = (torch.einsum("rhnti,rntj->rhij", error, x) for error in (at_q, at_k, at_v))
    around = (torch.einsum("rnti,rntj->rij", *pair) for pair in ((at_below, x0), (at_above, a), (at_output, z)))
    E, O, R = around  # noqa: E741
    return _block((E, *attended, O, R))


def _block(weights: Iterable[Tensor], B: Iterable[Tensor] = ()) -> Block:
    E, Q, K, V, O, R = weights  # noqa: E741
    return Block(E, Q, K, V, O, R, tuple(B))


def _feedback_matrices(block: Block, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """Return M of Q, K, V, O and R: the matrix by which each hands the error down."""
    return tuple(dynamics.rule.feedback_matrix(B, W) for B, W in zip(_stored(block, dynamics), block.maps, strict=True))


def _stored(block: Block, dynamics: Dynamics) -> tuple[Tensor, ...]:
    return block.maps if dynamics.rule.init_feedback is None and not block.B else block.B


# The laws.


@public
def invariants(block: Block, dynamics: Dynamics, *, scores: Scores) -> dict[str, Tensor]:
    """Return what gradient flow conserves, by law.

    Biases count as columns of their weights; T(W) is the matrix whose diagonal is the alignment term V of the rule, as
    ``½(BᵀW + WᵀB)`` of fa, ``½WᵀW`` of bp and ``½(BᵀW + WᵀB - WᵀW)`` of kp.

    - ``neurons`` [runs width]: ``½|e_k|² - V_k(Q) - V_k(K) - V_k(V)``.
    - ``queries`` [runs heads d d]: ``½(Q Qᵀ - K Kᵀ)``.
    - ``scores`` [runs heads]: ``½|Q|² - p ½|V|²``, p the degree of the scores (1 where there is none).
    - ``values`` [runs heads d d]: ``½V Vᵀ - T(O)`` of each head.
    - ``outputs`` [runs above]: ``½|o_k|² - V_k(R)``.

    Proof: with δ the errors and G the gradients, ``G_Q Qᵀ = Σδ_q qᵀ``, of which ``δ_q = δ_s k`` makes ``Σδ_s k qᵀ =
    Σk δ_kᵀ = (G_K Kᵀ)ᵀ``. ``G_V Vᵀ = Σδ_v vᵀ = Σδ_a aᵀ = M_Oᵀ G_O``, as ``δ_v = Aᵀδ_a`` and ``a = A v``. By Euler
    ``Σδ_s s = p Σδ_A A = p Σδ_a a``, and the two sides are ``⟨Q, G_Q⟩`` and ``p ⟨V, G_V⟩``.

    Source: derived here.
    """
    _check_block(block, dynamics)
    degree = _FUNCTIONS[scores].degree
    p = 1.0 if degree is None else degree
    laws: dict[str, Tensor] = {
        "queries": (block.Q @ block.Q.mT - block.K @ block.K.mT) / 2,
        "scores": (block.Q.square().sum((-1, -2)) - p * block.V.square().sum((-1, -2))) / 2,
        "outputs": block.O.square().sum(-1) / 2 - _aligned(block, dynamics, 4),
    }
    if not dynamics.rule.direct:
        fed = sum(_aligned(block, dynamics, place).sum(1) for place in range(3))
        laws["neurons"] = block.E.square().sum(-1) / 2 - fed
        laws["values"] = block.V @ block.V.mT / 2 - _alignment_matrix(block, dynamics)
    return laws


def _aligned(block: Block, dynamics: Dynamics, place: int) -> Tensor:
    """Return V of every input of one of Q, K, V, O and R."""
    return dynamics.rule.alignment_term(_stored(block, dynamics)[place], block.maps[place]).sum(-2)


def _by_heads(matrix: Tensor, block: Block) -> Float[Tensor, "runs heads above d"]:
    """Split the columns of O, or of its feedback, by heads."""
    return matrix.unflatten(-1, block.Q.shape[1:3]).movedim(-2, 1)


def _alignment_matrix(block: Block, dynamics: Dynamics) -> Float[Tensor, "runs heads d d"]:
    """Return T(O), head by head."""
    M, W = _by_heads(_feedback_matrices(block, dynamics)[3], block), _by_heads(block.maps[3], block)
    moves_with = dynamics.rule.name in ("bp", "kp")  # M moves as W does, so that MᵀW gains twice ⟨M, Ẇ⟩ less ½WᵀW
    return (M.mT @ W + W.mT @ M - (W.mT @ W if moves_with else 0)) / 2


def _expected_change(before: Block, after: Block, dynamics: Dynamics, scores: Scores) -> dict[str, Tensor]:
    """Return the change of every law in a step, exactly: ``½ u uᵀ`` of displacements, and what moves the feedback.

    Args:
        before: At the start of the step, with the feedback of its pass.
        after: At its end.
        dynamics: The rule.
        scores: What is made of the scores.
    """
    moved = _block(new - old for new, old in zip(after.weights, before.weights, strict=True))
    squares = invariants(moved._replace(B=tuple(torch.zeros_like(B) for B in before.B)), dynamics, scores=scores)
    changes: dict[str, Tensor] = {"queries": squares["queries"], "scores": squares["scores"]}
    M, U = _feedback_matrices(before, dynamics), moved.maps

    def beyond(place: int) -> Tensor:
        """ΔV - ⟨M, U⟩."""
        gained = _aligned(after, dynamics, place) - _aligned(before, dynamics, place)
        return gained - (M[place] * U[place]).sum(-2)

    changes["outputs"] = moved.O.square().sum(-1) / 2 - beyond(4)
    if not dynamics.rule.direct:
        changes["neurons"] = moved.E.square().sum(-1) / 2 - sum(beyond(place).sum(1) for place in range(3))
        MO, UO = _by_heads(M[3], before), _by_heads(U[3], before)
        gained = _alignment_matrix(after, dynamics) - _alignment_matrix(before, dynamics)
        changes["values"] = moved.V @ moved.V.mT / 2 - (gained - (MO.mT @ UO + UO.mT @ MO) / 2)
    return changes


# Training, with the laws recorded.


@dataclass(frozen=True, kw_only=True)
class Trajectory(RecordedInTime):
    """The laws of a block of runs along their training: ``trajectory["queries"]``, ``trajectory["queries expected"]``.

    Attributes:
        dynamics: Activation, rule and loss.
        scores: What is made of the scores.
        start: The weights before training.
        end: The weights after it.
        rate: η of the steps; 0 in gradient flow.
        times: Recorded times [times]; of steps, η times their number.
        values: name -> [runs times …]: each law, and its change since the start by the exact identity as "… expected";
            nan from where a run ``diverged``.
    """

    what: ClassVar[str] = "attention under its laws"

    dynamics: Dynamics
    scores: Scores
    start: Block
    end: Block


@recording
def gradient_descent(
    block: Block,
    dynamics: Dynamics,
    X: Float[Tensor, "n positions inputs"],
    y: Float[Tensor, "n outputs"],
    *,
    scores: Scores,
    rate: float,
    steps: int,
    at: Sequence[int] | None = None,
) -> Trajectory:
    """Train by steps of gradient descent on all points; adafa moves its feedback before each pass, kp with W.

    Args:
        block: The start.
        dynamics: Activation, rule, loss and, of adafa, ρ.
        X: Inputs.
        y: Targets.
        scores: What is made of the scores.
        rate: η.
        steps: Their number.
        at: Steps to record at, increasing; None for about 100, evenly.

    Raises:
        ValueError: η is not positive, the data do not fit the block, or the recording steps are out of order or range.

    Warns:
        UserWarning: a run is no longer finite; the first recorded step from which on is named.
    """
    positive("rate", rate)
    _check(block, dynamics, X, y)
    at = recording_steps(steps, at)
    now = block
    expected = {law: torch.zeros_like(value) for law, value in invariants(block, dynamics, scores=scores).items()}
    finite: list[Tensor] = []

    def advance(count: int) -> None:
        nonlocal now, expected
        for _ in range(count):
            before = _followed(now, dynamics, rate)
            moves = _velocity(before, dynamics, X, y, scores)
            after = _block(
                (W + rate * dW for W, dW in zip(before.weights, moves.weights, strict=True)),
                (B + rate * dB for B, dB in zip(before.B, moves.B, strict=True)),
            )
            # Of adafa the law starts from the feedback before it has moved: that motion is part of the step.
            change = _expected_change(before, after, dynamics, scores)
            if before is not now:
                one, other = (invariants(block, dynamics, scores=scores) for block in (before, now))
                change = {law: value + one[law] - other[law] for law, value in change.items()}
            expected = {law: value + change[law] for law, value in expected.items()}
            now = after

    def measure() -> dict[str, Tensor]:
        finite.append(torch.stack([W.isfinite().flatten(1).all(1) for W in now.weights]).all(0))
        return _measured(now, expected, dynamics, scores)

    found = judged(record(at, advance, measure), at, weights=torch.stack(finite, 1))
    if outermost():
        warn_of_divergence(found["diverged"], found["lost"])
    times = rate * torch.tensor(at, dtype=torch.float64)
    return Trajectory(dynamics=dynamics, scores=scores, start=block, end=now, rate=rate, times=times, **found)


@recording
def gradient_flow(
    block: Block,
    dynamics: Dynamics,
    X: Float[Tensor, "n positions inputs"],
    y: Float[Tensor, "n outputs"],
    *,
    scores: Scores,
    times: Float[Tensor, " times"],
    tolerance: float = 1e-9,
    longest: int = 20_000,
) -> Trajectory:
    """Train by gradient flow on all points, in which every law is constant: for bp, fa, kp and dfa.

    Args:
        block: The start, in float64.
        dynamics: Activation, rule and loss; smooth activations are integrated fast, kinks slowly.
        X: Inputs.
        y: Targets.
        scores: What is made of the scores.
        times: Times to record at, increasing from 0.
        tolerance: Relative error of one step; the absolute one is a hundredth of it.
        longest: Most evaluations of the velocity.

    Raises:
        ValueError: the feedback moves by itself or follows signs (usf, frsf, adafa), so that the laws are not constant;
            the data do not fit the block, it is not in float64, or the times do not increase from 0.
        RuntimeError: the weights diverge, or more than ``longest`` evaluations were needed.
    """
    if dynamics.rule.name not in ("bp", "fa", "kp", "dfa"):
        raise ValueError(
            f"rule {dynamics.rule.name!r} moves its feedback in another way than the weights move, so the laws are not "
            "constant in flow: use gradient_descent, which accounts for that, or bp, fa, kp or dfa"
        )
    _check(block, dynamics, X, y)
    if block.E.dtype != torch.float64:
        raise ValueError(f"the block is in {block.E.dtype}: gradient flow is integrated in float64")
    times = recording_times(times)
    if positive("tolerance", tolerance) >= 1:
        raise ValueError(f"tolerance is {tolerance}, expected a relative error, below 1")
    positive("longest", longest)

    def motion(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moves = _velocity(_block(parts[:6], parts[6:]), dynamics, X, y, scores)
        return (*moves.weights, *moves.B)

    states = integrate(
        motion,
        (*block.weights, *block.B),
        times,
        tolerance=tolerance,
        longest=longest,
        advice="allow more (longest), a larger tolerance, or use gradient_descent with a small rate",
        diverging="weights",
        method="DOP853" if dynamics.activation.smooth else "RK45",
    )
    blocks = [_block(parts[:6], parts[6:]) for parts in states]
    nothing = {law: torch.zeros_like(value) for law, value in invariants(block, dynamics, scores=scores).items()}
    values = stacked([_measured(one, nothing, dynamics, scores) for one in blocks])
    found = {"values": values, "diverged": never(len(block.E))}
    return Trajectory(dynamics=dynamics, scores=scores, start=block, end=blocks[-1], rate=0.0, times=times, **found)


def _measured(block: Block, expected: dict[str, Tensor], dynamics: Dynamics, scores: Scores) -> dict[str, Tensor]:
    laws = invariants(block, dynamics, scores=scores)
    return {**laws, **{f"{law} expected": value for law, value in expected.items()}}


def _followed(block: Block, dynamics: Dynamics, rate: float) -> Block:
    """Return the block with the feedback of the pass: adafa moves it first, towards weights that are still."""
    rule = dynamics.rule
    if not rule.follows:
        return block
    pairs = zip(block.B, block.maps, strict=True)
    moved = (B + rate * rule.motion(B, W, torch.zeros_like(W), 0.0, dynamics.tracking) for B, W in pairs)
    return block._replace(B=tuple(moved))


def _velocity(block: Block, dynamics: Dynamics, X: Tensor, y: Tensor, scores: Scores) -> Block:
    """Return Ẇ and Ḃ; feedback that follows the weights has moved before the pass."""
    descent = gradients(block, dynamics, X, y, scores=scores)
    moves = _block(-G for G in descent.weights)
    if dynamics.rule.direct or dynamics.rule.follows:
        return moves._replace(B=tuple(torch.zeros_like(B) for B in block.B))
    maps = zip(block.B, block.maps, moves.maps, strict=False)  # B is empty if the rule stores none
    return moves._replace(B=tuple(dynamics.rule.motion(B, W, dW, 0.0, 1.0) for B, W, dW in maps))


# The statement.


@recording
def conservation(trajectory: Trajectory, law: Law, tolerance: float | None = None) -> TheoremCheck:
    """Check that one law changes by what the exact identity says: nothing in flow, ``½ u uᵀ`` of each step.

    ``|C(t) - C(0) - expected(t)| ≤ tolerance · (|weights at the start|² + |weights at the end|²)`` in every entry at
    every recorded time. ``scores`` assumes that the weights of the values are homogeneous in the scores, which softmax
    is not; ``neurons`` and ``outputs`` a homogeneous activation. ``queries`` and ``values`` assume nothing.

    Args:
        trajectory: Of steps or flow.
        law: Which.
        tolerance: None is 1e-10 for steps, and 1e-6 for flow, whose integration has an error of its own.

    Raises:
        ValueError: the tolerance is not positive, or the rule has no such law (direct rules: neurons, values).

    Source: derived here.
    """
    tolerance = (1e-10 if trajectory.rate else 1e-6) if tolerance is None else positive("tolerance", tolerance)
    if law not in trajectory.values:
        raise ValueError(
            f"rule {trajectory.dynamics.rule.name!r} has no law of {law}: a direct rule hands the output's error down, "
            "not that of the layer above"
        )
    values = trajectory[law]
    drift = values - values[:, :1]
    weights = (*trajectory.start.weights, *trajectory.end.weights)
    scale = torch.stack([W.square().flatten(1).sum(1) for W in weights]).sum(0)
    residual = (drift - trajectory[f"{law} expected"]).abs().flatten(2).amax(2)
    relative = residual / scale[:, None]
    return TheoremCheck(
        name=f"Conservation law of attention: {law}",
        source="derived here",
        reading=f"{trajectory.dynamics.rule.name}, {trajectory.scores}; in tolerances of the weights' squares",
        assumptions=_assumptions(trajectory, law),
        bound=torch.ones_like(relative),
        measured=relative / tolerance,
        scale=torch.ones_like(scale),
        constants={"relative residual": float(relative.max())},
        series={"drift": drift.abs().flatten(2).amax(2)},
    )


def _assumptions(trajectory: Trajectory, law: Law) -> tuple[Assumption, ...]:
    s = torch.linspace(-3, 3, 60, dtype=torch.float64).view(6, 10)
    if law == "scores":
        function = _FUNCTIONS[trajectory.scores]
        error = float((function.value(2 * s) - 2 ** (function.degree or 0.0) * function.value(s)).abs().max())
        name, statement = "scores", f"A(2s) = 2^p A(s) for {trajectory.scores}"
    elif law in ("queries", "values"):
        return ()
    else:
        activation = trajectory.dynamics.activation
        error = float((activation.value(s) - activation.slope(s) * s).abs().max())
        name, statement = "activation", f"φ(z) = φ'(z) z for {activation.name}"
    return (Assumption(name=name, statement=statement, measured=error, needed=1e-12, holds=error <= 1e-12),)


# Checks.


def _check(block: Block, dynamics: Dynamics, X: Tensor, y: Tensor) -> None:
    """Refuse data of another shape or type than the block takes."""
    _check_block(block, dynamics)
    check_floating(inputs=X, targets=y)
    expected = (block.E.shape[-1] - 1, block.R.shape[1])
    if X.ndim != 3 or y.ndim != 2 or len(X) != len(y) or (X.shape[-1], y.shape[-1]) != expected or not X.numel():
        raise ValueError(
            f"inputs have shape {tuple(X.shape)} and targets {tuple(y.shape)}, the block wants "
            f"(points, positions, {expected[0]}) and (points, {expected[1]})"
        )
    if not X.dtype == y.dtype == block.E.dtype:
        raise ValueError(f"inputs are {X.dtype}, targets {y.dtype}, the weights {block.E.dtype}: pass one format")


def _check_block(block: Block, dynamics: Dynamics) -> None:
    """Refuse weights that do not fit each other, feedback of other shapes, and rates or decays of their own."""
    (runs, width, _), heads, above = block.E.shape, block.Q.shape[1:3], block.O.shape[1]
    attended = (runs, *heads, width + 1)
    expected = [attended] * 3 + [(runs, above, heads[0] * heads[1] + 1), (runs, block.R.shape[1], above + 1)]
    shapes = [tuple(W.shape) for W in block.weights[1:]]
    if shapes != expected:
        raise ValueError(f"weights Q, K, V, O and R have shapes {shapes}, expected {expected} beside E and each other")
    stored = [(*shape[:-1], shape[-1] - 1) for shape in expected]
    if dynamics.rule.direct:
        stored = [(runs, block.R.shape[1], shape[-1]) for shape in stored]
    given = [tuple(B.shape) for B in block.B]
    if given != stored and not (dynamics.rule.init_feedback is None and not given):
        raise ValueError(f"feedback has shapes {given}, {dynamics.rule.name!r} wants {stored}: draw it with the rule")
    if dynamics.rates != 1.0 or dynamics.decays != 0.0:
        raise ValueError(
            f"rates are {dynamics.rates} and decays {dynamics.decays}, expected 1 and 0: the laws here are of one rate"
        )


def _with_one(x: Tensor) -> Tensor:
    """Append a 1, the input of the bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
