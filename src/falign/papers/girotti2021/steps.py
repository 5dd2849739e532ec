"""Steps of gradient descent beside its flow, at shares of the largest stable step size."""

from collections.abc import Sequence
from math import isfinite
from warnings import catch_warnings, simplefilter

import polars as pl
import torch
from torch import Tensor

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task, grid
from falign.papers.girotti2021.drawing_steps import beside_the_flow
from falign.papers.girotti2021.scalars import batches, paced
from falign.papers.girotti2021.steps_claims import CLAIMS
from falign.theory.deep_linear import (
    Modes,
    asymptotic_rate,
    conserved_invariants,
    descend,
    error_recursion,
    flow,
    stable_rate,
)
from falign.theory.statement import TheoremCheck

_TOLERATED = 1e-12
"""What the identities' bounds allow of the sizes that are in them."""
_STARTS = (("zero", 1.0, 2), ("positive", 1.0, 2), ("anti-aligned", 1.0, 2), ("zero", 1.0, 3))


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Runs of a depth together, each in units of its own step size, so that every step is one unit of time."""
    found: dict[int, Outcome] = {}
    for places, begun in batches(tasks):
        shares = torch.tensor([float(tasks[place].point["share"]) for place in places], dtype=torch.float64)
        rates, steps = shares * _stable(begun), int(tasks[places[0]].point["steps"])
        paced_ = paced(begun, rates)
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # beyond the stable rate is what some runs are about
            course = descend(paced_, rate=1.0, steps=steps, at=range(steps + 1))
        exact = flow(paced_, times=course.times).share
        columns = {
            "learned": course.share,
            "flow": exact,
            "drift": (course.invariants - course.invariants[0])[:, 0] / rates ** (1 / (begun.depth - 1)),
        }
        left = {
            "account_left": conserved_invariants(course),
            "recursion_left": error_recursion(course),
        }
        settling = asymptotic_rate(begun) * rates
        for column, place in enumerate(places):
            count = int(course.error[:, column].isfinite().sum())
            records = {name: values[:count, column].tolist() for name, values in columns.items()}
            records |= {name: [_relative(check, column)] * count for name, check in left.items()}
            found[place] = Outcome(
                records={
                    "step": list(range(count)),
                    "time": (rates[column] * course.times[:count]).tolist(),
                    "settling": [float(settling[column])] * count,
                    "diverged": [int(course.diverged[column])] * count,
                    **records,
                }
            )
    return [found[place] for place in range(len(tasks))]


def _stable(begun: Modes) -> Tensor:
    """η_max of each; starts that are the same are looked up once."""
    numbers = torch.cat([begun.weights, begun.target[None]])
    _, which = numbers.unique(dim=1, return_inverse=True)
    first = torch.stack([(which == kind).int().argmax() for kind in range(int(which.max()) + 1)])
    return stable_rate(begun.take(first))[which]


def _relative(check: TheoremCheck, run: int) -> float | None:
    """What is left of an identity, relative to the sizes of what is in it; None for a run that was not finite."""
    left = float((check.measured[run] / check.bound[run]).max()) * _TOLERATED
    return left if isfinite(left) else None


def _points(targets: Sequence[float], shares: Sequence[float], steps: int) -> tuple[Point, ...]:
    return tuple(
        point
        for scheme, size, depth in _STARTS
        for point in grid(
            rule="fa", depth=depth, scheme=scheme, size=size, target=_sizes(scheme, targets), share=shares, steps=steps
        )
    )


def _sizes(scheme: str, targets: Sequence[float]) -> tuple[float, ...]:
    """From the anti-aligned start also a component below λ_c."""
    return (0.1, *targets) if scheme == "anti-aligned" else tuple(targets)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    one = (pl.col("depth") == 2) & (pl.col("scheme") == "zero") & (pl.col("target") == 1.0)
    return table.filter(one).select("share", "step", "time", "learned", "flow").sort("share", "step")


STEPS = Experiment(
    name="girotti2021.steps",
    title="Steps beside the flow",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“continuous and discrete dynamics”); the conditions are "
    "derived",
    revision=1,
    grid={
        "smoke": _points((1.0,), (0.05, 0.1, 0.5, 0.9, 1.1), 400),
        "quick": _points((0.5, 1.0, 5.0), (0.05, 0.1, 0.5, 0.9, 1.1), 600),
        "paper": _points(
            (0.2, 0.5, 1.0, 5.0, 20.0), (0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.02, 1.1), 3000
        ),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=run,
    agreement=1e-6,
    together=("scheme", "size", "depth", "target", "share"),
    pictures=(
        Picture(
            name="steps",
            caption="A component of size 1 from zero weights, two layers: in steps (points), at shares of the largest "
            "stable step size η_max, and in continuous time (line).",
            data=_drawn,
            draw=beside_the_flow,
        ),
    ),
    claims=CLAIMS,
)
