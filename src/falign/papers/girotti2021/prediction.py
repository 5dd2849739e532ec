"""Predicted loss curves, mode by mode, beside trained networks: linear ones, and the first epochs of ReLU networks."""

from itertools import pairwise
from math import sqrt

import polars as pl
import torch
from torch import Tensor

from falign.feedback import Normal, generator
from falign.lab.data import Dataset
from falign.lab.experiment import Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting
from falign.lab.experiment.statistics import above_zero, largest, mean, sorted_groups
from falign.lab.report.style import INK, Axes, Figure, each_of, legend, logarithmic, panels, sequence
from falign.papers._images import load_images
from falign.papers.girotti2021._linear_networks import converted, draw_feedback, gradient_descent, sample_images
from falign.theory.deep_linear import predict

__all__ = ["PREDICTION"]

_KINDS: tuple[tuple[str, str, int, float], ...] = (
    ("linear", "fa", 2, 1.0),
    ("linear", "fa", 2, 0.1),
    ("linear", "fa", 3, 1.0),
    ("linear", "dfa", 3, 1.0),
    ("relu", "fa", 2, 1.0),
    ("relu", "fa", 3, 1.0),
)
"""Activation, rule, depth, and size of the weights as a multiple of PyTorch's."""


def _points(dataset: str, *, steps: int, epochs: int, batch: int, **sizes: Scalar) -> tuple[Point, ...]:
    """Linear networks take full-batch steps; ReLU networks mini-batches for some epochs."""
    points = int(sizes["points"])
    training = {
        "linear": {"steps": steps, "batch": points},
        "relu": {"steps": epochs * (points // batch), "batch": batch},
    }
    return tuple(
        {"dataset": dataset, "activation": activation, "rule": rule, "depth": depth, "size": size, **sizes}
        | training[activation]
        for activation, rule, depth, size in _KINDS
    )


_SIZES = {"rate": 0.2, "records": 25}

_WHOLE = -1
"""The number of the whole among the modes."""


def _run(
    *,
    seed: int,
    setting: Setting,
    dataset: str,
    activation: str,
    rule: str,
    depth: int,
    size: float,
    points: int,
    hidden: int,
    rate: float,
    steps: int,
    batch: int,
    records: int,
) -> Outcome:
    """Train a network in float64 on the CPU, beside its predicted loss."""
    X, Y = _data(load_images(dataset, setting), points, seed)
    W, B = _start([X.shape[1], *[hidden] * (depth - 1), Y.shape[1]], direct=rule == "dfa", size=size, seed=seed)
    at = sorted({round(steps * k / records) for k in range(records + 1)})
    prediction = predict(
        W,
        B,
        X,
        Y,
        rule=rule,  # pyright: ignore[reportArgumentType]  # it checks
        rate=rate,
        steps=steps,
        at=at,
        activation=activation,  # pyright: ignore[reportArgumentType]  # it checks
        exact=activation == "linear",
    )
    # Modes' losses are compared above the least that a linear map leaves: the prediction is of nothing else.
    least = _least(X, Y, prediction.outputs)
    model, kept, trained = converted(W, B, rule, activation), set(at), []
    for step, each in enumerate(gradient_descent(model, X, Y, rate, _batches(len(X), batch, steps, seed))):
        if step in kept:
            trained.append(_losses(each, X, Y, prediction.outputs, least))
    losses = torch.stack(trained)
    if not losses.isfinite().all():
        return Outcome(records={}, diverged="the loss was not finite: lower the rate")
    predicted = torch.cat([prediction.loss[:, None], prediction.mode_losses], 1)
    exact = prediction.exact.loss if prediction.exact is not None else None
    return Outcome(records=_records(at, prediction.target, losses, predicted, exact))


def _records(at: list[int], target: Tensor, trained: Tensor, predicted: Tensor, exact: Tensor | None) -> dict:
    """A record a step and mode; the whole is mode -1, with the curve of the matrix dynamics where there is one."""
    modes = range(_WHOLE, trained.shape[1] - 1)
    still = [None] * len(at)
    return {
        "mode": [mode for mode in modes for _ in at],
        "component": [None if mode == _WHOLE else float(target[mode]) for mode in modes for _ in at],
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
    pixels, classes = sample_images(images, count, seed)
    return pixels * (sqrt(len(pixels)) / torch.linalg.matrix_norm(pixels, 2)), classes


def _start(widths: list[int], *, direct: bool, size: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights as PyTorch draws them, U(-1, 1)/√inputs, times a size; feedback N(0, 1/columns)."""
    W = [
        (2 * torch.rand(out, into, generator=generator(seed, str(place), "weights")).double() - 1) / sqrt(into)
        for place, (into, out) in enumerate(pairwise(widths), 1)
    ]
    return [size * part for part in W], draw_feedback(Normal(), widths, direct=direct, seed=seed)


def _batches(points: int, batch: int, steps: int, seed: int) -> list[Tensor | slice]:
    """Of every step: all points, or a batch of them, every epoch in a new order."""
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


_KIND = ["dataset", "activation", "rule", "depth", "size"]
_LINEAR, _RELU = 0.05, 0.1
"""Largest error as a share of the initial loss that counts as predicted."""
_EPOCHS = 2
"""First epochs of a ReLU network."""
_EPOCH = pl.col("step") * pl.col("batch") / pl.col("points")


def _errors(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run: the most that the predicted whole is from the trained, as a share of the trained's first.

    "mode": the same of the parts, the most of all modes, as a share of the whole's first. "reached": the trained loss
    at the end over its first.
    """
    keys = [*_KIND, "seed"]
    first = (pl.col("trained").filter((pl.col("mode") == _WHOLE) & (pl.col("step") == 0)).first()).over(keys)
    far = (pl.col("predicted") - pl.col("trained")).abs() / first
    whole = pl.col("mode") == _WHOLE
    return (
        table.with_columns(far=far, left=pl.col("trained") / first)
        .sort("step")
        .group_by(keys, maintain_order=True)
        .agg(
            far=pl.col("far").filter(whole).max(),
            mode=pl.col("far").filter(~whole).max(),
            reached=pl.col("left").filter(whole).last(),
        )
        .sort(keys)
    )


def _kinds(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    return [
        (f"{dataset}, {activation}, {rule}, {depth} layers, weights × {size:g}", rows)
        for (dataset, activation, rule, depth, size), rows in sorted_groups(runs, _KIND)
    ]


def _near(table: pl.DataFrame, column: str, most: float) -> Evidence:
    runs = _errors(table)
    note = f"the loss fell to {runs['reached'].to_numpy().mean():.2f} of the first"
    return largest(_kinds(runs), column, most, note=note, label="{label}: most of {rows}")


def _passed(table: pl.DataFrame) -> Evidence:
    last = table.filter((pl.col("mode") == _WHOLE) & (pl.col("step") == pl.col("steps")))
    first = table.filter((pl.col("mode") == _WHOLE) & (pl.col("step") == 0)).select(*_KIND, "seed", initial="trained")
    runs = last.join(first, on=[*_KIND, "seed"])
    kinds = _kinds(runs.with_columns(less=(pl.col("predicted") - pl.col("trained")) / pl.col("initial")))
    return above_zero([(label, mean(rows["less"], of=label)) for label, rows in kinds])


_LINES = pl.col("activation") == "linear"
_BEYOND = "Beyond the paper; the tolerance is ours"

_CLAIMS = (
    Claim(
        name="prediction-linear",
        statement="The loss curve of a linear network is predicted from its initial weights, feedback and data, mode "
        "by mode, though nothing in it is in spectral form.",
        origin="beyond",
        reference=_BEYOND,
        method="Largest difference between predicted and trained loss, as a share of the initial loss; the most of all "
        "runs.",
        tolerance_reason=f"At most {_LINEAR:g}.",
        read=lambda table: _near(table, "far", _LINEAR),
        scope=_LINES,
    ),
    Claim(
        name="prediction-modes",
        statement="The part of the loss that is each component's is predicted.",
        origin="beyond",
        reference=_BEYOND,
        method="As for the whole; the most of all components and runs.",
        tolerance_reason=f"At most {_LINEAR:g}.",
        read=lambda table: _near(table, "mode", _LINEAR),
        scope=_LINES,
    ),
    Claim(
        name="prediction-relu",
        statement="The first epochs of a ReLU network are predicted as those of a linear one.",
        origin="beyond",
        reference=_BEYOND,
        method=f"As for linear networks, over the first {_EPOCHS} epochs of training in mini-batches.",
        tolerance_reason=f"At most {_RELU:g}.",
        read=lambda table: _near(table.filter(_EPOCH <= _EPOCHS), "far", _RELU),
        scope=~_LINES,
    ),
    Claim(
        name="prediction-relu-passed",
        statement="Later the ReLU network learns more than its prediction, what no linear map can.",
        origin="theory",
        reference="Derived: the prediction ends at the loss of the best linear map",
        method="Predicted less trained loss at the last epoch, as a share of the initial loss; mean over the seeds.",
        tolerance_reason="Above 0 by half the 99 % interval over the seeds (Student's t, all together).",
        read=_passed,
        scope=~_LINES,
    ),
)

_SHOWN = (0, 2, 4, 6, 8)
"""Components that are drawn."""
_PREDICTED = (0, (4, 2.5))


def _beside(data: pl.DataFrame) -> Figure:
    """Whole losses above, those of components below, on a logarithmic axis; predictions dashed."""
    sets = each_of(data, "dataset")
    kinds = data.select(_KIND[1:]).unique().sort(pl.all()).rows()
    figure, axes = panels(
        len(kinds),
        2 * len(sets),
        titles=[f"{kind}, {rule},\n{depth} layers, × {size:g}" for kind, rule, depth, size in kinds],
        xlabels=["step"],
        ylabels=[label for name, _ in sets for label in (f"{name}: loss", "of components")],
        share="row",
        width=10.5,
        height=2.2,
    )
    for row, (_, whole) in enumerate(sets):
        for column, kind in enumerate(kinds):
            runs = whole.filter(*(pl.col(name) == value for name, value in zip(_KIND[1:], kind, strict=True)))
            above, below = (axes[(2 * row + part) * len(kinds) + column] for part in (0, 1))
            _lines(above, runs, (_WHOLE,), [INK])
            above.set_ylim(bottom=0)
            _lines(below, runs, _SHOWN, sequence(len(_SHOWN))[::-1])
            logarithmic(below, "y")
            below.set_ylim(bottom=3e-4)
    axes[0].plot([], [], color=INK, linestyle=_PREDICTED, linewidth=1.2, label="predicted")
    legend(figure, columns=7)
    return figure


def _lines(panel: Axes, runs: pl.DataFrame, modes: tuple[int, ...], colours: list[str]) -> None:
    for colour, (mode, line) in zip(colours, each_of(runs, "mode", modes), strict=False):
        label = "whole" if mode == _WHOLE else f"component {mode + 1}"
        panel.plot(line["step"], line["trained"], color=colour, linewidth=1.4, label=label)
        panel.plot(line["step"], line["predicted"], color=colour, linewidth=1.2, linestyle=_PREDICTED)


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    return (
        table.filter(pl.col("seed") == 0)
        .select(*_KIND, "mode", "component", "step", "trained", "predicted")
        .sort(*_KIND, "mode", "step")
    )


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
    run=_run,
    agreement=1e-12,
    together=("activation", "rule", "depth", "size", "steps", "batch"),
    at_most=3,
    cost=lambda *, steps, batch: float(steps * batch),
    pictures=(
        Picture(
            name="prediction",
            caption="Loss of networks that falign trains (lines), whole and by component of Σ_yx above what linear "
            "maps reach, and what falign.theory.deep_linear.predict makes of their initial weights, feedback and data "
            "(dashed); first seed. × 1: weights of PyTorch's size. ReLU networks are trained in mini-batches and "
            "predicted as linear ones, each neuron with its initial gain.",
            data=_picture_data,
            draw=_beside,
        ),
    ),
    claims=_CLAIMS,
)
