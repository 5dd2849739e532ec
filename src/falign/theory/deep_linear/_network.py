"""Deep linear networks of any sizes, many at once: their weights and feedback, and the rate that they bear."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf, sqrt
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign._validation import (
    Numbers,
    check_finite,
    check_full_rank,
    check_squarable,
    describe,
    feature_table,
    float_tensor,
    one_of,
    positive,
    recording_times,
    step_count,
)
from falign.feedback import generator
from falign.theory import conservation
from falign.theory._coerce import public, recording
from falign.theory._simulate import warn
from falign.theory.conservation import Dynamics, State, Trajectory, velocity
from falign.theory.conservation._network import Points, check_inputs, feedback_matrices
from falign.theory.deep_linear._modes import Modes, Rule, modes
from falign.theory.deep_linear._steps import sufficient_rate

_ITERATIONS = 60
"""Steps of the power method; the last third is averaged, as a complex pair makes the growth oscillate."""

_NONE = 1e-6
"""A real part below this share of the largest eigenvalue's size is rounding of 0."""

_DENSE = 128
"""Numbers in E up to which all eigenvalues are computed."""


@public
def linear(rule: Rule = "fa") -> Dynamics:
    """The dynamics of a linear network with the mean of ½|f - y|² as its loss.

    Raises:
        ValueError: the rule is none of fa, dfa, bp.
    """
    one_of("rule", rule, get_args(Rule))
    return Dynamics(
        activation=conservation.activation("linear"), rule=conservation.rule(rule), loss=conservation.loss("squared")
    )


@public
def network(W: Sequence[Numbers], B: Sequence[Numbers] = (), *, rule: Rule = "fa") -> State:
    """Weights and feedback as the simulator holds them.

    Args:
        W: W_1, …, W_L, each [out in], or [runs out in] for many networks at once.
        B: Of fa B_2, …, B_L in the shapes of W_2, …, W_L; of dfa, for every hidden layer, [outputs neurons]; bp has
            none and takes no notice of any.
        rule: fa, dfa or bp.

    Raises:
        ValueError: the sizes do not chain, a number is not finite, or a B is not of full rank.
    """
    direct = linear(rule).rule.direct
    for name, given in (("W", W), ("B", () if rule == "bp" else B)):
        if not isinstance(given, Iterable):
            raise ValueError(f"{name} is {describe(given)}, expected a list of matrices, one a layer")
    weights = [_matrix(f"W_{place}", given) for place, given in enumerate(W, 1)]
    feedback = [] if rule == "bp" else [_matrix(f"B_{place}", given) for place, given in enumerate(B, 2)]
    shapes = [tuple(part.shape) for part in weights]
    if len(shapes) < 2 or any(one[:2] != (other[0], other[2]) for one, other in pairwise(shapes)):
        raise ValueError(f"weights of shapes {shapes} are no network of two layers or more: expected (runs, out, in)")
    runs, outputs, _ = shapes[-1]
    wanted = [] if rule == "bp" else [(runs, outputs if direct else shape[1], shape[2]) for shape in shapes[1:]]
    if (given_shapes := [tuple(part.shape) for part in feedback]) != wanted:
        raise ValueError(f"feedback has shapes {given_shapes}, {rule} wants {wanted} for weights of shapes {shapes}")
    for place, matrix in enumerate(feedback, 2):
        check_full_rank(f"B_{place}", matrix)
    return State(W=tuple(weights), B=tuple(part.to(weights[0]) for part in feedback))


@public
def local_rate(
    state: State, X: Float[Tensor, "n d"], rule: Rule = "fa", *, share: float = 0.0
) -> Float[Tensor, " runs"]:
    """The least ``2 Re a/|a|²`` over eigenvalues a of A: above it, steps make small errors grow, were weights to stay.

    ``E = Σ_yx - W_L…W_1 Σ_xx`` obeys ``E' = -A(E)``, ``A(E) = Σ_l (W_L…W_{l+1} C_l) E (Q_lᵀ Q_l Σ_xx)`` with
    ``Q_l = W_{l-1}…W_1`` and C_l what carries the error to layer l; ``E⁺ = E - ηA(E) + O(η²E²)``. Necessary near a
    point of rest; elsewhere a guide. A scalar mode has a = ρ. Where Re a ≤ 0 the error grows at any η: these are left
    out, so that it is infinite where no Re a is positive, such as at zero weights. Of more than 128 numbers in E by
    power iteration: ``2/a`` for the largest a, to a few per cent if that is real.

    Args:
        state: The networks.
        X: Inputs.
        rule: How the error returns.
        share: Only of a whose real part is at least that share of the largest: away from rest the weights move before
            slow errors have grown. Warnings go by one half.

    Raises:
        ValueError: the inputs do not fit the networks.

    Source: derived.
    """
    check_inputs(state.W[0], X)
    dynamics, covariance = linear(rule), X.mT @ X / X.shape[-2]
    depth, matrices = state.depth, feedback_matrices(state, dynamics)
    runs, outputs, _ = state.W[-1].shape
    # A(E) is a sum over layers of S E T: S from the weights and feedback above the layer, T from what lies below it.
    above = carried = torch.eye(outputs).to(state.W[0]).expand(runs, -1, -1)
    left = [above]
    for layer in range(depth - 1, 0, -1):
        above = above @ state.W[layer]
        carried = matrices[layer - 1].mT if dynamics.rule.direct else matrices[layer - 1].mT @ carried
        left.insert(0, above @ carried)
    below = [torch.eye(X.shape[1]).to(X).expand(runs, -1, -1)]
    for W in state.W[:-1]:
        below.append(W @ below[-1])
    right = [Q.mT @ (Q @ covariance) for Q in below]
    if outputs * X.shape[1] <= _DENSE:
        pairs = zip(left, right, strict=True)
        whole = torch.stack([torch.einsum("rij,rkl->riljk", S, T).flatten(1, 2) for S, T in pairs]).sum(0).flatten(2)
        a = torch.linalg.eigvals(whole)
        counts = a.real > _NONE * a.abs().amax(1, keepdim=True)
        counts &= a.real >= share * a.real.amax(1, keepdim=True)
        return torch.where(counts, 2 * a.real / a.abs().square(), torch.inf).amin(1)
    E = torch.randn(runs, outputs, X.shape[1], generator=generator(0, "deep linear", "power iteration")).to(X)
    size = _growth(E, left, right, torch.zeros(runs).to(X))
    largest = _growth(E, left, right, size) - size  # A + size has no eigenvalue below 0, so that its largest leads
    return torch.where(largest > _NONE * size, 2 / largest, torch.inf)


def _growth(E: Tensor, left: list[Tensor], right: list[Tensor], shift: Tensor) -> Float[Tensor, " runs"]:
    """Factor by which a step ``E -> Σ_l S_l E T_l + shift E`` of the power method lengthens E in the end."""
    logs = []
    for _ in range(_ITERATIONS):
        E = E / E.norm(dim=(-1, -2), keepdim=True).clamp_min(torch.finfo(E.dtype).tiny)
        E = torch.stack([S @ E @ T for S, T in zip(left, right, strict=True)]).sum(0) + shift[:, None, None] * E
        logs.append(E.norm(dim=(-1, -2)).log())
    return torch.stack(logs[-_ITERATIONS // 3 :]).mean(0).exp()


def _matrix(name: str, given: Numbers) -> Tensor:
    matrix = float_tensor(name, given)
    if matrix.ndim not in (2, 3) or not matrix.numel():
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}, expected [out in] or [runs out in]")
    check_finite(name, matrix)
    return matrix if matrix.ndim == 3 else matrix.unsqueeze(0)


# Second moments, all that a linear network sees of its data, and few points that have the same.

_NOTHING = 1e-10
"""An eigenvalue below this share of the largest counts as 0."""


class Compressed(NamedTuple):
    """Points in place of many, of which a linear network learns the same.

    Attributes:
        X: Inputs [points d], at most d.
        Y: Targets [points k].
        left: What the mean loss ½|f - y|² of all the points has above theirs: what no linear map can fit.
    """

    X: Float[Tensor, "points d"]
    Y: Float[Tensor, "points k"]
    left: float


def data(X: Numbers, Y: Numbers) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"]]:
    """Inputs and targets, a row a point, in float64 unless tensors say otherwise.

    Raises:
        ValueError: they are no finite tables, or differ in their number of points.
    """
    inputs, targets = _rows("inputs", X), _rows("targets", Y)
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets: one row of each a point")
    return inputs, targets.to(inputs)


@public
def covariances(X: Numbers, Y: Numbers) -> tuple[Float[Tensor, "d d"], Float[Tensor, "k d"]]:
    """``Σ_xx = XᵀX/n`` and ``Σ_yx = YᵀX/n``: second moments, no mean is taken off.

    Raises:
        ValueError: the data are no finite tables of the same number of points.
    """
    inputs, targets = data(X, Y)
    return inputs.mT @ inputs / len(inputs), targets.mT @ inputs / len(inputs)


@public
def compressed(X: Numbers, Y: Numbers) -> Compressed:
    """Compress data to as many points as X has rank, with the same Σ_xx and Σ_yx: training no longer costs by n.

    ``X = P S Qᵀ`` and k points: ``X' = √(k/n) S Qᵀ``, ``Y' = √(k/n) Pᵀ Y``, ``left = |Y - P Pᵀ Y|²/(2n)``.

    Args:
        X: Inputs [n d].
        Y: Targets [n k].

    Raises:
        ValueError: the data are no finite tables of the same number of points, or all inputs are zero.
    """
    inputs, targets = data(X, Y)
    P, S, Q = torch.linalg.svd(inputs, full_matrices=False)
    kept = _above_rounding(S, inputs)
    P, S, Q = P[:, kept], S[kept], Q[kept]
    scale, seen = sqrt(len(S) / len(inputs)), P.mT @ targets
    left = (targets - P @ seen).square().sum() / (2 * len(inputs))
    return Compressed(scale * S[:, None] * Q, scale * seen, float(left))


@public
def points_of(inputs: Numbers, cross: Numbers) -> tuple[Float[Tensor, "points d"], Float[Tensor, "points k"]]:
    """Points that have given Σ_xx and Σ_yx.

    Args:
        inputs: Σ_xx [d d], symmetric, no eigenvalue below 0.
        cross: Σ_yx [k d].

    Raises:
        ValueError: the sizes do not fit, Σ_xx is no covariance, or Σ_yx reads what has no variance in Σ_xx.
    """
    xx, yx = _rows("Σ_xx", inputs), _rows("Σ_yx", cross)
    yx = yx.to(xx)
    if xx.shape != (yx.shape[1], yx.shape[1]):
        raise ValueError(f"Σ_xx is {tuple(xx.shape)} and Σ_yx {tuple(yx.shape)}, expected (d, d) and (outputs, d)")
    values, Q = torch.linalg.eigh((xx + xx.mT) / 2)
    size = float(values.abs().max())
    if float((xx - xx.mT).abs().max()) > _NOTHING * size or float(values[0]) < -_NOTHING * size or not size:
        raise ValueError(f"Σ_xx must be symmetric with eigenvalues from 0 up, not all 0; the least is {values[0]:g}")
    kept = values > _NOTHING * size
    unseen = float((yx @ Q[:, ~kept]).abs().max()) if not kept.all() else 0.0
    if unseen > sqrt(_NOTHING) * float(yx.abs().max()):
        raise ValueError(f"Σ_yx holds {unseen:g} along inputs without variance in Σ_xx: no data have these moments")
    roots, Q = values[kept].sqrt(), Q[:, kept]
    scale = sqrt(len(roots))
    return scale * roots[:, None] * Q.mT, scale * (yx @ Q / roots).mT


@public
def whitened(X: Numbers) -> Float[Tensor, "n rank"]:
    """The inputs in coordinates with Σ_xx = 1, as many as X has rank: ``√n P`` of ``X = P S Qᵀ``.

    Raises:
        ValueError: they are no finite table, or all zero.
    """
    inputs = _rows("inputs", X)
    P, S, _ = torch.linalg.svd(inputs, full_matrices=False)
    return sqrt(len(inputs)) * P[:, _above_rounding(S, inputs)]


def _rows(name: str, given: Numbers) -> Tensor:
    """The finite table, of the type and on the device that a floating point tensor has."""
    check_squarable(name, feature_table(name, given))
    return float_tensor(name, given)


def _above_rounding(S: Float[Tensor, " values"], X: Float[Tensor, "n d"]) -> Bool[Tensor, " values"]:
    """Mark the singular values of X that are not rounding."""
    if not S[0]:
        raise ValueError(f"all {len(X)} inputs are zero: nothing can be learned of them")
    return max(X.shape) * torch.finfo(X.dtype).eps * S[0] < S


# Scalar chains: what a network is along each component of the data.


class Components(NamedTuple):
    """The singular components of ``Σ_yx = Σ_i λ_i u_i v_iᵀ``, and how much their inputs vary.

    Attributes:
        outputs: U, complete: the u_i of components above rounding first [outputs outputs].
        inputs: v_i in columns [d modes].
        target: λ_i above rounding, falling [modes].
        variance: ``s_i = v_iᵀ Σ_xx v_i`` [modes].
    """

    outputs: Float[Tensor, "outputs outputs"]
    inputs: Float[Tensor, "d modes"]
    target: Float[Tensor, " modes"]
    variance: Float[Tensor, " modes"]


def components(X: Float[Tensor, "n d"], Y: Float[Tensor, "n outputs"]) -> Components:
    """Decompose Σ_yx of data."""
    U, λ, V = torch.linalg.svd(covariances(X, Y)[1], full_matrices=True)
    kept = int((λ > max(U.shape[0], V.shape[0]) * torch.finfo(λ.dtype).eps * λ[0]).sum())
    inputs = V[:kept].mT
    return Components(U, inputs, λ[:kept], (X @ inputs).square().mean(0))


def scalar_chains(state: State, rule: Rule, parts: Components) -> Modes:
    """The scalar chain of each component: what the weights of one network are along the path that its error takes.

    ``p_L = u_i``, ``p_l = B_{l+1}ᵀ p_{l+1}`` (dfa: ``D_lᵀ u_i``; bp: ``W_{l+1}ᵀ p_{l+1}``), ``r_l = p_l/|p_l|``,
    ``θ_l = r_lᵀ W_l r_{l-1}`` with ``r_0 = v_i``, ``m_{l+1} = |p_l|/|p_{l+1}|`` (dfa: |p_l|).
    """
    dynamics, top = linear(rule), parts.outputs[:, : len(parts.target)]
    paths = [top]
    for matrix in reversed(feedback_matrices(state, dynamics)):
        paths.insert(0, matrix[0].mT @ (top if dynamics.rule.direct else paths[0]))
    lengths = [path.norm(dim=0) for path in paths]
    tiny = torch.finfo(top.dtype).tiny
    along = [path / length.clamp_min(tiny) for path, length in zip(paths, lengths, strict=True)]
    below = [parts.inputs, *along]
    weights = [(r * (part[0] @ under)).sum(0) for r, part, under in zip(along, state.W, below, strict=False)]
    if rule == "bp":
        feedback = [1.0] * (len(weights) - 1)
    elif dynamics.rule.direct:
        feedback = lengths[:-1]
    else:
        feedback = [low / high for low, high in pairwise(lengths)]
    return modes(parts.target, weights, feedback=feedback, variance=parts.variance, rule=rule)


# Steps, and the warning where they were too large.

_QUICK = 0.5
"""Warnings look at eigenvalues from this share of the largest on: before slower errors grow, the weights have moved."""


def warn_of_rate(rate: float, ends: tuple[State, State], X: Float[Tensor, "n d"], Y: Points, rule: Rule) -> None:
    """Warn where steps were too large: weights that are not ``finite``, or a rate above ``local_rate`` at either end.

    Where they are not finite, the rate that is named is the one that suffices for the networks' scalar chains, from a
    formula: exact for spectral networks, an estimate for others.

    Args:
        rate: η.
        ends: The networks at the start and at the end of their run.
        X: Inputs.
        Y: Targets, of all networks or of each.
        rule: How the error returned.
    """
    if not finite(ends[1]):
        stable = min(rate / 2, _sufficient_rate(ends[0], X, Y, rule))
        stable = min(stable, float(local_rate(ends[0], X, rule, share=_QUICK).min()))
        warn(f"rate {rate:g} is too large: the weights diverge; a run at {stable:.3g} should end stable")
        return
    for place, state in zip(("start", "end"), ends, strict=True):
        if rate > (largest := float(local_rate(state, X, rule, share=_QUICK).min())):
            warn(f"rate {rate:g} is beyond {largest:.4g}, stable at the {place} of the run")


def _sufficient_rate(state: State, X: Tensor, Y: Tensor, rule: Rule) -> float:
    """The least rate that suffices for a scalar chain of any of the networks."""
    least = inf
    for run in range(len(state.W[0])):
        one, parts = state.map(lambda part, run=run: part[run : run + 1]), components(X, Y if Y.ndim == 2 else Y[run])
        if len(parts.target):
            least = min(least, float(sufficient_rate(scalar_chains(one, rule, parts)).min()))
    return least


def stepped(
    state: State, dynamics: Dynamics, X: Tensor, Y: Points, rate: float, steps: int
) -> Iterator[tuple[State, State]]:
    """Each step's networks, before and after, up to the first step that is not ``finite``.

    Raises:
        ValueError: the rate is not positive, or the steps are no whole number from 1 on.
    """
    positive("rate", rate)
    step_count(steps, least=1)
    for _ in range(steps):
        after = state.map(lambda value, change: value + rate * change, velocity(state, dynamics, X, Y))
        yield state, after
        state = after
        if not finite(state):
            return


def finite(state: State) -> bool:
    """Tell whether all weights are so far from overflow that a product of four is still a number."""
    return all(bool((W.abs() < torch.finfo(W.dtype).max ** 0.25).all()) for W in state.W)


# Training, by ``falign.theory.conservation``, at a cost that does not grow with the data.


@recording
def matrix_gradient_descent(
    state: State,
    X: Numbers,
    Y: Numbers,
    *,
    rule: Rule = "fa",
    rate: float,
    steps: int,
    names: Sequence[str] = ("loss", "map"),
    at: Sequence[int] | None = None,
) -> Trajectory:
    """Full-batch steps ``W ← W + η Ẇ`` of linear networks, at a cost that does not grow with the number of points.

    ``falign.theory.conservation.gradient_descent`` on the ``compressed`` data. Warns where η is beyond ``local_rate``,
    with its value, at the start or where the run ends, and where a run is no longer finite, with the rate that
    suffices for its scalar chains.

    Args:
        state: The networks, such as ``network`` makes.
        X: Inputs [n d].
        Y: Targets [n outputs].
        rule: How the error returns.
        rate: η.
        steps: Their number.
        names: Of ``falign.theory.conservation.MEASUREMENTS``; ``map`` is W_L…W_1 [runs times outputs d].
        at: Steps to record at; None for about 100, evenly.

    Raises:
        ValueError: what the simulator or ``compressed`` refuses.
    """
    _is_state(state)
    few = compressed(X, Y)
    trajectory = conservation.gradient_descent(
        state, linear(rule), few.X, few.Y, rate=rate, steps=steps, names=names, at=at
    )
    warn_of_rate(rate, (state, trajectory.end), few.X, few.Y, rule)
    return _with(trajectory, few.left)


@public
def matrix_gradient_flow(
    state: State,
    X: Numbers,
    Y: Numbers,
    *,
    rule: Rule = "fa",
    times: Numbers,
    names: Sequence[str] = ("loss", "map"),
    tolerance: float = 1e-9,
) -> Trajectory:
    """Gradient flow of linear networks (SciPy, DOP853), at a cost that does not grow with the number of points.

    Args:
        state: The networks, in float64.
        X: Inputs [n d].
        Y: Targets [n outputs].
        rule: How the error returns.
        times: Where to record, increasing from 0.
        names: As in ``matrix_gradient_descent``.
        tolerance: Relative error of one step.

    Raises:
        ValueError: what the simulator or ``compressed`` refuses.
        RuntimeError: the weights diverge.
    """
    _is_state(state)
    few = compressed(X, Y)
    trajectory = conservation.gradient_flow(
        state, linear(rule), few.X, few.Y, times=recording_times(times), names=names, tolerance=tolerance
    )
    return _with(trajectory, few.left)


def _is_state(given: object) -> None:
    if not isinstance(given, State):
        raise ValueError(f"the networks are a {type(given).__name__}, expected a State: pass network(W, B)")


def _with(trajectory: Trajectory, left: float) -> Trajectory:
    """Add to the loss what no linear map can fit of all the points."""
    if "loss" not in trajectory.values:
        return trajectory
    return replace(trajectory, values={**trajectory.values, "loss": trajectory["loss"] + left})
