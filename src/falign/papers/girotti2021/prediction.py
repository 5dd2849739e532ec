"""Predicted loss curves, mode by mode, beside trained networks: linear ones, and the first epochs of ReLU networks."""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

import polars as pl
import torch
from torch import Tensor

from falign.feedback import Normal, draw, generator
from falign.lab.data import Dataset, load
from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.papers.girotti2021.drawing_prediction import beside
from falign.papers.girotti2021.prediction_claims import CLAIMS, WHOLE
from falign.papers.girotti2021.problems import drawn
from falign.papers.girotti2021.training import converted, descend
from falign.theory.deep_linear import predict

_KINDS: tuple[tuple[str, str, int, float], ...] = (
    ("linear", "fa", 2, 1.0),
    ("linear", "fa", 2, 0.1),
    ("linear", "fa", 3, 1.0),
    ("linear", "dfa", 3, 1.0),
    ("relu", "fa", 2, 1.0),
    ("relu", "fa", 3, 1.0),
)
"""Activation, rule, depth, and size of the weights in PyTorch's own."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the networks of a block one after the other, in float64 on the CPU; images are loaded once."""
    images = load(str(tasks[0].point["dataset"]), folder=setting.data, progress=False)
    return [_outcome(images, task.point, task.seed) for task in setting.each(tasks)]


def _outcome(images: Dataset, point: Point, seed: int) -> Outcome:
    X, Y = _data(images, int(point["points"]), seed)
    W, B = _start(point, [X.shape[1], *[int(point["hidden"])] * (int(point["depth"]) - 1), Y.shape[1]], seed)
    activation, rate, steps = str(point["activation"]), float(point["rate"]), int(point["steps"])
    at = sorted({round(steps * k / int(point["records"])) for k in range(int(point["records"]) + 1)})
    found = predict(
        W,
        B,
        X,
        Y,
        rule=point["rule"],  # pyright: ignore[reportArgumentType]  # it checks
        rate=rate,
        steps=steps,
        at=at,
        activation=activation,  # pyright: ignore[reportArgumentType]  # it checks
        exact=activation == "linear",
    )
    least = _least(X, Y, found.outputs)
    model, kept, trained = converted(W, B, str(point["rule"]), activation), set(at), []
    for step, each in enumerate(descend(model, X, Y, rate, _batches(len(X), int(point["batch"]), steps, seed))):
        if step in kept:
            trained.append(_losses(each, X, Y, found.outputs, least))
    losses = torch.stack(trained)
    if not losses.isfinite().all():
        return Outcome(records={}, diverged="the loss was not finite: lower the rate")
    predicted = torch.cat([found.loss[:, None], found.mode_losses], 1)
    exact = found.exact.loss if found.exact is not None else None
    return Outcome(records=_records(at, found.target, losses, predicted, exact))


def _records(at: list[int], target: Tensor, trained: Tensor, predicted: Tensor, exact: Tensor | None) -> dict:
    """A record a step and mode; the whole is mode -1, with the curve of the matrix dynamics where there is one."""
    modes = range(WHOLE, trained.shape[1] - 1)
    still = [None] * len(at)
    return {
        "mode": [mode for mode in modes for _ in at],
        "component": [None if mode == WHOLE else float(target[mode]) for mode in modes for _ in at],
        "step": [step for _ in modes for step in at],
        "trained": trained.T.flatten().tolist(),
        "predicted": predicted.T.flatten().tolist(),
        "exact": [*(still if exact is None else exact.tolist()), *still * (len(modes) - 1)],
    }


@torch.no_grad()
def _losses(model: torch.nn.Module, X: Tensor, Y: Tensor, outputs: Tensor, least: Tensor) -> Tensor:
    """The whole loss, and ``½ E (u_iᵀ(y - f))²`` above what linear maps reach, of every mode."""
    error = Y - model(X)
    whole = error.square().sum(1).mean() / 2
    return torch.cat([whole[None], (error @ outputs).square().mean(0) / 2 - least])


def _least(X: Tensor, Y: Tensor, outputs: Tensor) -> Tensor:
    """Of every mode, the part of the loss that no linear map can go below."""
    targets = Y @ outputs
    return (targets - X @ torch.linalg.lstsq(X, targets, driver="gelsd").solution).square().mean(0) / 2


def _data(images: Dataset, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels, the largest eigenvalue of Σ_xx being 1, and classes, both less their mean."""
    pixels, classes = drawn(images, count, seed)
    return pixels * (sqrt(len(pixels)) / torch.linalg.matrix_norm(pixels, 2)), classes


def _start(point: Point, widths: list[int], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights as PyTorch draws them, U(-1, 1)/√inputs, times the point's size; feedback N(0, 1/columns)."""
    W = [
        (2 * torch.rand(out, into, generator=generator(seed, str(place), "weights")).double() - 1) / sqrt(into)
        for place, (into, out) in enumerate(pairwise(widths), 1)
    ]
    B = [
        draw(
            Normal(),
            (widths[-1] if point["rule"] == "dfa" else out, into),
            seed=seed,
            name=f"{place}",
            deviation=into**-0.5,
        )
        for place, (into, out) in enumerate(pairwise(widths[1:]), 2)
    ]
    return [float(point["size"]) * part for part in W], [part.double() for part in B]


def _batches(points: int, batch: int, steps: int, seed: int) -> list[Tensor | slice]:
    """Of every step: all points, or a batch of them, each epoch in an order of its own."""
    if batch >= points:
        return [slice(None)] * steps
    an_epoch = points // batch
    orders = [
        torch.randperm(points, generator=generator(seed, str(epoch), "batches"))
        for epoch in range(steps // an_epoch + 1)
    ]
    return [
        orders[step // an_epoch][(step % an_epoch) * batch : (step % an_epoch + 1) * batch] for step in range(steps)
    ]


def _points(dataset: str, *, steps: int, epochs: int, batch: int, **sizes: Scalar) -> tuple[Point, ...]:
    """Linear networks take full-batch steps; ReLU networks mini-batches for some epochs."""
    points = int(sizes["points"])
    own = {"linear": {"steps": steps, "batch": points}, "relu": {"steps": epochs * (points // batch), "batch": batch}}
    return tuple(
        {"dataset": dataset, "activation": activation, "rule": rule, "depth": depth, "size": size, **sizes}
        | own[activation]
        for activation, rule, depth, size in _KINDS
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["dataset", "activation", "rule", "depth", "size"]
    return (
        table.filter(pl.col("seed") == 0)
        .select(*keys, "mode", "component", "step", "trained", "predicted")
        .sort(*keys, "mode", "step")
    )


_SIZES = {"rate": 0.2, "records": 25}

PREDICTION = Experiment(
    name="girotti2021.prediction",
    title="Predicted loss curves",
    source="Beyond the paper: its reduction to scalar modes, used on networks that do not begin in spectral form",
    revision=1,
    grid={
        "smoke": _points("digits", points=200, hidden=40, steps=80, epochs=3, batch=20, **_SIZES),
        "quick": _points("digits", points=400, hidden=64, steps=160, epochs=4, batch=20, **_SIZES),
        "paper": tuple(
            point
            for name in ("digits", "fashion-mnist", "mnist", "mnist-10k")
            for point in _points(name, points=1400, hidden=400, steps=3000, epochs=5, batch=25, **_SIZES)
        ),
    },
    seeds={"smoke": 2, "quick": 3, "paper": 10},
    run=run,
    agreement=1e-12,
    together=("activation", "rule", "depth", "size", "steps", "batch"),
    at_most=3,
    cost=lambda task: float(int(task.point["steps"]) * int(task.point["batch"])),
    pictures=(
        Picture(
            name="prediction",
            caption="Loss of networks that falign trains (lines), whole and by component of Σ_yx above what linear "
            "maps reach, and what falign.theory.deep_linear.predict makes of their initial weights, feedback and data "
            "(dashed); first seed. × 1: weights of PyTorch's size. ReLU networks are trained in mini-batches and "
            "predicted as linear ones, each neuron with its initial gain.",
            data=_drawn,
            draw=beside,
        ),
    ),
    claims=CLAIMS,
)
