"""Error against iteration where the inner dimension suffices: gradient descent, FA and FA*."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.papers.garg2022.convergence_claims import CLAIMS, LONG
from falign.papers.garg2022.courses import begun, drawn, outcomes, trained
from falign.papers.garg2022.drawing_convergence import errors_by_step
from falign.papers.garg2022.matrices import matrix
from falign.theory import factorisation
from falign.theory.two_layer import spaced

_RECORDS = 50
_KEYS = ["data", "method", "scale", "r", "rank", "fine", "step"]


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the draws of a block together: in steps of η/fine, or, where fine is 0, in continuous time."""
    point = tasks[0].point
    Y = matrix(point, setting).to(setting.device)
    B, rate, fine = drawn(tasks, Y), float(point["rate"]), int(point["fine"])
    at = spaced(int(point["steps"]), _RECORDS)
    if fine:
        finely = [fine * step for step in at]
        course = trained(tasks, Y, B, rate=rate / fine, at=finely, names=["error"], progress=setting.report)
    else:
        times = rate * torch.tensor(at, dtype=torch.float64)
        method, here = str(point["method"]), begun(tasks, Y, B)
        course = factorisation.flow(method, Y, B, here, times=times, names=["error"], progress=setting.report)
    return outcomes(at, {"error": course.values["error"] / Y.norm()})


def _points(data: str, *, rank: int, steps: int, few: int, scale: float, **sizes: Scalar) -> tuple[Point, ...]:
    """All methods and starts for r = rank Y and half as much again, in steps; and for few of them beside the flow.

    Args:
        data: What is factored.
        rank: Of Y.
        steps: Length for the slowest, FA* with r = rank Y; a fifth of it is enough from zero, half of it else.
        few: Length of what is compared with continuous time.
        scale: Of the entries of a random start.
        sizes: Further values of every point.
    """
    same = {"data": data, "rank": rank, "rate": 0.4, **sizes}
    starts = (("fa", 0.0), ("fa", scale), ("fa*", 1.0), ("gd", scale))
    long = [
        {**same, "r": r, "method": method, "scale": start, "fine": 1, "steps": steps // share}
        for r, shares in ((rank, (5, 2, 1, 2)), (rank + rank // 2, (5, 2, 2, 2)))
        for (method, start), share in zip(starts, shares, strict=True)
    ]
    short = [
        {**same, "r": rank + rank // 2, "method": method, "scale": start, "fine": fine, "steps": few}
        for method, start in starts
        for fine in (0, 4, 16)
    ]
    return (*long, *short)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Median and largest error of the draws at every record."""
    shown = table.filter(LONG | (pl.col("fine") == 0))
    return shown.group_by(_KEYS).agg(median=pl.col("error").median(), most=pl.col("error").max()).sort(_KEYS)


CONVERGENCE = Experiment(
    name="garg2022.convergence",
    title="Error against iteration, r ≥ rank(Y)",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        preset: (
            *_points("power law", n=n, m=n, rank=rank, steps=steps, few=few, scale=0.02),
            *(
                point
                for name, m in images
                for point in _points(name, n=n, m=m, rank=rank, steps=steps, few=few, scale=0.02 if m < 100 else 0.005)
            ),
        )
        for preset, n, rank, steps, few, images in (
            ("smoke", 12, 3, 1500, 10, (("digits", 64),)),
            ("quick", 40, 6, 10000, 50, (("digits", 64),)),
            ("paper", 100, 20, 200000, 200, (("digits", 64), ("mnist", 784), ("fashion-mnist", 784))),
        )
    },
    seeds={"smoke": 2, "quick": 10, "paper": 50},
    run=run,
    agreement=1e-10,
    cost=lambda task: float(int(task.point["steps"]) * max(int(task.point["fine"]), 10)),
    pictures=(
        Picture(
            name="convergence",
            caption="Error |ZW - Y|/|Y| against iteration, η = 0.4, singular values of Y at most 1: median of the "
            "draws of B and of the starts, dotted the largest. Dots: gradient flow at t = η × step. Above r is the "
            "rank of Y, below half as much again.",
            data=_drawn,
            draw=errors_by_step,
        ),
    ),
    claims=CLAIMS,
)
