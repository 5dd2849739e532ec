"""How deep linear networks are trained: by ``falign.theory.conservation``, at a cost that the data do not raise."""

from collections.abc import Sequence
from dataclasses import replace

from falign.theory import conservation
from falign.theory.conservation import Course, State
from falign.theory.deep_linear.covariances import compressed
from falign.theory.deep_linear.modes import Rule
from falign.theory.deep_linear.network import linear
from falign.theory.deep_linear.rates import warn_of_rate
from falign.theory.door import public, recording
from falign.theory.inputs import Numbers, moments


@recording
def descend_matrices(
    state: State,
    X: Numbers,
    Y: Numbers,
    *,
    rule: Rule = "fa",
    rate: float,
    steps: int,
    names: Sequence[str] = ("loss", "map"),
    at: Sequence[int] | None = None,
) -> Course:
    """Full-batch steps ``W ← W + η Ẇ`` of linear networks, at a cost that does not grow with the number of points.

    ``falign.theory.conservation.descend`` on the ``compressed`` data. Warns where η is beyond ``local_rate``, with its
    value, at the start or where the run ends, and where a run is no longer finite, with a rate at which it ends stable.

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
    course = conservation.descend(state, linear(rule), few.X, few.Y, rate=rate, steps=steps, names=names, at=at)
    warn_of_rate(rate, (state, course.end), few.X, few.Y, rule, steps)
    return _with(course, few.left)


@public
def flow_matrices(
    state: State,
    X: Numbers,
    Y: Numbers,
    *,
    rule: Rule = "fa",
    times: Numbers,
    names: Sequence[str] = ("loss", "map"),
    tolerance: float = 1e-9,
) -> Course:
    """Gradient flow of linear networks (SciPy, DOP853), at a cost that does not grow with the number of points.

    Args:
        state: The networks, in float64.
        X: Inputs [n d].
        Y: Targets [n outputs].
        rule: How the error returns.
        times: Where to record, increasing from 0.
        names: As in ``descend_matrices``.
        tolerance: Relative error of one step.

    Raises:
        ValueError: what the simulator or ``compressed`` refuses.
        RuntimeError: the weights diverge.
    """
    _is_state(state)
    few = compressed(X, Y)
    course = conservation.flow(
        state, linear(rule), few.X, few.Y, times=moments(times), names=names, tolerance=tolerance
    )
    return _with(course, few.left)


def _is_state(given: object) -> None:
    if not isinstance(given, State):
        raise ValueError(f"the networks are a {type(given).__name__}, expected a State: pass network(W, B)")


def _with(course: Course, left: float) -> Course:
    """The course with the loss of all points, not only of the few."""
    if "loss" not in course.values:
        return course
    return replace(course, values={**course.values, "loss": course["loss"] + left})
