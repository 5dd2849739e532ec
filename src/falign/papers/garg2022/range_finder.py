"""Beyond the paper: FA read as a randomised range finder, and what oversampling and power iteration would buy."""

from collections.abc import Sequence
from itertools import product

import polars as pl
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.papers.garg2022.drawing_range_finder import ratios_by_oversampling
from falign.papers.garg2022.matrices import matrix
from falign.papers.garg2022.range_finder_claims import CLAIMS
from falign.theory import factorisation
from falign.theory.factorisation import best_error, flat_tail, optimum, range_finder_ratios

_OVERSAMPLING = (0, 1, 2, 5, 10)
_POWERS = (0, 1, 2)


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Range finders of the draws of a block together, and for each oversampling FA trained so wide and cut to r."""
    point, seeds = tasks[0].point, [task.seed for task in tasks]
    n, r, tail = int(point["n"]), int(point["r"]), float(point["share"])
    Y = (flat_tail(r, n - r, tail) if tail else matrix({**point, "rank": 0}, setting)).to(setting.device)
    B = factorisation.feedback(n, r + max(_OVERSAMPLING), seeds=seeds).to(Y)
    ratios = range_finder_ratios(Y, B, rank=r, oversampling=_OVERSAMPLING, power=_POWERS)
    trained = []
    for p in _OVERSAMPLING:
        trained.append(_cut(B[:, : r + p], Y, point))
        setting.report(len(trained) / len(_OVERSAMPLING))
    kinds = list(product(range(len(_OVERSAMPLING)), range(len(_POWERS))))
    return [
        Outcome(
            records={
                "oversampling": [_OVERSAMPLING[p] for p, _ in kinds],
                "power": [_POWERS[q] for _, q in kinds],
                "ratio": [float(ratios[run, p, q]) for p, q in kinds],
                "trained": [None if q else float(trained[p][run]) for p, q in kinds],
            }
        )
        for run in range(len(tasks))
    ]


def _cut(B: Float[Tensor, "runs rows n"], Y: Float[Tensor, "n m"], point: Point) -> Float[Tensor, " runs"]:
    """``|Y - [ZW]_r|/optimum``: FA is trained from zero with as many hidden units as B has rows, and cut to rank r."""
    steps, rate, r = int(point["steps"]), float(point["rate"]), int(point["r"])
    start = factorisation.zero(Y, B)
    course = factorisation.descend("fa", Y, B, start, rate=rate, steps=steps, names=["error"], at=[steps])
    cut = optimum(course.end.Z @ course.end.W, r)
    return (Y - cut).square().sum((1, 2)).sqrt() / best_error(Y, r)


def _points(data: Sequence[tuple[str, int, int, float]], **sizes: Scalar) -> tuple[Point, ...]:
    """(name, n, m, share of the tail) each; share is 0 where the name says what the matrix is."""
    return tuple({"data": name, "n": n, "m": m, "share": share, "rate": 0.25, **sizes} for name, n, m, share in data)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Median and quartiles over the draws."""
    keys = ["data", "r", "power", "oversampling"]
    ratio = pl.col("ratio")
    return (
        table.group_by(keys)
        .agg(
            median=ratio.median(),
            low=ratio.quantile(0.25),
            high=ratio.quantile(0.75),
            trained=pl.col("trained").median(),
        )
        .sort(keys)
    )


RANGE_FINDER = Experiment(
    name="garg2022.range-finder",
    title="What oversampling and power iteration would buy",
    source="Beyond the paper: Halko, Martinsson and Tropp 2011",
    revision=1,
    grid={
        "smoke": _points((("power law", 30, 30, 0.0), ("flat tail", 30, 30, 0.01)), r=5, steps=1000),
        "quick": _points(
            (("power law", 100, 100, 0.0), ("flat tail", 100, 100, 0.01), ("digits", 100, 64, 0.0)), r=10, steps=2000
        ),
        "paper": _points(
            (
                ("power law", 400, 400, 0.0),
                ("flat tail", 400, 400, 0.0025),
                ("digits", 400, 64, 0.0),
                ("mnist", 400, 784, 0.0),
                ("fashion-mnist", 400, 784, 0.0),
            ),
            r=20,
            steps=50000,
        ),
    },
    seeds={"smoke": 5, "quick": 20, "paper": 200},
    run=run,
    agreement=1e-12,
    memory=lambda tasks: 8 * 6 * (len(tasks) + 1) * int(tasks[0].point["n"]) * int(tasks[0].point["m"]),
    pictures=(
        Picture(
            name="range-finder",
            caption="Error of a randomised range finder over the optimum, against its oversampling p, for q power "
            "iterations; median and quartiles of the draws. FA is the point p = q = 0. Open: FA trained with r + p "
            "hidden units, its product then cut to rank r. Dashed: the bound √(1 + r/(p - 1)) on the root mean square "
            "for q = 0.",
            data=_drawn,
            draw=ratios_by_oversampling,
        ),
    ),
    claims=CLAIMS,
)
