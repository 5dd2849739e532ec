"""From a block of runs that differ in their seeds to draws of B trained together, and back to each run's outcome."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Outcome, Task
from falign.theory import factorisation
from falign.theory.factorisation import Course, State


def drawn(tasks: Sequence[Task], Y: Float[Tensor, "n m"]) -> Float[Tensor, "runs r n"]:
    """B of every run, entries N(0, 1/n); r is the point's."""
    seeds = [task.seed for task in tasks]
    return factorisation.feedback(len(Y), int(tasks[0].point["r"]), seeds=seeds).to(Y)


def begun(tasks: Sequence[Task], Y: Float[Tensor, "n m"], B: Float[Tensor, "runs r n"]) -> State:
    """Orthonormal rows of W for fa*; else entries N(0, scale²), scale the point's, where 0 is the zero start."""
    seeds, scale = [task.seed for task in tasks], float(tasks[0].point["scale"])
    if tasks[0].point["method"] == "fa*":
        return factorisation.orthonormal(Y, B, seeds=seeds)
    return factorisation.normal(Y, B, seeds=seeds, scale=scale) if scale else factorisation.zero(Y, B)


def trained(
    tasks: Sequence[Task],
    Y: Float[Tensor, "n m"],
    B: Float[Tensor, "runs r n"],
    *,
    rate: float,
    at: Sequence[int],
    names: Sequence[str],
    progress: Callable[[float], None] | None = None,
) -> Course:
    """Train the runs of a block in steps.

    Args:
        tasks: The runs; their point has "method" and "scale".
        Y: What they factor.
        B: Their feedback.
        rate: η.
        at: Steps to record at; training ends with the last one.
        names: What is recorded.
        progress: Told now and then which share of the steps is done.
    """
    method = str(tasks[0].point["method"])
    here = begun(tasks, Y, B)
    return factorisation.descend(method, Y, B, here, rate=rate, steps=at[-1], names=names, at=at, progress=progress)


def outcomes(at: Sequence[int], columns: Mapping[str, Float[Tensor, "runs times"]]) -> list[Outcome]:
    """What each run of a block left.

    Args:
        at: Steps of its records.
        columns: What is kept, a row a run; "error" is among it.

    Returns:
        One outcome a run, with a record at every recorded step until it diverged; None for what is not defined there,
        such as the cosine of Z = 0.
    """
    lasted = columns["error"].isfinite().cumprod(1).sum(1).tolist()
    return [
        Outcome(
            records={"step": list(at[:kept]), **{name: _known(rows[run, :kept]) for name, rows in columns.items()}},
            diverged=None if kept == len(at) else f"the error was not finite at step {at[kept]}: lower the rate",
        )
        for run, kept in enumerate(lasted)
    ]


def _known(values: Float[Tensor, " times"]) -> list[float | None]:
    return [value if isfinite(value) else None for value in values.tolist()]
