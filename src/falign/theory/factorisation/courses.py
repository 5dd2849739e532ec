"""Factorise by steps or by gradient flow, and record what is asked for by name."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import recording
from falign.theory.factorisation.measurements import KEPT, Course, known
from falign.theory.factorisation.methods import Method, begun
from falign.theory.factorisation.problem import Start, State
from falign.theory.factorisation.recording import Record
from falign.theory.factorisation.stability import stable_rate
from falign.theory.factorisation.subspace import Small, reduced
from falign.theory.inputs import moments, positive, recorded, told, whole

_LOOKS = 100
"""How often it is told how far a course is."""
_LONGEST = 100_000
"""Most evaluations of a flow's velocity a run."""


@recording
@torch.no_grad()
def descend(
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
) -> Course:
    """Steps ``Z ← Z + η Ż`` and ``W ← W + η Ẇ``, both from the same R, all runs at once.

    Under fa and fa* in the small coordinates in which a run stays, which changes nothing but the speed. A warning
    names the rate from ``stable_rate`` if η is beyond it.

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
    if not whole(steps) or steps < 0:
        raise ValueError(f"steps is {told(steps)}, expected a whole number of at least 0")
    at = recorded(steps, at)
    known(names)
    how, Y, start = begun(method, Y, B, start)
    _warn_of_large_steps(method, Y, B, start, rate)
    small = reduced(how, Y, B, start)
    record = Record(how, Y, B, start, small, names)
    now = State(*(part.clone() for part in small.start))
    R, move = torch.empty_like(small.Y, memory_format=torch.contiguous_format), State(*map(torch.zeros_like, now))
    gained, growth = torch.zeros_like(record.reference.invariant), Y.new_zeros(len(B))
    sound, lasted = torch.ones_like(growth, dtype=torch.bool), torch.zeros_like(growth, dtype=torch.int64)
    keeps, wanted = bool(KEPT & set(names)), set(at)
    piece = -(-at[-1] // _LOOKS) or 1
    for step in range(at[-1] + 1):
        if progress is not None and step and step % piece == 0:
            progress(step / at[-1])
        if step in wanted:
            record.add(now, gained, growth, sound)
        if step == at[-1]:
            break
        how.move(small.Y, small.B, now, R, move)
        if keeps:
            gained.add_(how.gain(*move), alpha=rate**2)
            growth.add_(move.W.square().sum((1, 2)), alpha=rate)
        now.W.add_(move.W, alpha=rate)
        if how.free_output:
            now.Z.add_(move.Z, alpha=rate)
        sound.logical_and_((now.W.sum((1, 2)) + now.Z.sum((1, 2))).isfinite())
        lasted.add_(sound)
    times = rate * torch.tensor(at, dtype=torch.float64)
    diverged = torch.where(sound, -1, lasted + 1)
    return record.course(now, rate=rate, times=times, diverged=diverged)


@recording
@torch.no_grad()
def flow(
    method: str,
    Y: Float[Tensor, "... n m"],
    B: Float[Tensor, "runs r n"],
    start: Start,
    *,
    times: Float[Tensor, " times"] | Sequence[float],
    names: Sequence[str],
    tolerance: float = 1e-10,
    progress: Callable[[float], None] | None = None,
) -> Course:
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
        ValueError: as ``descend``; Y is not in float64, or the times do not increase from 0.
        RuntimeError: the integration stopped, as the factors diverge, or took too long.
    """
    known(names)
    positive("tolerance", tolerance)
    times = moments(times)
    how, Y, start = begun(method, Y, B, start)
    if Y.dtype != torch.float64:
        raise ValueError(f"Y is in {Y.dtype}: gradient flow is integrated in float64")
    small = reduced(how, Y, B, start)
    runs = []
    for run in range(len(B)):
        runs.append(_integrated(how, small, run, times, tolerance))
        if progress is not None:
            progress(len(runs) / len(B))
    record = Record(how, Y, B, start, small, names)
    still, sound = torch.zeros_like(record.reference.invariant), torch.ones(len(B), dtype=torch.bool, device=Y.device)
    here = small.start
    for moment in range(len(times)):
        Z, W, growth = (torch.stack([run[part][moment] for run in runs]).to(Y) for part in range(3))
        here = State(Z, W)
        record.add(here, still, growth, sound)
    return record.course(here, rate=0.0, times=times, diverged=torch.full((len(B),), -1, device=Y.device))


def _warn_of_large_steps(method: str, Y: Tensor, B: Tensor, start: State, rate: float) -> None:
    limits = stable_rate(method, Y, B, start)
    beyond = int((rate > limits).sum())
    if beyond:
        warnings.warn(
            f"rate {rate:.4g} is beyond {float(limits.min()):.4g}, up to which steps of {method} follow the flow, in "
            f"{beyond} of {len(B)} runs: they may oscillate or diverge",
            UserWarning,
            stacklevel=3,
        )


def _integrated(
    method: Method, small: Small, run: int, times: Tensor, tolerance: float
) -> tuple[Float[Tensor, "times p r"], Float[Tensor, "times r q"], Float[Tensor, " times"]]:
    """Z, W and ∫|Ẇ|² of one run at the times."""
    Y, B = small.Y[run : run + 1].cpu(), small.B[run : run + 1].cpu()
    start = State(*(part[run : run + 1].cpu() for part in small.start))
    R, out = torch.empty_like(Y), State(*map(torch.zeros_like, start))
    sizes, calls = [start.Z.numel(), start.W.numel(), 1], 0

    def slope(time: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > _LONGEST:
            raise RuntimeError(
                f"gradient flow took {_LONGEST} evaluations to t = {time:.4g} of {float(times[-1]):.4g}: ask for "
                "earlier times, a larger tolerance, or use descend with a small rate"
            )
        Z, W, _ = torch.from_numpy(flat.copy()).split(sizes)
        method.move(Y, B, State(Z.view_as(start.Z), W.view_as(start.W)), R, out)
        return torch.cat([out.Z.flatten(), out.W.flatten(), out.W.square().sum()[None]]).numpy()

    flat = torch.cat([start.Z.flatten(), start.W.flatten(), start.W.new_zeros(1)]).numpy()
    span = (0.0, float(times[-1]))
    solved = scipy.integrate.solve_ivp(
        slope, span, flat, "DOP853", t_eval=times.numpy(), rtol=tolerance, atol=tolerance / 100
    )
    if not solved.success or len(solved.t) < len(times):
        reached = solved.t[-1] if len(solved.t) else 0.0
        raise RuntimeError(f"gradient flow stopped at t = {reached:.4g} ({solved.message}): the factors diverge")
    Z, W, growth = torch.from_numpy(np.ascontiguousarray(solved.y.T)).split(sizes, 1)
    return Z.view(-1, *start.Z.shape[1:]), W.view(-1, *start.W.shape[1:]), growth.flatten()
