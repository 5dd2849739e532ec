"""The order in which components are learned, from six named starts, by feedback alignment and gradient descent."""

from collections.abc import Sequence

import polars as pl

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task, grid
from falign.papers.girotti2021.drawing_order import courses
from falign.papers.girotti2021.learned import TOLERANCE, crossing
from falign.papers.girotti2021.order_claims import CLAIMS
from falign.papers.girotti2021.scalars import batches, logarithmic_times, paced
from falign.theory.deep_linear import flow, learning_time

SIZES = {"zero": 1.0, "small": 1e-3, "positive": 1.0, "negative": 1.0, "aligned": 1.0, "anti-aligned": 1.0}
"""Of each start: small weights are 0.001; K is 1 or -1; the hidden weight is 1 or -1. Zero has no size."""
_KINDS = (("fa", 2), ("dfa", 3), ("bp", 2))
"""With unit feedback dfa and fa are one chain at any depth; of two layers they are the same anyhow."""
_SPAN = 1e-3, 5.0
"""First and last record in units of the time to 90 %; where that is never, in units of 100."""
_NEVER = 100.0


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Integrate the runs of a rule and depth together, each in units of the time that it takes."""
    found: dict[int, Outcome] = {}
    for places, started in batches(tasks):
        units = learning_time(started, TOLERANCE).nan_to_num(posinf=_NEVER)
        moments = logarithmic_times(*_SPAN, int(tasks[places[0]].point["records"]))
        shares = flow(paced(started, units), times=moments).share
        for column, place in enumerate(places):
            own, times = shares[:, column], units[column] * moments
            found[place] = Outcome(
                records={
                    "time": times.tolist(),
                    "share": own.tolist(),
                    "learned": [crossing(times, own)] * len(times),
                    "begun": [crossing(times, own, 1 - TOLERANCE)] * len(times),
                }
            )
    return [found[place] for place in range(len(tasks))]


def _points(targets: Sequence[float], records: int) -> tuple[Point, ...]:
    """All starts and components, a kind of network after the other."""
    return tuple(
        point
        for rule, depth in _KINDS
        for scheme, size in SIZES.items()
        for point in grid(rule=rule, depth=depth, scheme=scheme, size=size, target=targets, records=records)
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    columns: list[Scalar] = ["rule", "depth", "scheme", "target", "time", "share", "learned"]
    return table.filter(pl.col("time") > 0).select(columns)


ORDER = Experiment(
    name="girotti2021.order",
    title="Which components are learned first",
    source="Girotti, Mitliagkas and Gidel 2021, abstract (“incremental learning phenomena”); starts and times are "
    "derived",
    revision=1,
    grid={
        "smoke": _points((0.05, 0.1, 1.0, 3.0), 80),
        "quick": _points((0.02, 0.05, 0.1, 0.15, 0.5, 1.0, 3.0, 10.0), 100),
        "paper": _points(
            (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.15, 0.17, 0.19, 0.3, 0.5, 1.0, 2.0, 3.0, 10.0), 400
        ),
    },
    seeds={"smoke": 1, "quick": 1, "paper": 1},
    run=run,
    agreement=1e-6,
    together=("rule", "depth", "scheme", "size", "target"),
    pictures=(
        Picture(
            name="order",
            caption="Share of each component that is learned, θ_L…θ_1/λ, over time from six starts: feedback alignment "
            "of two and of three layers (direct feedback alignment is the same, the feedback being 1), gradient "
            "descent of two. Dashed: learned, 90 %. From zero and small weights larger components come first; from an "
            "anti-aligned hidden weight those below λ_c = 0.19 come in the reverse order. Negative products are cut "
            "off at -½.",
            data=_drawn,
            draw=courses,
        ),
    ),
    claims=CLAIMS,
)
