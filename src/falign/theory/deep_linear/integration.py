"""Gradient flow of modes over the one weight that drives each, up to any time."""

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.deep_linear.limits import settled
from falign.theory.deep_linear.line import Line

_FINEST = 1e-13
"""The least relative error that a step in float64 can be held to."""

_NEAR, _LONGEST = 10, 50_000
"""Distance from its limit, in tolerances, at which a mode arrives, and the most evaluations until one does."""


def integrated(path: Line, times: Tensor, tolerance: float) -> Float[Tensor, "times layers modes"]:
    """Weights at the times, each mode integrated until it is next to its limit: from there it is on an exponential.

    An explicit solver would go on in steps as short as the quickest mode allows, for as long as the slowest takes.

    Args:
        path: The modes.
        times: Increasing, from 0 on.
        tolerance: Error of a step relative to the weight, or to the lesser of its start and its limit.

    Raises:
        RuntimeError: the integration stopped or took too long.
    """
    start, end = path.start, settled(path.modes).weights.gather(0, path.driver[None])[0]
    sizes = torch.stack([start.abs(), end.abs()])
    least = sizes.masked_fill(sizes == 0, torch.inf).amin(0).nan_to_num(posinf=1.0)
    within, last = max(tolerance, _FINEST), float(times[-1])
    near = _NEAR * within * (least + end.abs())
    course = start.expand(len(times), -1).clone()
    rows, x, now = torch.arange(len(start)), start, 0.0
    while True:
        arrived = (end[rows] - x).abs() <= 2 * near[rows]
        arrived |= (end[rows] - x) * (end[rows] - start[rows]) <= 0
        _finish(path.take(rows[arrived]), times, course, rows[arrived], x[arrived], end[rows[arrived]], now)
        rows, x = rows[~arrived], x[~arrived]
        if not len(rows) or now >= last:
            return path.weights(course.T).permute(2, 0, 1)
        due = (times >= now).nonzero()[:, 0]
        leg = _Leg(path.take(rows), end[rows], near[rows], last)
        solved = scipy.integrate.solve_ivp(
            leg.velocity,
            (now, last),
            x.numpy(),
            "DOP853",
            times[due].numpy(),
            events=leg,
            rtol=within,
            atol=(within * least[rows]).numpy(),
        )
        if not solved.success:
            raise RuntimeError(f"gradient flow stopped after t = {max(solved.t, default=0.0):.4g} ({solved.message})")
        if len(solved.t):
            course[due[: len(solved.t), None], rows] = torch.from_numpy(solved.y.T.copy())
        if solved.status == 0:
            return path.weights(course.T).permute(2, 0, 1)
        now, x = float(solved.t_events[0][0]), torch.from_numpy(solved.y_events[0][0].copy())


class _Leg:
    """What the solver asks of modes that are under way; called, it crosses 0 where the first of them arrives."""

    terminal = True

    def __init__(self, path: Line, end: Tensor, near: Tensor, last: float):
        self._path, self._end, self._last, self._calls = path, end, last, 0
        self._margin = near * (end - path.start).sign()

    def velocity(self, time: float, x: np.ndarray) -> np.ndarray:
        self._calls += 1
        if self._calls > _LONGEST:
            raise RuntimeError(
                f"gradient flow took {_LONGEST} evaluations to t = {time:.4g} of {self._last:.4g}: ask for earlier "
                "times or a larger tolerance"
            )
        return _velocity(self._path, torch.from_numpy(x)).numpy()

    def __call__(self, time: float, x: np.ndarray) -> float:
        return float(((self._end - torch.from_numpy(x)) / self._margin).min()) - 1


def _velocity(path: Line, x: Tensor) -> Float[Tensor, " modes"]:
    here = x[:, None]
    return (path.drive(here) * path.error(here))[:, 0]


def _finish(path: Line, times: Tensor, course: Tensor, rows: Tensor, x: Tensor, end: Tensor, now: float) -> None:
    """Into ``course``, columns ``rows``: the approach from x to the limit, where x' is linear to the tolerance."""
    gap = x - end
    rate = torch.where(gap != 0, -_velocity(path, x) / gap, 0.0).clamp(min=0)
    late = (times >= now).nonzero()
    course[late, rows] = end + gap * torch.exp(-rate * (times[late] - now))
