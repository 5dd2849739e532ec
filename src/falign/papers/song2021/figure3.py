"""Figure 3: alignment and accuracy on images, for three ridges and both readings of the initial weights."""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from falign.lab.experiment import Claim, Evidence, Experiment, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import Estimate, above_zero, below_zero, final, paired, summary
from falign.papers._images import load_images
from falign.papers.song2021._drawing import alignment_and_accuracy
from falign.papers.song2021._shared import Batch, simulate_quietly
from falign.theory.two_layer import Start, WeightSpace, bytes_needed, draw_weights
from falign.theory.two_layer._trajectory import Trajectory

__all__ = ["FIGURE3"]

_STRENGTHS = (0.0, 0.1, 0.3)


def _points(*sets: str, p: int, size: int, epochs: int) -> tuple[Point, ...]:
    """Data sets, both readings of the weights, all ridges."""
    return tuple(
        point
        for name in sets
        for point in grid(
            dataset=name, weights=("standard", "scaled"), strength=_STRENGTHS, p=p, batch=size, rate=1e-2, epochs=epochs
        )
    )


_MEASURED = ("loss", "cosine", "error_cosine")
_MNIST = (784, 60000, 10000)
_IMAGES = {"digits": (64, 1437, 360), "mnist": _MNIST, "fashion-mnist": _MNIST, "mnist-10k": (784, 9000, 1000)}
"""Data set -> pixels, training images, test images: a block's memory is asked for before its images are loaded."""


class _WithAccuracy:
    """An engine that measures its accuracy on test images as well."""

    def __init__(self, engine: WeightSpace, images: Tensor, labels: Tensor) -> None:
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


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    dataset: str,
    weights: str,
    strength: Sequence[float],
    p: int,
    batch: int,
    rate: float,
    epochs: int,
) -> list[Outcome]:
    """Train all networks of a block as one batched computation."""
    block = Batch(seeds, p, strength)
    images, labels, test_images, test_labels = _data(dataset, setting)
    classes = int(labels.max()) + 1
    start = Start(
        X=images,
        y=torch.nn.functional.one_hot(labels, classes).to(images),
        **draw_weights(
            block.row_seeds,
            p=p,
            d=images.shape[1],
            outputs=classes,
            weights=weights,  # pyright: ignore[reportArgumentType]  # the grid holds the two names
            dtype=images.dtype,
            device=images.device,
        ),
        seeds=tuple(block.row_seeds),
    )
    engine = WeightSpace(start, activation="relu", rate=rate, penalties=block.penalties, loss="softmax", batch=batch)
    steps = -(-len(images) // batch)
    # Dense early, when accuracy changes most.
    recorded = sorted({round(epochs * (k / 20) ** 2) for k in range(21)})
    measured = _WithAccuracy(engine, test_images, test_labels)
    trajectory = simulate_quietly(measured, [epoch * steps for epoch in recorded], progress=setting.report)
    return block.outcomes(_in_epochs(trajectory, steps), "epoch")


def _data(name: str, setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images as vectors, normalised by mean and standard deviation of all training pixels, and labels."""
    data = load_images(name, setting)
    train, test = (images.flatten(1).float() for images in (data.train_images, data.test_images))
    mean, sd = train.mean(), train.std()
    moved = ((train - mean) / sd, data.train_labels.long(), (test - mean) / sd, data.test_labels.long())
    return tuple(tensor.to(setting.device) for tensor in moved)  # pyright: ignore[reportReturnType]  # four of them


def _in_epochs(trajectory: Trajectory, steps: int) -> Trajectory:
    """The same with steps counted in epochs."""
    diverged = torch.where(trajectory.diverged < 0, -1, trajectory.diverged // steps)
    return Trajectory(steps=trajectory.steps // steps, values=trajectory.values, diverged=diverged)


def _memory(*, seeds: Sequence[int], dataset: str, strength: Sequence[float], p: int, batch: int) -> int:
    """Bytes of a block: the engine, the images twice more while they are loaded, the pieces that are measured."""
    block = Batch(seeds, p, strength)
    pixels, train, test = _IMAGES[dataset]
    hidden = min(1 << 24, len(block.rows) * len(block.penalties) * p * train)
    engine = bytes_needed(
        engine="weight-space",
        n=train,
        d=pixels,
        p=p,
        outputs=10,
        test=test,
        batch=batch,
        seeds=1,
        penalties=len(block.rows) * len(block.penalties),
        dtype=torch.float32,
    )
    return engine + 4 * (2 * pixels * (train + test) + 3 * hidden)


_RUN = ["dataset", "weights", "p", "strength"]
_WORDS = {"error_cosine": "cosine", "accuracy": "test accuracy", "logarithm": "logarithm of the loss"}


def _compared(
    table: pl.DataFrame, value: str, pairs: Sequence[tuple[float, float]] = ((0.0, 0.1), (0.0, 0.3)), when: str = ""
) -> list[tuple[str, Estimate]]:
    """Differences between pairs of ridges, paired by seed, data set by data set."""
    ends = final(table.with_columns(logarithm=pl.col("loss").log()), by=_RUN)
    return [
        (
            f"{name}: {_WORDS[value]}, λ = {high:g} less λ = {low:g}{when}",
            paired(ends.filter(pl.col("dataset") == name), value, axis="strength", low=low, high=high, by=["dataset"]),
        )
        for name in sorted(ends["dataset"].unique().to_list())
        for low, high in pairs
    ]


def _runs(table: pl.DataFrame) -> str:
    return f"{table['seed'].n_unique()} runs a point"


def _aligns(table: pl.DataFrame) -> Evidence:
    early = table.filter(pl.col("step") == (pl.col("epochs") / 4).round())
    cosines = _compared(table, "error_cosine", ((0.0, 0.1), (0.0, 0.3), (0.1, 0.3)))
    accuracies = _compared(early, "accuracy", when=", after a quarter of the epochs")
    return above_zero([*cosines, *accuracies], note=_runs(table))


def _fits(table: pl.DataFrame) -> Evidence:
    return below_zero(_compared(table, "logarithm"), note=_runs(table))


def _gains(table: pl.DataFrame) -> Evidence:
    return above_zero(_compared(table, "accuracy"), note=_runs(table))


_CLAIMS = (
    Claim(
        name="images-align",
        statement="Both alignment and convergence are improved by adding regularization, and increasing λ can "
        "further facilitate alignment.",
        reference="Section 5, figure 3, left",
        quotation="both alignment and convergence are improved by adding regularization to the training, and "
        "increasing the regularization level λ can further facilitate alignment",
        method="Mean cosine of the error signals at the end; figure 3 shows no loss, so that convergence is read off "
        "the test accuracy after a quarter of the epochs. Differences between ridges are paired by seed; weights N(0, "
        "1).",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the seeds, all together).",
        read=_aligns,
        scope=pl.col("weights") == "standard",
    ),
    Claim(
        name="images-accuracy",
        statement="Increasing the regularization level facilitates alignment with a small gain in test accuracy.",
        reference="Section 5, figure 3, right",
        quotation="increasing the regularization level λ can further facilitate alignment, with a small gain in "
        "test accuracy",
        headline="test accuracy gained on images by a ridge",
        method="Test accuracy at the end, differences paired by seed; weights N(0, 1).",
        tolerance_reason="Above 0 with 99 % confidence (Student's t over the seeds, all together).",
        read=_gains,
        scope=pl.col("weights") == "standard",
    ),
    Claim(
        name="images-loss",
        statement="At the end of training the training loss is lower with a ridge.",
        origin="beyond",
        reference="Not in the paper, which shows no loss: whether “convergence” could mean it",
        method="Logarithm of the training loss at the end, differences paired by seed; weights N(0, 1).",
        tolerance_reason="Below 0 with 99 % confidence (Student's t over the seeds, all together).",
        read=_fits,
        scope=pl.col("weights") == "standard",
    ),
    Claim(
        name="images-accuracy-scaled",
        statement="There is a gain in test accuracy also if the initial weights are N(0, 1/d).",
        origin="beyond",
        reference="Not in the paper: how far figure 3, right, depends on the size of the initial weights",
        method="As for images-accuracy, weights N(0, 1/d).",
        tolerance_reason="As for images-accuracy.",
        read=_gains,
        scope=pl.col("weights") == "scaled",
    ),
)


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["dataset", "weights", "strength", "step"]
    return pl.concat(
        [
            summary(table, name, by=keys).with_columns(shown=pl.lit(name))
            for name in ("error_cosine", "cosine", "accuracy")
        ]
    )


FIGURE3 = Experiment(
    name="song2021.figure3",
    title="Alignment and accuracy on images",
    source="Song, Xu and Lafferty 2021, section 5, figure 3",
    revision=1,
    grid={
        "smoke": _points("digits", p=50, size=200, epochs=5),
        "quick": _points("digits", p=300, size=100, epochs=200),
        "paper": _points("mnist", "mnist-10k", "fashion-mnist", p=1000, size=600, epochs=300),
    },
    seeds={"smoke": 2, "quick": 4, "paper": 10},
    run=_run,
    agreement=1e-3,
    together=("strength",),
    memory=_memory,
    cost=lambda *, dataset, p, epochs: float(_IMAGES[dataset][0] * p * epochs),
    pictures=(
        Picture(
            name="figure-3",
            caption="Figure 3 of the paper. Alignment is the mean over training images of cos∠(β e, b e). Rows: data "
            "set and initial weights, N(0, 1) as the paper's section 2 has them, and N(0, 1/d).",
            data=_picture_data,
            draw=alignment_and_accuracy,
        ),
    ),
    claims=_CLAIMS,
)
