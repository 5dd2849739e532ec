"""Theorem 4.6: a ridge that ends leaves an alignment that does not depend on the width."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import polars as pl
import torch

from falign.lab.experiment import (
    Experiment,
    Outcome,
    Picture,
    Point,
    Setting,
    Task,
    grid,
)
from falign.lab.experiment.statistics import summary
from falign.papers.song2021.alignment_claims import CLAIMS, EXPECTED, NORM, SUMMABLE
from falign.papers.song2021.checks import DELTA, outcome
from falign.papers.song2021.drawing_theory import constant_cosine
from falign.theory.two_layer import bytes_needed
from falign.theory.two_layer.gram import sample
from falign.theory.two_layer.theorems import theorem_4_6


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Try the theorem on each run by itself, with the run's own γ and M."""
    return [_outcome(task) for task in setting.each(tasks)]


def _outcome(task: Task) -> Outcome:
    point = task.point
    n, d = int(point["n"]), int(point["d"])
    gram = sample([task.seed], n=n, d=d, p=int(point["p"]), inputs="scaled")
    size = float(point["norm"]) * sqrt(n) / float(torch.cat([gram.y, gram.rest], 1).norm())
    check = theorem_4_6(
        replace(gram, y=gram.y * size, rest=gram.rest * size),
        d=d,
        rate=float(point["rate"]),
        strength=float(point["L"]),
        sum_constant=float(point["c"]),
        schedule=str(point["schedule"]),
        delta=DELTA,
    )
    return outcome(check)


def memory(tasks: Sequence[Task]) -> int:
    """Bytes of a block: its runs are computed one after the other."""
    point = tasks[0].point
    return 4 * bytes_needed(engine="width-free", n=int(point["n"]), d=int(point["d"]), p=int(point["p"]))


def _points(widths: Sequence[int], *, n: int, d: int) -> tuple[Point, ...]:
    """All (L, c_S) with the cutoff, the other schedules for the first of them, and n > d."""
    cutoff = [
        point
        for L, c in EXPECTED
        for point in grid(L=L, c=c, schedule="cutoff", p=widths, n=n, d=d, rate=0.1, norm=(1.0, NORM))
    ]
    others = grid(L=2.0, c=3.0, schedule=(*SUMMABLE, "constant"), p=widths, n=n, d=d, rate=0.1, norm=1.0)
    tall = grid(L=2.0, c=3.0, schedule="cutoff", p=widths, n=d, d=n, rate=0.1 * n / d, norm=1.0)
    return (*cutoff, *others, *tall)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    return summary(table, "mean_cosine", by=["L", "c", "schedule", "n", "d", "norm", "p"])


ALIGNMENT = Experiment(
    name="song2021.alignment",
    title="Alignment under a ridge that ends",
    source="Song, Xu and Lafferty 2021, theorem 4.6",
    revision=1,
    grid={
        "smoke": _points((500, 2000), n=5, d=200),
        "quick": _points((1000, 4000, 16000), n=10, d=1000),
        "paper": _points((1000, 4000, 16000, 64000, 10**6), n=10, d=1000),
    },
    seeds={"smoke": 3, "quick": 10, "paper": 50},
    run=run,
    agreement=1e-9,
    together=("seed",),
    at_most=25,
    memory=memory,
    pictures=(
        Picture(
            name="theorem-4-6",
            caption="Final cosine against the width, mean ± standard deviation. Left: a ridge λ = Lγ that ends after "
            "T = S_λ/λ steps, |y| = √n (filled) and 1.18√n (open). Right: other schedules with the same first value "
            "and the same sum, one without an end, and n > d.",
            data=_drawn,
            draw=constant_cosine,
        ),
    ),
    claims=CLAIMS,
)
