"""Matrices on which FA is far from optimal, over thousands of draws of the feedback."""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task
from falign.papers.garg2022.drawing_separation import ratios
from falign.papers.garg2022.separation_claims import CLAIMS
from falign.theory import factorisation
from falign.theory.factorisation import best_error, flat_tail, flat_tail_error, last_direction, stationary_error

_SCALE = 0.02
"""Of the entries of gradient descent's start."""
_AT_ONCE = 50
"""Draws whose errors are computed at once."""
_SHOWN = 200
"""Quantiles that a distribution is drawn with."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """The runs of a block one after the other; each has many draws of B, a record a draw."""
    return [_outcome(task, setting) for task in setting.each(tasks)]


def _outcome(task: Task, setting: Setting) -> Outcome:
    point, count, few = task.point, int(task.point["draws"]), int(task.point["trained"])
    r, tail, share = int(point["r"]), int(point["tail"]), float(point["share"])
    Y = (last_direction(r, float(point["epsilon"])) if tail == 1 else flat_tail(r, tail, share)).to(setting.device)
    seeds = [task.seed * count + index for index in range(count)]
    B, best = factorisation.feedback(len(Y), r, seeds=seeds).to(Y), float(best_error(Y, r))
    errors: dict[str, list[float]] = {
        "ratio": torch.cat([stationary_error(Y, part) for part in B.split(_AT_ONCE)]).tolist(),
        "estimate": [],
        "fa": _trained("fa", task, Y, B[:few], seeds[:few]),
        "gd": _trained("gd", task, Y, B[:few], seeds[:few]) if tail == 1 else [],
    }
    if tail > 1:
        energy = float(Y.diagonal()[r:].square().sum())
        errors["estimate"] = flat_tail_error(B[:, :, :r] * len(Y) ** 0.5, energy).tolist()
    columns = {name: [value / best for value in found] for name, found in errors.items()}
    gaps = {name: [*found, *[None] * (count - len(found))] for name, found in columns.items()}
    return Outcome(records={"draw": list(range(count)), **gaps})


def _trained(
    method: str, task: Task, Y: Float[Tensor, "n n"], B: Float[Tensor, "runs r n"], seeds: Sequence[int]
) -> list[float]:
    """Errors at the end of a training: FA from zero; gradient descent from a random start, a quarter as long."""
    rate, steps = float(task.point["rate"]), int(task.point["steps"])
    if method == "fa":
        start = factorisation.zero(Y, B)
    else:
        start, steps = factorisation.normal(Y, B, seeds=seeds, scale=_SCALE), steps // 4
    course = factorisation.descend(method, Y, B, start, rate=rate, steps=steps, names=["error"], at=[steps])
    return course.values["error"][:, 0].tolist()


def _points(
    ranks: Sequence[int], tails: Sequence[tuple[int, int, float]], *, draws: int, trained: int, steps: int
) -> tuple[Point, ...]:
    """diag(1, …, 1, ε) for every r, and r ones with a flat tail of N values that hold a share of |Y|².

    The ratio on these hardly varies, so that a quarter of the draws does.
    """
    same = {"trained": trained, "rate": 0.2, "steps": steps}
    return (
        *({"r": r, "tail": 1, "epsilon": 1e-3, "share": 0.0, "draws": draws, **same} for r in ranks),
        *({"r": r, "tail": N, "epsilon": 0.0, "share": share, "draws": draws // 4, **same} for r, N, share in tails),
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Evenly spaced quantiles of the ratio of each instance, over all seeds."""
    keys = ["tail", "r", "share", "epsilon"]
    ordered = table.sort([*keys, "ratio"]).with_columns(
        quantile=(pl.int_range(pl.len()).over(keys) + 0.5) / pl.len().over(keys)
    )
    kept = (pl.int_range(pl.len()).over(keys) % pl.max_horizontal(pl.len().over(keys) // _SHOWN, 1)) == 0
    return ordered.filter(kept).select(*keys, "quantile", "ratio", "estimate")


SEPARATION = Experiment(
    name="garg2022.separation",
    title="A separation between FA and gradient descent",
    source="Garg and Vempala 2022; abstract",
    revision=1,
    grid={
        "smoke": _points((1, 5, 10), ((5, 45, 0.01),), draws=100, trained=2, steps=1000),
        "quick": _points((1, 5, 20, 50), ((5, 95, 0.01), (20, 380, 0.0025)), draws=280, trained=2, steps=4000),
        "paper": _points(
            (1, 2, 5, 10, 20, 50, 100),
            ((5, 95, 0.01), (20, 380, 0.0025), (20, 380, 0.05), (50, 550, 0.0004)),
            draws=2000,
            trained=50,
            steps=50000,
        ),
    },
    seeds={"smoke": 2, "quick": 4, "paper": 20},
    run=run,
    agreement=1e-12,
    at_most=1,
    cost=lambda task: float((int(task.point["r"]) + int(task.point["tail"])) * int(task.point["draws"])),
    pictures=(
        Picture(
            name="separation",
            caption="Distribution over draws of B of the ratio of FA's error to the optimum. Left: Y = diag(1, …, 1, "
            "ε) with r ones, ε = 0.001; dashed the law, ratio² = 1/(c² + ε²(1 - c²)), c² ~ Beta(½, r/2). Right: r ones "
            "and a long flat tail that holds a share of |Y|²; dashed an estimate for infinitely long tails.",
            data=_drawn,
            draw=ratios,
        ),
    ),
    claims=CLAIMS,
)
