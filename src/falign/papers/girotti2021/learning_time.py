"""The time in which a component is learned against its size: power laws by depth, and what other starts do to them."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task, grid
from falign.papers.girotti2021.drawing_learning_time import times_by_size
from falign.papers.girotti2021.learned import TOLERANCE, crossing
from falign.papers.girotti2021.learning_time_claims import CLAIMS
from falign.papers.girotti2021.scalars import batches, paced
from falign.theory.deep_linear import flow, learning_time

_STARTS = (
    *(("fa", depth, "zero", 1.0) for depth in (2, 3, 4)),
    ("fa", 2, "small", 1e-3),
    *(("fa", 2, scheme, 1.0) for scheme in ("positive", "negative", "aligned", "anti-aligned")),
    ("bp", 2, "small", 1e-3),
)
_BEYOND = 1.02
"""The flow is recorded to so much of the predicted time, so that a prediction that is too early is seen."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Integrate the runs of a rule and depth together, each in units of its predicted time, and read off the time."""
    found: dict[int, Outcome] = {}
    for places, started in batches(tasks):
        predicted = learning_time(started, TOLERANCE)
        times = torch.linspace(0, _BEYOND, int(tasks[places[0]].point["records"]), dtype=torch.float64)
        shares = flow(paced(started, predicted), times=times).share
        for column, place in enumerate(places):
            unit, share = float(predicted[column]), crossing(times, shares[:, column])
            learned = None if share is None else unit * share
            found[place] = Outcome(records={"learned": [learned], "predicted": [unit]})
    return [found[place] for place in range(len(tasks))]


def _points(targets: Sequence[float], records: int) -> tuple[Point, ...]:
    return tuple(
        point
        for rule, depth, scheme, size in _STARTS
        for point in grid(rule=rule, depth=depth, scheme=scheme, size=size, target=targets, records=records)
    )


def _targets(count: int) -> tuple[float, ...]:
    """From 0.01 to 30, evenly on a logarithmic axis, with four digits."""
    return tuple(float(f"{value:.4g}") for value in np.geomspace(0.01, 30, count))


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    return table.select("rule", "depth", "scheme", "target", "learned", "predicted").sort(
        "rule", "depth", "scheme", "target"
    )


LEARNING_TIME = Experiment(
    name="girotti2021.learning-time",
    title="How long a component takes",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“approximately learned by decreasing order”); the laws are "
    "derived",
    revision=1,
    grid={
        "smoke": _points(_targets(7), 201),
        "quick": _points(_targets(22), 401),
        "paper": _points(_targets(85), 801),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=run,
    agreement=1e-6,
    together=("rule", "depth", "scheme", "size", "target"),
    pictures=(
        Picture(
            name="learning-time",
            caption="Time to 90 % of a component against its size λ. Left: from zero weights, by depth; dashed: the "
            "slopes -2/3, -6/7 and -14/15. Right: two layers from other starts, and gradient descent; the anti-aligned "
            "start's times rise up to λ_c = 0.19 (dotted) and past the bottleneck behind it. Points: the flow; lines: "
            "closed form and quadrature.",
            data=_drawn,
            draw=times_by_size,
        ),
    ),
    claims=CLAIMS,
)
