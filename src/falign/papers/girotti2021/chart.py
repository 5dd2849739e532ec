"""The map of (K, λ): how long a component takes, and whether a larger one takes less time or more."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Experiment, Outcome, Picture, Point, Reading, Setting, Task, grid
from falign.papers.girotti2021.drawing_chart import maps
from falign.theory.deep_linear import chart

_SIDES = 3.0, (0.02, 10.0)
"""K from minus so much to so much; λ from, to, on a logarithmic axis."""

_MAP = ["branch", "feedback"]
_BOTTLENECK = 2.0
"""From λ_c to so many times λ_c the time is that of passing by the fixed points that have just vanished."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Draw each map."""
    return [_map(task) for task in setting.each(tasks)]


def _map(task: Task) -> Outcome:
    count, branch = int(task.point["cells"]), str(task.point["branch"])
    middles = (np.arange(count) + 0.5) / count
    invariants = _SIDES[0] * (2 * middles - 1 if branch == "output" else middles - 1)
    targets = np.geomspace(*_SIDES[1], count)
    m = float(task.point["feedback"])
    found = chart(invariants, targets, feedback=m, branch=branch)  # pyright: ignore[reportArgumentType]  # it checks
    return Outcome(
        records={
            "invariant": np.repeat(invariants, count).tolist(),
            "target": np.tile(targets, count).tolist(),
            "critical": found.critical.repeat_interleave(count).tolist(),
            "time": found.time.flatten().tolist(),
            "slope": found.slope.flatten().tolist(),
        }
    )


def _points(cells: int) -> tuple[Point, ...]:
    return grid(branch=("output", "aligned", "anti-aligned"), feedback=(1.0, 4.0), cells=cells)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("feedback") == 1).select("branch", "invariant", "target", "time", "slope")


def _falls(table: pl.DataFrame) -> Reading:
    return Reading(
        checks=tuple(
            Check(label=f"{branch}, m = {m:g}: share of {own.height} cells", measured=_share(own["slope"] < 0), low=1.0)
            for (branch, m), own in table.sort(_MAP).group_by(_MAP, maintain_order=True)
        )
    )


def _turns(table: pl.DataFrame) -> Reading:
    below = table.filter(pl.col("target") < pl.col("critical"))
    above = table.filter(pl.col("target") > _BOTTLENECK * pl.col("critical"))
    return Reading(
        checks=(
            Check(
                label=f"rises for λ < λ_c: share of {below.height} cells", measured=_share(below["slope"] > 0), low=1.0
            ),
            Check(
                label=f"falls for λ > {_BOTTLENECK:g} λ_c: share of {above.height} cells",
                measured=_share(above["slope"] < 0),
                low=1.0,
            ),
        ),
        note=f"between them it rises in {_share(_between(table)['slope'] > 0):.0%} of the cells",
    )


def _between(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("target").is_between(pl.col("critical"), _BOTTLENECK * pl.col("critical")))


def _share(right: pl.Series) -> float:
    return float(np.mean(right.to_numpy())) if len(right) else 0.0


CHART = Experiment(
    name="girotti2021.chart",
    title="Where feedback alignment regularises, and where it anti-regularises",
    source="Beyond the paper: the map of its two cases, derived",
    revision=1,
    grid={"smoke": _points(16), "quick": _points(60), "paper": _points(400)},
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=run,
    together=("branch", "feedback"),
    pictures=(
        Picture(
            name="chart",
            caption="Time to 90 % of a component over its invariant K and its size λ, from three kinds of start "
            "(above), and how it changes with λ, the start held (below): blue where larger components are learned "
            "first, white where all are learned together, orange where smaller ones are; m = 1. Dashed: λ_c(K).",
            data=_drawn,
            draw=maps,
        ),
    ),
    claims=(
        Claim(
            name="chart-regularises",
            statement="Without a hidden weight against its feedback path the larger component is always learned first.",
            place="Abstract: “initialization schemes where the components are approximately learned by decreasing "
            "order”; which starts these are is derived",
            how="Share of the cells of the map in which the learning time falls with λ, the start held.",
            because="1: every cell.",
            read=_falls,
            scope=pl.col("branch").is_in(["output", "aligned"]),
        ),
        Claim(
            name="chart-anti-regularises",
            statement="With a hidden weight against its feedback path the smaller component is learned first where λ < "
            "λ_c(K), the larger well above.",
            place="Abstract: implicit anti-regularisation; the line λ_c(K) = (2/3)^(3/2) √m |K|^(3/2) is derived",
            how="Share of the cells in which the learning time rises with λ, below the line, and falls, above twice "
            "the line; between them is the bottleneck of the vanished fixed points.",
            because="1: every cell.",
            read=_turns,
            scope=pl.col("branch") == "anti-aligned",
        ),
    ),
)
