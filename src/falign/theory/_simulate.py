"""One frame for all simulators: record by name at chosen steps or times, and say where a run is no longer finite.

A simulator brings what only it knows: how it takes a step or what its velocity is, and what it measures. What all
share is here, so that every trajectory has the same shape, the same refusals and the same warnings.
"""

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign._validation import as_list, describe
from falign.theory._course import Course, Trajectories, went_first

_REPORTS = 100
"""Least number of reports of progress."""


@dataclass(frozen=True, kw_only=True)
class Recorded(Trajectories):
    """Measurements of a block of runs on its way, by name; prints as a table.

    Attributes:
        values: name -> [runs times …]; nan from where a run has left the finite numbers.
        diverged: Step at which a run was first not finite, -1 where it always was [*runs].
        lost: name -> step at which this quantity, or "weights", was first not finite, -1 where it always was [*runs].
    """

    what: ClassVar[str] = "runs"
    axes: ClassVar[tuple[str, ...]] = ("run",)
    apart: ClassVar[str] = ""

    values: Mapping[str, Tensor]
    diverged: Int[Tensor, "*runs"]
    lost: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The recorded values of that name.

        Raises:
            ValueError: it was not recorded.
        """
        if name not in self.values:
            raise ValueError(f"{describe(name)} was not recorded: add it to names, beside {', '.join(self.values)}")
        return self.values[name]

    def _clock(self) -> tuple[str, list[float | int]]:
        """Name what the records are counted by, and where they are."""
        raise NotImplementedError

    def _course(self) -> Course:
        clock, at = self._clock()
        main = next((name for name in ("loss", "error") if name in self.values), "")
        return Course(
            what=self.what, clock=clock, at=at, axes=self.axes, values=self.values, main=main, diverged=self.diverged,
            lost=self.lost, apart=self.apart,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RecordedInTime(Recorded):
    """Measurements of a block of runs of steps of one rate, or of gradient flow.

    Attributes:
        rate: η of the steps; 0 in gradient flow.
        times: Recorded times [times]; of steps, η times their number.
    """

    rate: float
    times: Float[Tensor, " times"]
    diverged: Int[Tensor, " runs"]

    def _clock(self) -> tuple[str, list[float | int]]:
        return clock_of(self.rate, self.times)


def clock_of(rate: float, times: Tensor) -> tuple[str, list[float | int]]:
    """Count records by steps where there are any, else by the time of a flow."""
    return ("step", [round(time / rate) for time in times.tolist()]) if rate else ("time", times.tolist())


def judged(
    values: Mapping[str, Tensor],
    at: Sequence[float | int],
    *,
    axes: int = 1,
    undefined: Collection[str] = (),
    weights: Tensor | None = None,
) -> dict[str, Any]:
    """Find where each run leaves the finite numbers, and hand out none of its numbers from there.

    What comes after is no result, though an overflow may cancel and look like one.

    Args:
        values: name -> [*runs times …].
        at: Steps of the records, or times.
        axes: How many axes of runs there are.
        undefined: Names that may be nan of a run that is finite, such as a cosine of zero.
        weights: Whether a run's weights are finite at each record [*runs times], or the step at which they were first
            not, -1 where they always were [*runs].

    Returns:
        ``values``, ``diverged`` and ``lost`` of ``Recorded``.
    """
    steps = torch.tensor(list(at))
    lost = {}
    if weights is not None:
        lost["weights"] = _first_lost(weights, at) if weights.dtype == torch.bool else weights.cpu()
    for name, value in values.items():
        if name not in undefined:
            finite = value.isfinite()
            lost[name] = _first_lost(finite.flatten(axes + 1).all(-1) if value.ndim > axes + 1 else finite, at)
    every = torch.stack([where.masked_fill(where < 0, _NEVER) for where in lost.values()]).amin(0)
    diverged = every.masked_fill(every == _NEVER, -1)
    gone = (diverged >= 0).unsqueeze(-1) & (steps >= diverged.unsqueeze(-1))
    kept = {
        name: value.masked_fill(gone.to(value.device)[(..., *[None] * (value.ndim - gone.ndim))], torch.nan)
        for name, value in values.items()
    }
    return {"values": kept, "diverged": diverged, "lost": lost}


_NEVER = 2**62


def _first_lost(finite: Tensor, at: Sequence[float | int]) -> Tensor:
    """Step of the first record that is not finite, -1 where all are, of [*runs times]."""
    lost, steps = ~finite.cpu(), torch.tensor(list(at))
    return torch.where(lost.any(-1), steps[lost.int().argmax(-1)], -1)


def never(*runs: int) -> Tensor:
    """Mark runs none of which diverged."""
    return torch.full(runs, -1)


def measurements_named(names: Collection[str] | None, known: Collection[str]) -> list[str]:
    """The names of measurements, all that are known for None.

    Raises:
        ValueError: one is unknown.
    """
    names = list(known) if names is None else as_list("names", names)
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"unknown measurement {describe(name)}: choose from {', '.join(known)}")
    return names


def record(
    at: Sequence[int],
    advance: Callable[[int], object],
    measure: Callable[[], Mapping[str, Tensor]],
    *,
    start: int = 0,
    axis: int = 1,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Advance a simulation to each of the steps and measure it there.

    Args:
        at: Steps to record at, increasing, the first at least ``start``.
        advance: Takes that many more steps.
        measure: name -> tensor, at the step reached.
        start: Steps done before.
        axis: Which axis of the result is that of the recorded steps.
        progress: Told which share of the steps is done, about a hundred times and at each record.

    Returns:
        name -> the measured tensors, stacked along ``axis``.
    """
    reached, last, rows = start, at[-1], []
    piece = last - start if progress is None else -(-(last - start) // _REPORTS)
    for step in at:
        while reached < step:
            count = min(piece, step - reached)
            advance(count)
            reached += count
            if progress is not None:
                progress((reached - start) / (last - start))
        rows.append(measure())
    return stacked(rows, axis)


def stacked(rows: Sequence[Mapping[str, Tensor]], axis: int = 1) -> dict[str, Tensor]:
    """Stack the measurements of all records, name by name."""
    return {name: torch.stack([row[name] for row in rows], axis) for name in rows[0]}


def integrate(
    velocity: Callable[[tuple[Tensor, ...]], Iterable[Tensor]],
    start: Sequence[Tensor],
    times: Float[Tensor, " times"],
    *,
    tolerance: float,
    longest: int,
    advice: str,
    diverging: str,
    method: str = "DOP853",
) -> list[tuple[Tensor, ...]]:
    """Integrate ``x' = velocity(x)`` with adaptive steps, x being several tensors, and read it off at the times.

    Args:
        velocity: x -> x', part by part.
        start: x at time 0, in float64.
        times: Increasing from 0.
        tolerance: Relative error of one step; the absolute one is a hundredth of it.
        longest: Most evaluations of the velocity.
        advice: How to need fewer, for the sentence that refuses more.
        diverging: What grows without bound where the integration stops, such as "weights".
        method: One of SciPy's ``solve_ivp``.

    Returns:
        The parts of x at each time.

    Raises:
        RuntimeError: the integration stopped or took too long.
    """
    sizes, device = [part.numel() for part in start], start[0].device

    def parts(numbers: np.ndarray) -> tuple[Tensor, ...]:
        split = torch.from_numpy(np.array(numbers)).to(device).split(sizes)
        return tuple(piece.view_as(part) for piece, part in zip(split, start, strict=True))

    def flat(parts: Iterable[Tensor]) -> np.ndarray:
        return torch.cat([part.reshape(-1) for part in parts]).detach().cpu().numpy()

    solution = solve(
        lambda _, numbers: flat(velocity(parts(numbers))),
        (0.0, float(times[-1])),
        flat(start),
        times.cpu().numpy(),
        longest=longest,
        advice=advice,
        method=method,
        rtol=tolerance,
        atol=tolerance / 100,
    )
    if not solution.success or len(solution.t) < len(times):
        reached = solution.t[-1] if len(solution.t) else 0.0
        raise RuntimeError(f"gradient flow stopped at t = {reached:.4g} ({solution.message}): the {diverging} diverge")
    return [parts(column) for column in solution.y.T]


def solve(
    velocity: Callable[[float, np.ndarray], np.ndarray],
    span: tuple[float, float],
    start: np.ndarray,
    at: np.ndarray,
    *,
    longest: int,
    advice: str,
    **options: Any,
) -> Any:
    """SciPy's solution of an initial value problem, in no more than so many evaluations.

    Raises:
        RuntimeError: it takes more.
    """
    calls = 0

    # SciPy sets no bound on its evaluations: a stiff problem would be integrated for ever.
    def counted(time: float, numbers: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > longest:
            raise RuntimeError(f"gradient flow took {longest} evaluations to t = {time:.4g} of {span[1]:.4g}: {advice}")
        return velocity(time, numbers)

    return scipy.integrate.solve_ivp(counted, span, start, t_eval=at, **options)


def warn_of_divergence(diverged: Int[Tensor, "*runs"], lost: Mapping[str, Tensor]) -> None:
    """Say how many runs are no longer finite, from which of the steps on, and what went first.

    Warns:
        UserWarning: there is one.
    """
    gone = diverged >= 0
    if gone.any():
        step = int(diverged[gone].min())
        place = int((diverged == step).flatten().int().argmax())
        first = went_first({name: steps.flatten()[place] for name, steps in lost.items()})
        warn(
            f"{int(gone.sum())} of {gone.numel()} runs are no longer finite, the first at step {step}: {first} went "
            "first, and all its numbers are nan from there; choose a smaller rate (or a weaker penalty)"
        )


def warn(text: str) -> None:
    """Warn at the line outside this package that called it, however many functions of it lie between.

    Warns:
        UserWarning: always.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("falign."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
