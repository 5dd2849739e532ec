"""The phase portrait of a component: where its hidden weight goes, with K above and below its critical value."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task, grid
from falign.papers.girotti2021.drawing_portrait import portraits
from falign.papers.girotti2021.portrait_claims import CLAIMS, field, roots
from falign.theory.deep_linear import critical_invariant, flow, limit, modes

_SHOWN, _LONG = 12.0, 60.0
"""Time that is drawn, and by which the slowest of the trajectories has come to rest."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Integrate each trajectory by itself: to the last digit of a vanishing error it is the same in any block."""
    return [_trajectory(task) for task in setting.each(tasks)]


def _trajectory(task: Task) -> Outcome:
    target, start, share, m = (float(task.point[name]) for name in ("target", "start", "share", "feedback"))
    invariant = share * abs(float(critical_invariant(target, m)))
    begun = modes(target, [start, invariant + start**2 / (2 * m)], feedback=m)
    count = int(task.point["records"])
    times = torch.tensor([*(_SHOWN * k / (count - 2) for k in range(count - 1)), _LONG], dtype=torch.float64)
    course = flow(begun, times=times)
    return Outcome(
        records={
            "time": times.tolist(),
            "hidden": course.weights[:, 0].tolist(),
            "error": course.error.tolist(),
            "invariant": [invariant] * count,
            "limit": [float(limit(begun))] * count,
        }
    )


def _points(shares: Sequence[float], starts: Sequence[float], records: int) -> tuple[Point, ...]:
    return grid(target=1.0, feedback=1.0, share=shares, start=starts, records=records)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Trajectories, the field ``h(θ_1)`` and its roots, told apart by "shown"."""
    kinds = table.select("target", "feedback", "share", "invariant").unique().sort("share").to_dicts()
    drawn = table.filter(pl.col("time") <= _SHOWN)
    paths = drawn.select("share", "start", "time", "hidden").with_columns(shown=pl.lit("trajectory"))
    fields = [field(**kind).with_columns(shown=pl.lit("field")) for kind in kinds]
    fixed = [roots(**kind).with_columns(shown=pl.lit("root")) for kind in kinds]
    return pl.concat([paths, *fields, *fixed], how="diagonal")


PORTRAIT = Experiment(
    name="girotti2021.portrait",
    title="Phase portrait",
    source="Derived, for the dynamics of Girotti, Mitliagkas and Gidel 2021",
    revision=1,
    grid={
        "smoke": _points((0.5, -0.5, -1.5), (-3.0, -1.0, 0.0, 2.5), 60),
        "quick": _points(
            (0.5, -0.5, -0.95, -1.05, -1.5), (-3.0, -2.0, -1.3, -1.0, -0.7, -0.3, 0.0, 0.5, 1.5, 2.5), 120
        ),
        "paper": _points(
            (1.0, 0.5, 0.0, -0.5, -0.9, -0.95, -1.05, -1.1, -1.5, -2.0), tuple(k / 5 for k in range(-16, 17)), 240
        ),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=run,
    together=("share", "start"),
    pictures=(
        Picture(
            name="portrait",
            caption="Velocity of the hidden weight on the curve of its invariant, h(θ_1) = mλ - mKθ_1 - θ_1³/2 "
            "(above), and trajectories (below), for K above and below K_c = -3/2 (λ²/m)^(1/3). Filled: stable fixed "
            "points; open: unstable ones. Below K_c a second stable point appears, at which θ_1 and θ_2 are both "
            "negative.",
            data=_drawn,
            draw=portraits,
        ),
    ),
    claims=CLAIMS,
)
