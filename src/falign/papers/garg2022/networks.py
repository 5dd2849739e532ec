"""The corollary: two-layer linear PyTorch networks on isotropic inputs are the factorisation."""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

import falign
from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.papers.garg2022.drawing_networks import errors_by_step
from falign.papers.garg2022.inputs import Problem, problem
from falign.papers.garg2022.networks_claims import CLAIMS
from falign.theory import factorisation
from falign.theory.factorisation import best_error, stationary_error
from falign.theory.factorisation.network import from_network
from falign.theory.two_layer import spaced

_RECORDS = 30


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the networks of a block one after the other, in float64."""
    return [_outcome(task, problem(task, setting)) for task in setting.each(tasks)]


def _outcome(task: Task, given: Problem) -> Outcome:
    """Errors of the network along its training, beside what the factorisation predicts, and the closed forms."""
    point, Y = task.point, given.Y
    rate, at = float(point["rate"]), spaced(int(point["steps"]), _RECORDS)
    network, method = _network(Y, int(point["r"]), task.seed), "fa"
    first, second = (layer.weight for layer in network)
    B, start = from_network(first, second, network[1].get_buffer("feedback.B"))  # pyright: ignore
    if point["method"] == "bp":
        falign.revert(network)
        method = "gd"
    course = factorisation.descend(method, Y, B, start, rate=rate, steps=at[-1], names=["error"], at=at)
    measured = _trained(network, given, rate, at)
    rests = {"stationary": float(stationary_error(Y, B)), "best": float(best_error(Y, B.shape[1]))}
    columns = {
        "error": measured,
        "predicted": course.values["error"][0].tolist(),
        **{name: [value] * len(measured) for name, value in rests.items()},
    }
    size = float(Y.norm())
    return Outcome(
        records={
            "step": at[: len(measured)],
            **{name: [value / size for value in values[: len(measured)]] for name, values in columns.items()},
        },
        diverged=None
        if len(measured) == len(at)
        else f"the weights were not finite at step {at[len(measured)]}: lower the rate",
    )


def _network(Y: Float[Tensor, "n m"], r: int, seed: int) -> nn.Sequential:
    """Two linear layers with PyTorch's own initial weights, converted; the feedback's entries have variance 1/n."""
    n, m = Y.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(size, out, bias=False, dtype=Y.dtype) for size, out in ((m, r), (r, n)))
        network = nn.Sequential(*layers)
    falign.convert(network, "fa", seed=seed, scale=1.0)
    return network


def _trained(network: nn.Sequential, given: Problem, rate: float, at: Sequence[int]) -> list[float]:
    """|W₂W₁ - Y| at some steps of descent of the mean ½|f - y|²; those before the weights left the finite numbers."""
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    first, second = (layer.weight for layer in network)
    found: list[float] = []
    for step in range(at[-1] + 1):
        if step == at[len(found)]:
            with torch.no_grad():
                error = (second @ first - given.Y).norm()  # pyright: ignore
            if not error.isfinite():
                break
            found.append(float(error))
        x, y = given.batch()
        optimizer.zero_grad()
        ((network(x) - y).square().sum(1).mean() / 2).backward()
        optimizer.step()
    return found


def _points(
    data: Sequence[str], *, points: int, m: int, outputs: int, steps: int, **sizes: Scalar
) -> tuple[Point, ...]:
    """FA and backpropagation on all inputs, r above and below the rank of what is learned; 10 classes have rank 9.

    Where r is below the rank half of the steps are enough.
    """
    kinds = [(name, rank, r) for name in ("isotropic", "fresh") for rank, r in ((4, 6), (outputs, 4))]
    kinds += [(name, 9, r) for name in data for r in (10, 4)]
    same = {"n": outputs, "m": m, "points": points, **sizes}
    return tuple(
        {"inputs": name, "rank": rank, "r": r, "method": method, "steps": steps if r >= rank else steps // 2, **same}
        for name, rank, r in kinds
        for method in ("fa", "bp")
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Means over the seeds at every record."""
    keys = ["inputs", "rank", "r", "method", "step"]
    return table.group_by(keys).agg(pl.col("error", "predicted", "stationary", "best").mean()).sort(keys)


NETWORKS = Experiment(
    name="garg2022.networks",
    title="Two-layer linear networks",
    source="Garg and Vempala 2022; abstract, its corollary",
    revision=1,
    grid={
        "smoke": _points(("digits",), points=100, m=12, outputs=10, rate=0.1, steps=80),
        "quick": _points(("digits",), points=200, m=20, outputs=10, rate=0.1, steps=1200),
        "paper": _points(
            ("digits", "mnist-10k", "mnist", "fashion-mnist"), points=1000, m=40, outputs=10, rate=0.05, steps=20000
        ),
    },
    seeds={"smoke": 2, "quick": 2, "paper": 20},
    run=run,
    agreement=1e-7,
    at_most=2,
    cost=lambda task: float(int(task.point["steps"])),
    pictures=(
        Picture(
            name="networks",
            caption="Error |W₂W₁ - Y|/|Y| of two-layer linear PyTorch networks trained by FA and by backpropagation, "
            "mean over the seeds. Points: what the factorisation predicts from the initial weights and the feedback. "
            "Dashed: its closed form |Y - Y(BY)⁺BY|, and the optimum of that rank. Inputs: isotropic on the training "
            "points; normal and fresh in every batch; whitened images, with their classes as labels.",
            data=_drawn,
            draw=errors_by_step,
        ),
    ),
    claims=CLAIMS,
)
