"""From a block of runs to a simulator's batch, and back to the outcome of each run."""

from collections.abc import Callable, Collection, Sequence
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from falign.lab.experiment import Outcome, Task
from falign.theory.two_layer import Engine, Penalty, Trajectory, bytes_needed, simulate

Row = tuple[int, int]
"""Seed and width: what a row of a batch stands for; its columns are the ridges."""


def row_of(task: Task) -> Row:
    """The row of a run: its seed and its point's "p"."""
    return task.seed, int(task.point["p"])


def penalty_of(task: Task) -> Penalty:
    """The ridge of a run: its point's "strength", constant in time."""
    return Penalty(float(task.point["strength"]))


def batch(tasks: Sequence[Task]) -> tuple[list[Row], list[Penalty]]:
    """Rows and columns of the batch that holds all runs of a block, each once."""
    return sorted({row_of(task) for task in tasks}), list(dict.fromkeys(penalty_of(task) for task in tasks))


def engine_bytes(tasks: Sequence[Task], engine: str, dtype: torch.dtype) -> int:
    """Bytes that an engine needs for a block: see ``bytes_needed``; sizes are the point's "n" and "d"."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    return bytes_needed(
        engine=engine,
        n=int(point["n"]),
        d=int(point["d"]),
        p=max(p for _, p in rows),
        seeds=len(rows),
        penalties=len(penalties),
        dtype=dtype,
    )


def trained(
    engine: Engine,
    at: Sequence[int],
    names: Collection[str] | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """``simulate``, without its warning of runs that diverge: their outcomes say so."""
    with catch_warnings():
        simplefilter("ignore", UserWarning)
        return simulate(engine, at, names, progress=progress)


def outcomes(tasks: Sequence[Task], trajectory: Trajectory, unit: str = "step") -> list[Outcome]:
    """What each run of a block left.

    Args:
        tasks: The runs, in any order.
        trajectory: Of their batch, rows and columns as ``batch`` gives them.
        unit: What its steps are, for the message.

    Returns:
        One outcome a run, with a record at every recorded step until it diverged.
    """
    rows, penalties = batch(tasks)
    steps = trajectory.steps.tolist()
    found = []
    for task in tasks:
        at = rows.index(row_of(task)), penalties.index(penalty_of(task))
        values = {name: column[at] for name, column in trajectory.values.items()}
        found.append(_outcome(values, steps, int(trajectory.diverged[at]), unit))
    return found


def _outcome(values: dict[str, Tensor], steps: list[int], diverged: int, unit: str) -> Outcome:
    kept = len(steps) if diverged < 0 else steps.index(diverged)
    records = {"step": steps[:kept], **{name: column[:kept].tolist() for name, column in values.items()}}
    if diverged < 0:
        return Outcome(records=records)
    return Outcome(
        records=records, diverged=f"a weight or the loss was not finite at {unit} {diverged}: lower the rate"
    )
