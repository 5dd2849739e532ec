"""Factorise by steps or by gradient flow, and record what is asked for by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import positive, recording_steps, recording_times, step_count
from falign.theory._coerce import recording
from falign.theory._simulate import RecordedInTime, integrate, judged, measurements_named, never, record, stacked, warn
from falign.theory.factorisation._closed_forms import optimal_rows
from falign.theory.factorisation._methods import Method, Small, prepared, reduced, row_basis, settled, sufficient_rate
from falign.theory.factorisation._problem import Start, State, frobenius

# Measurements by name, and the record of a run.


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The fixed quantities that states are compared with, in the coordinates in which a run is computed.

    Attributes:
        method: How the factors move.
        Y: What is to be factorised.
        B: Feedback.
        start: Where from.
        outside: |·| of what Y has outside these coordinates: a constant part of the error [runs].
        whole_B: |B| in all coordinates [runs].
        optimal_rows: The optimum's representation, orthonormal in all coordinates; called when first asked for.
    """

    method: Method
    Y: Float[Tensor, "runs p q"]
    B: Float[Tensor, "runs r p"]
    start: State
    outside: Float[Tensor, " runs"]
    whole_B: Float[Tensor, " runs"]
    optimal_rows: Callable[[], Tensor]

    @cached_property
    def invariant(self) -> Float[Tensor, "runs r r"]:
        """The conserved matrix at the start."""
        return self.method.invariant(*self.start, self.B)

    @cached_property
    def stationary(self) -> Float[Tensor, "runs p q"]:
        """``Y (BY)⁺ BY``."""
        rows = row_basis(self.B @ self.Y)
        return self.Y @ rows.mT @ rows

    @cached_property
    def optimum(self) -> Float[Tensor, "runs r q"]:
        """``optimal_rows``."""
        return self.optimal_rows()


@dataclass(frozen=True, kw_only=True)
class Here:
    """A state on the way, with the sums kept since the start."""

    Z: Float[Tensor, "runs p r"]
    W: Float[Tensor, "runs r q"]
    R: Float[Tensor, "runs p q"]
    gained: Float[Tensor, "runs r r"]
    growth: Float[Tensor, " runs"]


Measurement = Callable[[Here, _Reference], Tensor]

MEASUREMENTS: dict[str, Measurement] = {
    "error": lambda at, ref: (_square(at.R) + ref.outside.square()).sqrt(),
    "loss": lambda at, ref: (_square(at.R) + ref.outside.square()) / 2,
    "lyapunov": lambda at, ref: _square(ref.B @ at.R),
    "alignment": lambda at, ref: _trace(ref.B @ at.Z),
    "cosine": lambda at, ref: _trace(ref.B @ at.Z) / (ref.whole_B * frobenius(at.Z)),
    "weighted": lambda at, ref: _trace(ref.B @ at.Z @ at.W @ at.W.mT),
    "invariant": lambda at, ref: frobenius(ref.method.invariant(at.Z, at.W, ref.B)),
    "drift": lambda at, ref: frobenius(ref.method.invariant(at.Z, at.W, ref.B) - ref.invariant),
    "account": lambda at, ref: frobenius(ref.method.invariant(at.Z, at.W, ref.B) - ref.invariant - at.gained),
    "gram drift": lambda at, ref: frobenius(at.W @ at.W.mT - ref.start.W @ ref.start.W.mT),
    "growth": lambda at, ref: at.growth,
    "distance": lambda at, ref: frobenius(ref.Y - at.R - ref.stationary),
    "overlap": lambda at, ref: _square(row_basis(at.W) @ ref.optimum.mT) / at.W.shape[1],
}
"""name -> what it is at a state [runs].

``error`` |R|, ``loss`` ½|R|², ``lyapunov`` |BR|², ``alignment`` tr(BZ) = ⟨Bᵀ, Z⟩, its ``cosine`` (nan for Z = 0),
``weighted`` tr(BZWWᵀ), which is tr(BYWᵀ) under fa*; ``invariant`` |C| of what the method conserves, its ``drift``
|C - C(0)|, and ``account``, what is left of the drift once the exact gain of the steps, ``η² Σ BR(BR)ᵀ`` under fa and
fa*, is taken off; ``gram drift`` |WWᵀ - W(0)W(0)ᵀ|, ``growth`` η Σ |Ẇ|² (in flow ∫|Ẇ|²), ``distance`` of ZW from
Y(BY)⁺BY, ``overlap`` of the representation with the optimum's.
"""

_UNDEFINED = {"cosine"}
"""Names that may be no number of a finite run: where Z is 0."""

_SUMMED = {"account", "growth"}
"""Names that need sums over all steps."""


@dataclass(frozen=True, kw_only=True)
class Trajectory(RecordedInTime):
    """The record of a block of runs.

    Attributes:
        method: How it learned.
        Y: What was to be factorised.
        B: Feedback.
        start: Where from; of fa*, with its Z.
        end: Where to.
        rate: η of the steps; 0 in gradient flow.
        times: Recorded times; of steps, η times their number.
        values: name -> those asked for; nan from where a run has diverged.
        diverged: Step at which a run was first not finite, -1 where it always was: the exact one of its weights, or the
            recorded one of a measurement that overflowed before they did.
        lost: name -> that step of each measurement, and of "weights".
    """

    what: ClassVar[str] = "matrix factorisation"

    method: Method
    Y: Float[Tensor, "runs n m"]
    B: Float[Tensor, "runs r n"]
    start: State
    end: State


def _square(A: Tensor) -> Tensor:
    return A.square().sum((-1, -2))


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-1, dim2=-2).sum(-1)


class _Lens:
    """Measures states of a run that is computed in its small coordinates, as they are in those of Y."""

    def __init__(self, method: Method, Y: Tensor, B: Tensor, start: State, small: Small, names: Sequence[str]) -> None:
        self.Y, self.B, self.start, self.small, self.names = Y, B, start, small, names
        self.reference = _Reference(
            method=method,
            Y=small.Y,
            B=small.B,
            start=small.start,
            outside=frobenius(Y - small.of_all(small.Y)),
            whole_B=frobenius(B),
            optimal_rows=self._optimal_rows,
        )

    def measured(self, state: State, gained: Tensor, growth: Tensor, finite: Tensor) -> dict[str, Tensor]:
        """Measure a state by the names asked for; nan of runs that are no longer ``finite``."""
        ref = self.reference
        # Zeros in place of lost runs: a decomposition would refuse the whole block for one nan.
        Z, W = (torch.where(finite[:, None, None], part, 0.0) for part in settled(ref.method, ref.Y, state))
        at = Here(Z=Z, W=W, R=torch.baddbmm(ref.Y, Z, W, alpha=-1), gained=gained, growth=growth)
        return {name: torch.where(finite, MEASUREMENTS[name](at, ref), torch.nan) for name in self.names}

    def trajectory(self, end: State, found: dict[str, Any], *, rate: float, times: Tensor) -> Trajectory:
        """The record, its states lifted to the coordinates of Y."""
        method = self.reference.method
        return Trajectory(
            method=method,
            Y=self.Y,
            B=self.B,
            start=self.start,
            end=settled(method, self.Y, self.small.lifted(end)),
            rate=rate,
            times=times,
            **found,
        )

    def _optimal_rows(self) -> Tensor:
        """In the small coordinates; by one decomposition where all runs share Y."""
        shared = self.Y[0] if self.Y.stride(0) == 0 else self.Y
        return self.small.seen(optimal_rows(shared, self.B.shape[1]).expand(len(self.B), -1, -1))


_LONGEST = 100_000
"""Most evaluations of a flow's velocity a run."""


@recording
@torch.no_grad()
def gradient_descent(
    method: str,
    Y: Float[Tensor, "... n m"],
    B: Float[Tensor, "runs r n"],
    start: Start,
    *,
    rate: float,
    steps: int,
    names: Sequence[str],
    at: Sequence[int] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """Steps ``Z ← Z + η Ż`` and ``W ← W + η Ẇ``, both from the same R, all runs at once.

    Under fa and fa* in the small coordinates in which a run stays, which changes nothing but the speed. A warning
    names the rate from ``sufficient_rate`` if η is beyond it.

    Args:
        method: ``fa``, ``fa*`` or ``gd``.
        Y: What is to be factorised, one for all runs or one each.
        B: Feedback; under gd it is only measured against.
        start: Both factors, as ``State`` or a pair (Z, W); of fa*, W counts, and Z follows.
        rate: η.
        steps: Their number.
        names: Of ``MEASUREMENTS``.
        at: Steps to record at, increasing, the last at most ``steps``; None for about 100, evenly. Steps after the
            last are not taken.
        progress: Told now and then which share of the steps is done.

    Raises:
        ValueError: what was given does not fit, is not finite or out of range, a name is unknown, B is not of full
            rank, or rows of W(0) nearly depend on each other under fa*.
    """
    positive("rate", rate)
    step_count(steps)
    at, names = recording_steps(steps, at), measurements_named(names, MEASUREMENTS)
    algorithm, Y, start = prepared(method, Y, B, start)
    _warn_of_large_steps(method, Y, B, start, rate)
    small = reduced(algorithm, Y, B, start)
    lens = _Lens(algorithm, Y, B, start, small, names)
    now = State(*(part.clone() for part in small.start))
    R, move = torch.empty_like(small.Y, memory_format=torch.contiguous_format), State(*map(torch.zeros_like, now))
    gained, growth = torch.zeros_like(lens.reference.invariant), Y.new_zeros(len(B))
    finite, lasted = torch.ones_like(growth, dtype=torch.bool), torch.zeros_like(growth, dtype=torch.int64)
    keeps = bool(_SUMMED & set(names))

    def advance(count: int) -> None:
        for _ in range(count):
            algorithm.move(small.Y, small.B, now, R, move)
            if keeps:
                gained.add_(algorithm.gain(*move), alpha=rate**2)
                growth.add_(move.W.square().sum((1, 2)), alpha=rate)
            now.W.add_(move.W, alpha=rate)
            if algorithm.free_output:
                now.Z.add_(move.Z, alpha=rate)
            # A sum of all entries shows any that is not finite, at less than a look at each.
            finite.logical_and_((now.W.sum((1, 2)) + now.Z.sum((1, 2))).isfinite())
            lasted.add_(finite)

    values = record(at, advance, lambda: lens.measured(now, gained, growth, finite), progress=progress)
    times = rate * torch.tensor(at, dtype=torch.float64)
    found = judged(values, at, undefined=_UNDEFINED, weights=torch.where(finite, -1, lasted + 1))
    return lens.trajectory(now, found, rate=rate, times=times)


@recording
@torch.no_grad()
def gradient_flow(
    method: str,
    Y: Float[Tensor, "... n m"],
    B: Float[Tensor, "runs r n"],
    start: Start,
    *,
    times: Float[Tensor, " times"] | Sequence[float],
    names: Sequence[str],
    tolerance: float = 1e-10,
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """Gradient flow, each run integrated by itself with adaptive steps (Dormand and Prince, order 8) in float64.

    Args:
        method: ``fa``, ``fa*`` or ``gd``.
        Y: What is to be factorised, one for all runs or one each.
        B: Feedback.
        start: Both factors, as ``State`` or a pair (Z, W); of fa*, W counts, and Z follows.
        times: Where to record, increasing from 0.
        names: Of ``MEASUREMENTS``.
        tolerance: Relative error of one step; the absolute one is a hundredth of it.
        progress: Told after each run which share of them is done.

    Raises:
        ValueError: as ``gradient_descent``; Y is not in float64, or the times do not increase from 0.
        RuntimeError: the integration stopped, as the factors diverge, or took too long.
    """
    names = measurements_named(names, MEASUREMENTS)
    positive("tolerance", tolerance)
    times = recording_times(times)
    algorithm, Y, start = prepared(method, Y, B, start)
    if Y.dtype != torch.float64:
        raise ValueError(f"Y is in {Y.dtype}: gradient flow is integrated in float64")
    small = reduced(algorithm, Y, B, start)
    runs = []
    for run in range(len(B)):
        runs.append(_integrated(algorithm, small, run, times, tolerance))
        if progress is not None:
            progress(len(runs) / len(B))
    lens = _Lens(algorithm, Y, B, start, small, names)
    still, finite = torch.zeros_like(lens.reference.invariant), torch.ones(len(B), dtype=torch.bool, device=Y.device)
    here, rows = small.start, []
    for moment in range(len(times)):
        Z, W, growth = (torch.cat([run[moment][part] for run in runs]).to(Y) for part in range(3))
        here = State(Z, W)
        rows.append(lens.measured(here, still, growth, finite))
    return lens.trajectory(here, {"values": stacked(rows), "diverged": never(len(B))}, rate=0.0, times=times)


def _warn_of_large_steps(method: str, Y: Tensor, B: Tensor, start: State, rate: float) -> None:
    limits = sufficient_rate(method, Y, B, start)
    beyond = int((rate > limits).sum())
    if beyond:
        warn(
            f"rate {rate:.4g} is beyond {float(limits.min()):.4g}, up to which steps of {method} follow the flow, in "
            f"{beyond} of {len(B)} runs: they may oscillate or diverge"
        )


def _integrated(method: Method, small: Small, run: int, times: Tensor, tolerance: float) -> list[tuple[Tensor, ...]]:
    """Z, W and ∫|Ẇ|² of one run at each of the times.

    Alone, as adaptive steps of a block would be as short as the quickest of its runs needs.
    """
    Y, B = small.Y[run : run + 1].cpu(), small.B[run : run + 1].cpu()
    start = State(*(part[run : run + 1].cpu() for part in small.start))
    R, out = torch.empty_like(Y), State(*map(torch.zeros_like, start))

    def velocity(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        method.move(Y, B, State(*parts[:2]), R, out)
        return *out, out.W.square().sum()[None]

    return integrate(
        velocity,
        (*start, start.W.new_zeros(1)),
        times,
        tolerance=tolerance,
        longest=_LONGEST,
        advice="ask for earlier times, a larger tolerance, or use gradient_descent with a small rate",
        diverging="factors",
    )
