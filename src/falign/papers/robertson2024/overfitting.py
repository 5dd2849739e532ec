"""Training on labels of which some are wrong, until they are learned by heart."""

from collections.abc import Sequence

import polars as pl

from falign.lab.data import Dataset, load
from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task, grid
from falign.lab.experiment.statistics import summary
from falign.papers.robertson2024.cuts import with_images, with_noise
from falign.papers.robertson2024.drawing_overfitting import errors_and_norms
from falign.papers.robertson2024.overfitting_claims import CLAIMS
from falign.papers.robertson2024.training import Record, course, start

RULES = ("bp", "fa", "usf")
NOISE = 0.2
"""Share of wrong labels in the paper's experiment."""
_RECORDS = 20
_SHOWN = ("train_error", "test_error", "norm")


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the runs of a block one after the other; the images are loaded once."""
    data = load(str(tasks[0].point["dataset"]), folder=setting.data, progress=False)
    return [_trained(data, task, setting) for task in setting.each(tasks)]


def _trained(data: Dataset, task: Task, setting: Setting) -> Outcome:
    point, epochs = task.point, int(task.point["epochs"])
    part = with_noise(with_images(data, int(point["images"]), task.seed), float(point["noise"]), task.seed)
    training = start(
        part,
        point,
        task.seed,
        setting,
        momentum=float(point["momentum"]),
        scale=None if point["rule"] == "bp" else float(point["scale"]),
    )
    learner, steps = training.learner, training.steps_of_epoch()
    weights = [learner.model.get_parameter(f"{name}.weight") for name in learner.layers]

    def measure(done: int) -> list[Record]:
        loss, right = learner.test(training.train)
        test_error = 1 - learner.test(training.test)[1]
        norm = sum(float(weight.detach().square().sum()) for weight in weights)
        return [
            {
                "epoch": done // steps,
                "train_loss": loss,
                "train_error": 1 - right,
                "test_error": test_error,
                "norm": norm,
            }
        ]

    at = sorted({round(epochs * (k / _RECORDS) ** 2) for k in range(_RECORDS + 1)})
    return course(training, [epoch * steps for epoch in at], measure)


def _points(dataset: str, **sizes: Scalar) -> tuple[Point, ...]:
    """All rules with and without noise."""
    return grid(dataset=dataset, rule=RULES, noise=(0.0, NOISE), **sizes)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["dataset", "noise", "rule", "epoch"]
    return pl.concat([summary(table, value, by=keys).with_columns(shown=pl.lit(value)) for value in _SHOWN])


_SIZES = {"scale": 0.6, "rate": 0.1, "momentum": 0.9, "batch": 100}

OVERFITTING = Experiment(
    name="robertson2024.overfitting",
    title="Benign overfitting",
    source="Robertson and Koyejo 2024; 4,000 images of MNIST with 20 % wrong labels, by an index of papers",
    revision=1,
    grid={
        "smoke": _points("digits", model="mlp:64", images=200, epochs=10, **_SIZES),
        "quick": _points("digits", model="mlp:512", images=1000, epochs=120, **_SIZES),
        "paper": tuple(
            point
            for dataset in ("mnist", "fashion-mnist", "mnist-10k")
            for point in _points(dataset, model="mlp:1000", images=4000, epochs=300, **_SIZES)
        ),
    },
    seeds={"smoke": 2, "quick": 8, "paper": 10},
    run=run,
    agreement=1e-4,
    together=("rule", "noise"),
    at_most=8,
    cost=lambda task: float(int(task.point["epochs"]) * int(task.point["images"])),
    pictures=(
        Picture(
            name="overfitting",
            caption="Training on labels of which a fifth was changed to another class: share of training labels, wrong "
            "ones included, that the network does not give; test error on right labels; sum of the squared weights. "
            "Mean ± standard deviation; dotted: the same with all labels right, means only.",
            data=_drawn,
            draw=errors_and_norms,
        ),
    ),
    claims=CLAIMS,
)
