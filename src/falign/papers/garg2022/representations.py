"""Equal errors, representations that are almost orthogonal: ratio and overlap against m at fixed r."""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task
from falign.papers.garg2022.courses import drawn
from falign.papers.garg2022.drawing_representations import ratio_and_overlap
from falign.papers.garg2022.matrices import matrix
from falign.papers.garg2022.representations_claims import CLAIMS
from falign.theory import factorisation
from falign.theory.factorisation import best_error, flat_spectrum, optimal_rows, overlap, stationary_error

_SCALE = 0.02
"""Of the entries of gradient descent's start."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Errors and representations of the draws of a block together, from closed forms or from trainings."""
    point = tasks[0].point
    m, r = int(point["m"]), int(point["r"])
    whole = flat_spectrum(m, r) if point["data"] == "flat" else matrix({**point, "n": m, "rank": 0}, setting)
    Y = (whole / torch.linalg.matrix_norm(whole, 2)).to(setting.device)
    B = drawn(tasks, Y)
    if point["found"] == "trained":
        ratio, shared = _trained(tasks, Y, B, setting)
    else:
        ratio, shared = (
            stationary_error(Y, B) / best_error(Y, r),
            overlap(B @ Y, optimal_rows(Y, r).expand(len(B), r, m)),
        )
    columns = {"ratio": ratio.tolist(), "overlap": shared.tolist()}
    return [Outcome(records={name: [values[run]] for name, values in columns.items()}) for run in range(len(tasks))]


def _trained(
    tasks: Sequence[Task], Y: Float[Tensor, "m m"], B: Float[Tensor, "runs r m"], setting: Setting
) -> tuple[Float[Tensor, " runs"], Float[Tensor, " runs"]]:
    """FA from zero, gradient descent from a random start; at the end of both."""
    point, seeds = tasks[0].point, [task.seed for task in tasks]
    starts = {"fa": factorisation.zero(Y, B), "gd": factorisation.normal(Y, B, seeds=seeds, scale=_SCALE)}
    rate, steps = float(point["rate"]), int(point["steps"])
    ends = []
    for method, start in starts.items():
        ends.append(factorisation.descend(method, Y, B, start, rate=rate, steps=steps, names=["error"], at=[steps]))
        setting.report(len(ends) / len(starts))
    fa, gd = ends
    return (fa.values["error"] / gd.values["error"])[:, 0], overlap(fa.end.W, gd.end.W)


def _points(sizes: Sequence[int], tried: Sequence[int], *, r: int, steps: int) -> tuple[Point, ...]:
    """Closed forms for every m, trainings for some."""
    return tuple(
        {"data": data, "m": m, "r": r, "found": found, "rate": 0.3, "steps": steps if found == "trained" else 0}
        for data in ("flat", "gaussian")
        for found, those in (("closed form", sizes), ("trained", tried))
        for m in those
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["data", "found", "r", "m"]
    values = [
        expression.alias(f"{name}_{word}")
        for name in ("ratio", "overlap")
        for word, expression in (("mean", pl.col(name).mean()), ("sd", pl.col(name).std()))
    ]
    return table.group_by(keys).agg(*values).sort(keys)


REPRESENTATIONS = Experiment(
    name="garg2022.representations",
    title="Almost orthogonal representations at equal error",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        "smoke": _points((10, 20, 40), (20,), r=2, steps=1000),
        "quick": _points((25, 50, 100, 200, 400), (25, 50), r=5, steps=3000),
        "paper": _points((25, 50, 100, 200, 400, 800), (50, 100, 400), r=5, steps=50000),
    },
    seeds={"smoke": 3, "quick": 10, "paper": 100},
    run=run,
    agreement=1e-11,
    memory=lambda tasks: 8 * 6 * (len(tasks) + 1) * int(tasks[0].point["m"]) ** 2,
    cost=lambda task: float(int(task.point["m"]) ** 2 * (1 + int(task.point["steps"]) / 100)),
    pictures=(
        Picture(
            name="representations",
            caption="FA's error over that of gradient descent, and the overlap |P_FA P_GD|²/r of their "
            "representations, the row spaces of W, against the size of Y, m × m; mean ± standard deviation over the "
            "draws of B. Flat: singular values 1.1 (r of them) and 1. Filled: closed forms; open: trained. Dashed: "
            "r/m, two subspaces at random.",
            data=_drawn,
            draw=ratio_and_overlap,
        ),
    ),
    claims=CLAIMS,
)
