"""Error against the inner dimension on a fixed Y: where FA rests in closed form, and the optimum."""

from collections.abc import Sequence

import polars as pl

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.papers.garg2022.courses import drawn, outcomes, trained
from falign.papers.garg2022.drawing_ranks import errors_by_rank
from falign.papers.garg2022.matrices import matrix
from falign.papers.garg2022.ranks_claims import CLAIMS
from falign.theory.factorisation import best_error, stationary_error


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the draws of a block together; what is kept is the end beside the closed forms."""
    point = tasks[0].point
    Y = matrix(point, setting).to(setting.device)
    B, at = drawn(tasks, Y), [int(point["steps"])]
    rate, names = float(point["rate"]), ["error", "distance"]
    course = trained(tasks, Y, B, rate=rate, at=at, names=names, progress=setting.report)
    columns = {
        "error": course.values["error"],
        "distance": course.values["distance"],
        "stationary": stationary_error(Y, B)[:, None],
        "best": best_error(Y, B.shape[1]).expand(len(B), 1),
    }
    return outcomes(at, {name: values / Y.norm() for name, values in columns.items()})


def _points(
    data: str, ranks: Sequence[int], starts_at: int, *, small: float = 0.02, **sizes: Scalar
) -> tuple[Point, ...]:
    """FA from zero and gradient descent, which cannot leave it, at all ranks; at one FA from other starts, and FA*."""
    kinds = [(r, *kind) for r in ranks for kind in (("fa", 0.0), ("gd", small))]
    others = [(starts_at, *kind) for kind in (("fa", small), ("fa", 3 * small), ("fa*", 1.0))]
    same = {"data": data, "rank": 0, "rate": 0.3, **sizes}
    return tuple({**same, "r": r, "method": method, "scale": scale} for r, method, scale in (*kinds, *others))


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Median and quartiles of the trained errors, median of the closed form, and the optimum."""
    keys = ["data", "method", "scale", "r"]
    main = table.filter((pl.col("method") == "gd") | ((pl.col("method") == "fa") & (pl.col("scale") == 0)))
    error = pl.col("error")
    return (
        main.group_by(keys)
        .agg(
            median=error.median(),
            low=error.quantile(0.25),
            high=error.quantile(0.75),
            stationary=pl.col("stationary").median(),
            best=pl.col("best").first(),
            ratio=(error / pl.col("best")).median(),
        )
        .sort(keys)
    )


RANKS = Experiment(
    name="garg2022.ranks",
    title="Error against the inner dimension",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        "smoke": (
            *_points("power law", (1, 4), 4, n=12, m=12, steps=2000),
            *_points("digits", (1, 4), 4, n=12, m=64, steps=2000),
        ),
        "quick": (
            *_points("power law", (1, 2, 5, 10, 20), 5, n=40, m=40, steps=2000),
            *_points("digits", (1, 2, 5, 10, 20), 5, n=40, m=64, steps=2000),
        ),
        "paper": (
            *_points("power law", (1, 2, 5, 10, 20, 50, 80), 5, n=100, m=100, steps=50000),
            *_points("digits", (1, 2, 5, 10, 20, 50), 5, n=100, m=64, steps=50000),
            *_points("mnist", (1, 2, 5, 10, 20, 50, 80), 5, n=100, m=784, small=0.005, steps=50000),
            *_points("fashion-mnist", (1, 2, 5, 10, 20, 50, 80), 5, n=100, m=784, small=0.005, steps=50000),
        ),
    },
    seeds={"smoke": 3, "quick": 10, "paper": 100},
    run=run,
    agreement=1e-7,
    cost=lambda task: float(int(task.point["steps"]) * (3 if task.point["method"] == "gd" else 1)),
    pictures=(
        Picture(
            name="ranks",
            caption="Error at the end against the inner dimension r; median and quartiles of the draws of B. Dashed: "
            "the closed form |Y - Y(BY)⁺BY|, median of the same draws, and the optimum by singular values.",
            data=_drawn,
            draw=errors_by_rank,
        ),
    ),
    claims=CLAIMS,
)
