"""The order of learning in PyTorch networks that falign trains, from starts that differ and nothing else."""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from falign.lab.data import load
from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.papers.girotti2021.drawing_networks import components, courses
from falign.papers.girotti2021.learned import TOLERANCE, crossing
from falign.papers.girotti2021.networks_claims import CLAIMS
from falign.papers.girotti2021.networks_readings import modes_of
from falign.papers.girotti2021.problems import Problem, problem
from falign.papers.girotti2021.starts import start
from falign.papers.girotti2021.training import converted, descend, one_thread, product
from falign.theory.deep_linear import descend_matrices, network

_KINDS: tuple[tuple[str, int, str, str], ...] = (
    ("fa", 2, "small", "random"),
    ("fa", 2, "anti-aligned", "random"),
    ("fa", 2, "zero", "spectral"),
    ("fa", 2, "anti-aligned", "spectral"),
    ("fa", 3, "small", "random"),
    ("dfa", 3, "small", "random"),
    ("bp", 2, "small", "random"),
    ("bp", 2, "anti-aligned", "random"),
)
"""Rule, depth, scheme and basis. Of two layers fa and dfa are the same."""
_SPANS = {
    "map": {("fa", "zero"): 9.0, ("fa", "small"): 9.0, 3: 14.0, ("bp", "small"): 35.0},
    "images": {("fa", "zero"): 7.0, ("fa", "small"): 7.0, 3: 11.0, ("bp", "small"): 22.0},
}
"""Length of a training in η × steps, by rule and scheme, or by depth. The smallest component of the random map is a
sixth of the largest, those of images are a fifth and more."""
_OTHERS, _RESTING = 8.0, 30.0
_COMPARED = 100
"""Steps over which the matrix dynamics are run beside the network."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the networks of a block one after the other, in float64 on the CPU; images are loaded once."""
    name = str(tasks[0].point["dataset"])
    images = None if name == "teacher" else load(name, folder=setting.data, progress=False)
    with one_thread():
        return [_trained(problem(each.point, each.seed, images), each.point, each.seed) for each in setting.each(tasks)]


def _trained(learned: Problem, point: Point, seed: int) -> Outcome:
    W, B = start(learned, point, seed)
    rate, steps, rule = float(point["rate"]), int(point["steps"]), str(point["rule"])
    model = converted(W, B, rule)
    everything = [slice(None)] * steps
    maps = [product(each) for each in descend(model, learned.X, learned.Y, rate, everything)]
    products = torch.stack(maps)
    shares = learned.shares(products)
    if not shares[-1].isfinite().all():
        return Outcome(records={}, diverged="the weights were not finite at the end: lower the rate")
    state = network(W, B, rule=rule)  # pyright: ignore[reportArgumentType]  # it checks
    course = descend_matrices(
        state,
        learned.X,
        learned.Y,
        rule=rule,  # pyright: ignore[reportArgumentType]  # it checks
        rate=rate,
        steps=(compared := min(steps, _COMPARED)),
        names=["map"],
        at=list(range(compared + 1)),
    )
    apart = float((learned.shares(course["map"][0]) - shares[: compared + 1]).abs().max())
    outside = learned.outside(products) if len(learned.λ) < learned.X.shape[1] else None
    return _outcome(learned, rate, shares, outside, records=int(point["records"]), apart=apart)


def _outcome(
    learned: Problem, rate: float, shares: Tensor, outside: Tensor | None, *, records: int, apart: float
) -> Outcome:
    """A record a component and recorded step, with the times at which it was learned and begun."""
    times = rate * torch.arange(len(shares), dtype=torch.float64)
    kept = torch.linspace(0, len(shares) - 1, records).round().long()
    parts = [
        {
            "mode": [mode] * records,
            "component": [float(learned.λ[mode])] * records,
            "time": times[kept].tolist(),
            "share": own[kept].tolist(),
            "outside": [None] * records if outside is None else outside[kept].tolist(),
            "learned": [crossing(times, own)] * records,
            "begun": [crossing(times, own, 1 - TOLERANCE)] * records,
            "apart": [apart] * records,
        }
        for mode, own in enumerate(shares.mT)
    ]
    columns: dict[str, list[Scalar | None]] = {
        name: [value for part in parts for value in part[name]] for name in parts[0]
    }
    return Outcome(records=columns)


def _points(
    problems: Sequence[tuple[str, str]], *, rate: float, points: int, hidden: int, **sizes: Scalar
) -> tuple[Point, ...]:
    return tuple(
        {"dataset": name, "task": task, "rule": rule, "depth": depth, "scheme": scheme, "basis": basis}
        | {"rate": rate, "steps": round(_span(task, rule, depth, scheme, basis) / rate), **sizes}
        | {
            "points": 2 * int(sizes["inputs"]) if task == "map" else points,
            "hidden": hidden // 2 if depth > 2 else hidden,
        }
        for name, task in problems
        for rule, depth, scheme, basis in _KINDS
    )


def _span(task: str, rule: str, depth: int, scheme: str, basis: str) -> float:
    """Of anti-aligned spectral starts so long that the end of their rest is seen coming; pixels use all inputs."""
    if scheme == "anti-aligned" and basis == "spectral" and task != "pixels":
        return _RESTING
    spans = _SPANS.get(task, _SPANS["images"])
    return spans[depth] if depth in spans else spans.get((rule, scheme), _OTHERS)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["dataset", "task", "rule", "depth", "scheme", "basis"]
    return (
        table.filter((pl.col("seed") == 0) & (pl.col("basis") == "random"))
        .select(*keys, "mode", "component", "time", "share")
        .sort(*keys, "mode", "time")
    )


_SMALL = (("teacher", "map"), ("digits", "pixels"), ("digits", "classes"))

NETWORKS = Experiment(
    name="girotti2021.networks",
    title="The order of learning in networks",
    source="Girotti, Mitliagkas and Gidel 2021, abstract; the networks and what they learn are choices",
    revision=1,
    grid={
        "smoke": _points(_SMALL[::2], rate=0.2, points=80, inputs=12, hidden=64, records=21),
        "quick": _points(_SMALL, rate=0.1, points=120, inputs=12, hidden=200, records=51),
        "paper": _points(
            (
                *_SMALL,
                *((name, task) for name in ("fashion-mnist", "mnist", "mnist-10k") for task in ("pixels", "classes")),
            ),
            rate=0.02,
            points=1400,
            inputs=16,
            hidden=800,
            records=161,
        ),
    },
    seeds={"smoke": 2, "quick": 4, "paper": 10},
    run=run,
    together=("rule", "depth", "scheme", "basis", "steps"),
    at_most=4,
    cost=lambda task: float(int(task.point["steps"])),
    pictures=(
        Picture(
            name="networks",
            caption="Share of each component of Σ_yx that a linear PyTorch network under falign has learned, over "
            "time; first seed. From small weights the principal components come first, from hidden weights against "
            "their feedback path the negligible ones, at the same data, feedback and steps; where random feedback "
            "couples the components, they do not rest there and are lost again. Dashed: 90 %.",
            data=_drawn,
            draw=courses,
        ),
        Picture(
            name="networks-times",
            caption="When each component was learned, 90 %, against its size; all seeds. Filled: random weights and "
            "feedback; open: orthogonal feedback, with which the components are exactly uncoupled. Dashed: the "
            "slopes -2/3, -6/7 and -1.",
            data=modes_of,
            draw=components,
        ),
    ),
    claims=CLAIMS,
)
