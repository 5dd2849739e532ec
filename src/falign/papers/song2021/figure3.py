"""Figure 3: alignment and accuracy on images, for three ridges and both readings of the initial weights."""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from falign.lab.data import load
from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task, grid
from falign.lab.experiment.statistics import summary
from falign.papers.song2021.blocks import batch, outcomes, trained
from falign.papers.song2021.drawing import alignment_and_accuracy
from falign.papers.song2021.figure3_claims import CLAIMS
from falign.theory.two_layer import Literal, Start, bytes_needed, draw_weights
from falign.theory.two_layer.trajectory import Trajectory

STRENGTHS = (0.0, 0.1, 0.3)
_MEASURED = ("loss", "cosine", "error_cosine")
_IMAGES = {"digits": (64, 1437, 360), "mnist": (784, 60000, 10000)}
_IMAGES |= {"mnist-10k": (784, 9000, 1000), "fashion-mnist": _IMAGES["mnist"]}
"""Name -> pixels, training images, test images."""


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
    judged = _Judged(engine, test_images, test_labels)
    trajectory = trained(judged, [epoch * steps for epoch in epochs], progress=setting.report)
    return outcomes(tasks, _in_epochs(trajectory, steps), "epoch")


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
    """Bytes of a block: the engine, the images twice more while they are loaded, the pieces that are measured."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    pixels, train, test = _IMAGES[str(point["dataset"])]
    hidden = min(1 << 24, len(rows) * len(penalties) * int(point["p"]) * train)
    engine = bytes_needed(
        engine="literal",
        n=train,
        d=pixels,
        p=int(point["p"]),
        outputs=10,
        test=test,
        batch=int(point["batch"]),
        seeds=1,
        penalties=len(rows) * len(penalties),
        dtype=torch.float32,
    )
    return engine + 4 * (2 * pixels * (train + test) + 3 * hidden)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["dataset", "weights", "strength", "step"]
    return pl.concat(
        [
            summary(table, name, by=keys).with_columns(shown=pl.lit(name))
            for name in ("error_cosine", "cosine", "accuracy")
        ]
    )


def _points(*sets: str, p: int, size: int, epochs: int) -> tuple[Point, ...]:
    """Data sets, both readings of the weights, all ridges."""
    return tuple(
        point
        for name in sets
        for point in grid(
            dataset=name,
            weights=("standard", "scaled"),
            strength=STRENGTHS,
            p=p,
            batch=size,
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
        "smoke": _points("digits", p=50, size=200, epochs=5),
        "quick": _points("digits", p=300, size=100, epochs=200),
        "paper": _points("mnist", "mnist-10k", "fashion-mnist", p=1000, size=600, epochs=300),
    },
    seeds={"smoke": 2, "quick": 4, "paper": 10},
    run=run,
    agreement=1e-3,
    together=("strength",),
    memory=memory,
    cost=lambda task: float(_IMAGES[str(task.point["dataset"])][0] * int(task.point["p"]) * int(task.point["epochs"])),
    pictures=(
        Picture(
            name="figure-3",
            caption="Figure 3 of the paper. Alignment is the mean over training images of cos∠(β e, b e). Rows: data "
            "set and initial weights, N(0, 1) as the paper's section 2 has them, and N(0, 1/d).",
            data=_drawn,
            draw=alignment_and_accuracy,
        ),
    ),
    claims=CLAIMS,
)
