"""How forward and feedback matrices come closer, step by step: FA and FA*."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.papers.garg2022.alignment_claims import CLAIMS
from falign.papers.garg2022.courses import drawn, outcomes, trained
from falign.papers.garg2022.drawing_alignment import alignment_by_time
from falign.papers.garg2022.matrices import matrix
from falign.theory.two_layer import spaced

_NAMES = ("error", "alignment", "cosine", "weighted", "lyapunov", "account", "gram drift")
_SHOWN = ("alignment", "cosine", "lyapunov", "error")
_RATE = 0.2
_RECORDS = 50
"""Points of a line in the picture."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the draws of a block together and record every step."""
    point = tasks[0].point
    Y = matrix(point, setting).to(setting.device)
    B, at = drawn(tasks, Y), list(range(int(point["steps"]) + 1))
    course = trained(tasks, Y, B, rate=float(point["rate"]), at=at, names=_NAMES, progress=setting.report)
    columns = {name.replace(" ", "_"): course.values[name] for name in _NAMES}
    nuclear = torch.linalg.svdvals(B @ Y).sum(-1)[:, None].expand(-1, len(at))
    return outcomes(at, {**columns, "error": columns["error"] / Y.norm(), "nuclear": nuclear})


def _points(data: str, *, time: float, scale: float, **sizes: Scalar) -> tuple[Point, ...]:
    """FA from zero and from a random start, FA* from orthonormal rows, at three step sizes, as long in η × steps."""
    return tuple(
        {"data": data, "method": method, "scale": start, "rate": rate, "steps": round(time / rate), **sizes}
        for method, start in (("fa", 0.0), ("fa", scale), ("fa*", 1.0))
        for rate in (_RATE, _RATE / 2, _RATE / 4)
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Median and quartiles of the draws at the smallest step size, at records dense early."""
    finest = table.filter(pl.col("rate") == pl.col("rate").min())
    kept = finest.filter(pl.col("step").is_in(spaced(int(finest["steps"][0]), _RECORDS)))
    keys = ["data", "method", "scale", "rate", "step"]
    return pl.concat(
        [
            kept.group_by(keys)
            .agg(
                shown=pl.lit(name),
                median=pl.col(name).median(),
                low=pl.col(name).quantile(0.25),
                high=pl.col(name).quantile(0.75),
            )
            .sort(keys)
            for name in _SHOWN
        ]
    )


ALIGNMENT = Experiment(
    name="garg2022.alignment",
    title="Forward and feedback matrices come closer",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        preset: tuple(
            point
            for name, m, scale in data
            for point in _points(name, n=n, m=m or n, rank=rank, r=r, time=time, scale=scale)
        )
        for preset, n, rank, r, time, data in (
            ("smoke", 12, 3, 5, 6.0, (("power law", 0, 0.02), ("digits", 64, 0.02))),
            ("quick", 60, 8, 12, 30.0, (("power law", 0, 0.02), ("digits", 64, 0.02))),
            (
                "paper",
                100,
                20,
                30,
                100.0,
                (("power law", 0, 0.02), ("digits", 64, 0.02), ("mnist", 784, 0.005), ("fashion-mnist", 784, 0.005)),
            ),
        )
    },
    seeds={"smoke": 2, "quick": 12, "paper": 50},
    run=run,
    agreement=1e-7,
    cost=lambda task: float(int(task.point["steps"])),
    pictures=(
        Picture(
            name="alignment",
            caption="tr(BZ) = ⟨Bᵀ, Z⟩, the cosine of Bᵀ and Z, |BR|² and the error over time η × steps, r > rank(Y): "
            "median and quartiles of the draws. From a zero start tr(BZ) = ½|W|², and |BR|² falls; under FA* from "
            "orthonormal rows tr(BZ) never falls, while the cosine and the error go up and down.",
            data=_drawn,
            draw=alignment_by_time,
        ),
    ),
    claims=CLAIMS,
)
