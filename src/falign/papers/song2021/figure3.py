"""Figure 3: alignment and accuracy on images, for three ridges and both readings of the initial weights."""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from falign.lab.data import load
from falign.lab.experiment import (
    Check,
    Claim,
    Experiment,
    Missing,
    Outcome,
    Picture,
    Point,
    Reading,
    Setting,
    Task,
    grid,
)
from falign.lab.experiment.statistics import final, paired, summary
from falign.papers.song2021.blocks import batch, outcomes
from falign.papers.song2021.drawing import alignment_and_accuracy
from falign.theory.two_layer import Literal, Start, bytes_needed, draw_weights
from falign.theory.two_layer.trajectory import Trajectory, simulate

STRENGTHS = (0.0, 0.1, 0.3)
_RUN = ["dataset", "weights", "p", "strength"]
_MEASURED = ("loss", "cosine", "error_cosine")


class _Judged:
    """An engine that measures its accuracy on test images as well."""

    def __init__(self, engine: Literal, images: Tensor, labels: Tensor) -> None:
        self._engine = engine
        self._images, self._labels = images, labels

    @property
    def t(self) -> int:
        return self._engine.t

    def advance(self, steps: int) -> None:
        self._engine.advance(steps)

    def error(self) -> Tensor:
        return self._engine.error()

    def measure(self) -> dict[str, Tensor]:
        return {**self._engine.measure(_MEASURED), "accuracy": self._engine.accuracy(self._images, self._labels)}


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train all networks of a block as one batched computation."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    images, labels, test_images, test_labels = _data(str(point["dataset"]), setting)
    classes = int(labels.max()) + 1
    start = Start(
        X=images,
        y=torch.nn.functional.one_hot(labels, classes).to(images),
        **draw_weights(
            [seed for seed, _ in rows],
            p=int(point["p"]),
            d=images.shape[1],
            outputs=classes,
            weights=str(point["weights"]),  # pyright: ignore[reportArgumentType]  # the grid holds the two names
            dtype=images.dtype,
            device=images.device,
        ),
        seeds=tuple(seed for seed, _ in rows),
    )
    size = int(point["batch"])
    engine = Literal(
        start, activation="relu", rate=float(point["rate"]), penalties=penalties, loss="softmax", batch=size
    )
    steps = -(-len(images) // size)
    epochs = sorted({round(int(point["epochs"]) * (k / 20) ** 2) for k in range(21)})
    trajectory = simulate(_Judged(engine, test_images, test_labels), [epoch * steps for epoch in epochs])
    return outcomes(tasks, _in_epochs(trajectory, steps))


def _data(name: str, setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as vectors, normalised by mean and standard deviation of all training pixels, and labels."""
    found = load(name, folder=setting.data, progress=False)
    train, test = (images.flatten(1).float() for images in (found.train_images, found.test_images))
    mean, sd = train.mean(), train.std()
    moved = ((train - mean) / sd, found.train_labels.long(), (test - mean) / sd, found.test_labels.long())
    return tuple(tensor.to(setting.device) for tensor in moved)  # pyright: ignore[reportReturnType]  # four of them


def _in_epochs(trajectory: Trajectory, steps: int) -> Trajectory:
    """The same with steps counted in epochs."""
    diverged = torch.where(trajectory.diverged < 0, -1, trajectory.diverged // steps)
    return Trajectory(steps=trajectory.steps // steps, values=trajectory.values, diverged=diverged)


def memory(tasks: Sequence[Task]) -> int:
    """Bytes of a block."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    return bytes_needed(
        engine="literal",
        n=int(point["batch"]),
        d=int(point["pixels"]),
        p=int(point["p"]),
        outputs=10,
        seeds=len(rows),
        penalties=len(penalties),
        dtype=torch.float32,
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["dataset", "weights", "strength", "step"]
    return pl.concat(
        [summary(table, name, by=keys).with_columns(shown=pl.lit(name)) for name in ("error_cosine", "accuracy")]
    )


def _gain(table: pl.DataFrame, value: str, weights: str, *, low: float) -> Reading:
    ends = final(table.filter(pl.col("weights") == weights), by=_RUN)
    if ends.is_empty():
        raise Missing(f"no run is done with weights = {weights}")
    checks = []
    for name in sorted(ends["dataset"].unique().to_list()):
        own = ends.filter(pl.col("dataset") == name)
        for strength in STRENGTHS[1:]:
            gain = paired(own, value, axis="strength", low=0.0, high=strength, by=["dataset"])
            checks.append(
                Check(
                    label=f"{name}: λ = {strength:g} less λ = 0 is {gain.value:+.3f}; in standard errors",
                    measured=gain.significance,
                    low=low,
                )
            )
    return Reading(checks=tuple(checks), note=f"{ends['seed'].n_unique()} runs a point")


def _points(*sets: tuple[str, int, int], p: int, size: int, epochs: int) -> tuple[Point, ...]:
    """Data sets with their number of pixels, both readings of the weights, all ridges."""
    return tuple(
        point
        for name, pixels, divisor in sets
        for point in grid(
            dataset=name,
            pixels=pixels,
            weights=("standard", "scaled"),
            strength=STRENGTHS,
            p=p,
            batch=size // divisor,
            rate=1e-2,
            epochs=epochs,
        )
    )


FIGURE3 = Experiment(
    name="song2021.figure3",
    title="Alignment and accuracy on images",
    source="Song, Xu and Lafferty 2021, section 5, figure 3",
    revision=1,
    grid={
        "smoke": _points(("digits", 64, 1), p=50, size=200, epochs=5),
        "quick": _points(("digits", 64, 1), p=300, size=100, epochs=200),
        "paper": _points(
            ("mnist", 784, 1), ("mnist-10k", 784, 1), ("fashion-mnist", 784, 1), p=1000, size=600, epochs=300
        ),
    },
    seeds={"smoke": 2, "quick": 4, "paper": 10},
    run=run,
    together=("strength",),
    memory=memory,
    cost=lambda task: float(int(task.point["pixels"]) * int(task.point["p"]) * int(task.point["epochs"])),
    pictures=(
        Picture(
            name="figure-3",
            caption="Figure 3 of the paper. Alignment is the mean over training images of cos∠(β e, b e). Rows: data "
            "set and initial weights, N(0, 1) as the paper's section 2 has them, and N(0, 1/d).",
            data=_drawn,
            draw=alignment_and_accuracy,
        ),
    ),
    claims=(
        Claim(
            name="images-align",
            statement="Both alignment and convergence are improved by adding regularization, and increasing λ further "
            "facilitates alignment.",
            place="Section 5, figure 3, left",
            how="Mean cosine of the error signals at the end, against λ = 0, paired by seed, in standard errors; "
            "weights N(0, 1).",
            because="More than 3 standard errors above 0.",
            read=lambda table: _gain(table, "error_cosine", "standard", low=3.0),
        ),
        Claim(
            name="images-accuracy",
            statement="… with a small gain in test accuracy.",
            place="Section 5, figure 3, right",
            how="Test accuracy at the end, against λ = 0, paired by seed, in standard errors; weights N(0, 1).",
            because="More than 3 standard errors above 0.",
            read=lambda table: _gain(table, "accuracy", "standard", low=3.0),
        ),
        Claim(
            name="images-accuracy-scaled",
            statement="… with a small gain in test accuracy, if the initial weights are N(0, 1/d) instead.",
            place="Not in the paper: how far figure 3, right, depends on the size of the initial weights",
            how="As above, weights N(0, 1/d).",
            because="As above.",
            read=lambda table: _gain(table, "accuracy", "scaled", low=3.0),
        ),
    ),
)
