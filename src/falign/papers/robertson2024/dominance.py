"""Alignment dominance along training from four starts, and the loss that it predicts."""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from falign import init
from falign.lab.data import Dataset, load
from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task, grid
from falign.lab.experiment.statistics import summary
from falign.measure import Alignment, alignment
from falign.papers.robertson2024.cuts import with_images
from falign.papers.robertson2024.dominance_claims import CLAIMS, predicted
from falign.papers.robertson2024.drawing_dominance import dominance_and_loss
from falign.papers.robertson2024.training import Record, Training, course, start

STARTS = {"fa": ("dominant", "small", "generic", "anti"), "usf": ("dominant", "small", "generic")}
"""Of each rule; feedback with the weights' own signs has no start against it."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the runs of a block one after the other; the images are loaded once."""
    data = load(str(tasks[0].point["dataset"]), folder=setting.data, progress=False)
    return [_trained(data, task, setting) for task in setting.each(tasks)]


def _trained(data: Dataset, task: Task, setting: Setting) -> Outcome:
    point, steps = task.point, int(task.point["steps"])
    part = with_images(data, int(point["images"]), task.seed)
    whole = {**point, "batch": int(point["images"])}
    training = start(part, whole, task.seed, setting, scale=float(point["scale"]))
    model = training.learner.model
    x, y = training.train.take(slice(None))
    init.SCHEMES[str(point["start"])](model, example=x[:2], seed=task.seed)
    bound = init.aligned_forever(model, example=x[:2])

    def measure(done: int) -> list[Record]:
        found = alignment(model, cross_entropy, x, y)
        return [
            {
                "loss": found.loss,
                "descent": found.descent,
                "dominance": found.dominance,
                "output_gradient": found.layers[-1].gradient_norm,
                **_neurons(training, found, bound),
            }
        ]

    return course(training, range(steps + 1), measure)


def _neurons(training: Training, found: Alignment, bound: dict[str, Tensor]) -> dict[str, float]:
    """Shares of the hidden neurons: aligned; aligned for ever by the law; of these, not aligned all the same."""
    follower = dict(zip(training.learner.layers, training.learner.layers[1:], strict=False))
    products = torch.cat([found.neurons[follower[name]].cpu() for name in bound])
    promised = torch.cat([each.cpu() for each in bound.values()])
    broken = (promised & (products < 0)).sum() / promised.sum().clamp(min=1)
    shares = {"aligned": (products > 0).double().mean(), "promised": promised.double().mean(), "broken": broken}
    return {name: float(share) for name, share in shares.items()}


def _points(dataset: str, models: Sequence[str], **sizes: Scalar) -> tuple[Point, ...]:
    """All starts of feedback alignment for every network, and those of sign feedback for the first."""
    return tuple(
        point
        for model in models
        for rule, starts in STARTS.items()
        if rule == "fa" or model == models[0]
        for point in grid(dataset=dataset, model=model, rule=rule, start=starts, scale=1.0, **sizes)
    )


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    found = predicted(table)
    keys = ["dataset", "model", "rule", "start", "step"]
    shown = ("dominance", "loss", "integrated", "bound")
    parts = [summary(found, value, by=keys).with_columns(shown=pl.lit(value)) for value in shown]
    return pl.concat(parts).filter(pl.col("mean").is_not_null())


DOMINANCE = Experiment(
    name="robertson2024.dominance",
    title="Alignment dominance from four starts",
    source="Robertson and Koyejo 2024, abstract (“alignment dominance”); its definition is a reconstruction",
    revision=1,
    grid={
        "smoke": _points("digits", ("mlp:30", "mlp:30-30"), images=60, rate=0.1, steps=10),
        "quick": _points("digits", ("mlp:100", "mlp:100-100"), images=300, rate=0.1, steps=120),
        "paper": tuple(
            point
            for dataset in ("mnist", "fashion-mnist", "mnist-10k")
            for point in _points(dataset, ("mlp:500", "mlp:500-500"), images=1000, rate=0.05, steps=1000)
        ),
    },
    seeds={"smoke": 2, "quick": 5, "paper": 10},
    run=run,
    agreement=1e-4,
    together=("model", "rule", "start"),
    at_most=8,
    cost=lambda task: float(int(task.point["steps"]) * int(task.point["images"])),
    pictures=(
        Picture(
            name="dominance",
            caption="Alignment dominance D = Σ ⟨g_l, f_l⟩/|g_L|² of the hidden layers along training; below -1 (grey) "
            "the loss rises. Under it the loss, what the sum of η Σ ⟨g_l, f_l⟩ predicts (dashed), and the lower of the "
            "bounds L(0) exp(-κμt) and L(0)/(1 + κμL(0)t) with the run's own constants (dotted, where κ > 0). Mean ± "
            "standard deviation.",
            data=_drawn,
            draw=dominance_and_loss,
        ),
    ),
    claims=CLAIMS,
)
