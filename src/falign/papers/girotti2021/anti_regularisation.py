"""Implicit anti-regularisation: from an anti-aligned hidden weight a larger component is learned more slowly."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task
from falign.papers.girotti2021.anti_regularisation_claims import CLAIMS, CRITICAL
from falign.papers.girotti2021.drawing_anti_regularisation import rates_and_limits
from falign.papers.girotti2021.scalars import paced
from falign.theory.deep_linear import asymptotic_rate, flow, learning_time, limit, modes

_FITTED = 1e-4, 1e-8
"""The rate is fitted to the errors between these shares of the component."""
_NUMBERS = ("size", "feedback", "target")


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Integrate all runs together, each in units of its own time, and fit their rates."""
    size, m, target = (torch.tensor([float(task.point[name]) for task in tasks]).double() for name in _NUMBERS)
    begun = modes(target, [-size, torch.zeros_like(size)], feedback=m)
    moments = torch.linspace(0, 1, int(tasks[0].point["records"]), dtype=torch.float64)
    units = learning_time(begun, _FITTED[1])
    course = flow(paced(begun, units), times=moments, tolerance=1e-12)
    missing = (1 - course.share).abs()
    columns = {
        "rate": asymptotic_rate(begun),
        "fitted": torch.stack([_slope(moments, own) for own in missing.mT]) / units,
        "limit": limit(begun),
        "hidden": course.weights[-1, 0] / units.sqrt(),
        "learned": learning_time(begun),
    }
    return [
        Outcome(records={name: [float(values[at])] for name, values in columns.items()}) for at in range(len(tasks))
    ]


def _slope(moments: Tensor, missing: Tensor) -> Tensor:
    """``-d ln|e|/dt`` of the last records between the two sizes of error."""
    late = (missing <= _FITTED[0]) & (moments > moments[missing > _FITTED[0]].max())
    return -torch.tensor(np.polyfit(moments[late], missing[late].log(), 1)[0])


def _points(shares: Sequence[float], records: int) -> tuple[Point, ...]:
    """Components at shares of λ_c, and the two on either side of it, for unit start and feedback."""
    targets = sorted({*(round(share * CRITICAL, 8) for share in shares), 0.19, 0.195})
    return tuple({"size": 1.0, "feedback": 1.0, "target": target, "records": records} for target in targets)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    return table.select("target", "rate", "fitted", "limit", "hidden", "learned").sort("target")


ANTI_REGULARISATION = Experiment(
    name="girotti2021.anti-regularisation",
    title="Implicit anti-regularisation",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“implicit anti-regularization”); the rates are derived",
    revision=1,
    grid={
        "smoke": _points((0.2, 0.5, 0.9, 0.99, 2.0), 401),
        "quick": _points((0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 0.99, 1.05, 1.2, 1.5, 2.0, 3.0), 401),
        "paper": _points((*(k / 50 for k in range(1, 50)), 0.99, 0.995, 1.005, 1.05, 1.2, 1.5, 2.0, 3.0, 5.0), 1001),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=run,
    agreement=1e-4,
    together=("target",),
    pictures=(
        Picture(
            name="anti-regularisation",
            caption="From θ_1 = -1, θ_2 = 0: rate ρ* at which the error of a component vanishes in the end, where its "
            "hidden weight goes, and when it is learned, against its size. Points: the flow, the rate fitted to it; "
            "lines: closed form. Below λ_c = 0.19245 (dotted) small components are the faster ones, and θ_1 stays "
            "negative.",
            data=_drawn,
            draw=rates_and_limits,
        ),
    ),
    claims=CLAIMS,
)
