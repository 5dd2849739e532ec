"""Accuracy and alignment against the number of classes, for seven rules and a dial between two of them."""

from collections.abc import Sequence

import polars as pl

from falign.lab.data import Dataset, load
from falign.lab.experiment import Experiment, Missing, Outcome, Picture, Point, Scalar, Setting, Task, grid
from falign.lab.experiment.statistics import summary
from falign.papers.robertson2024.classes_claims import CLAIMS, compared, correlations, dial, ends, interval
from falign.papers.robertson2024.cuts import with_classes
from falign.papers.robertson2024.drawing_classes import by_alignment, by_classes
from falign.papers.robertson2024.training import Record, course, start

RULES = ("bp", "usf", "frsf", "kp", "fa", "dfa")
"""All that are compared but adafa, which has a tracking rate as well."""
TRACKING = 0.01
DIAL = (0.001, 0.1)
"""Tracking rates of adafa: where rules are compared, and those that the dial has beside it."""
_RECORDS = 10


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the runs of a block one after the other; the images are loaded once."""
    data = load(str(tasks[0].point["dataset"]), folder=setting.data, progress=False)
    return [_trained(data, task, setting) for task in setting.each(tasks)]


def _trained(data: Dataset, task: Task, setting: Setting) -> Outcome:
    point, steps = task.point, int(task.point["steps"])
    part = with_classes(data, int(point["classes"]), task.seed)
    training = start(
        part,
        point,
        task.seed,
        setting,
        adafa_rate=float(point["tracking"]) or None,
        momentum=float(point["momentum"]),
        scale=None if point["rule"] == "bp" else float(point["scale"]),
    )
    learner = training.learner

    def measure(done: int) -> list[Record]:
        accuracy = learner.test(training.test)[1] if done == steps else None
        return [{"cosine": training.cosine(), "accuracy": accuracy}]

    return course(training, sorted({round(steps * k / _RECORDS) for k in range(_RECORDS + 1)}), measure)


def _points(dataset: str, counts: Sequence[int], **sizes: Scalar) -> tuple[Point, ...]:
    """All rules at all numbers of classes, and the dial at the largest."""
    return (
        *grid(dataset=dataset, rule=RULES, tracking=0.0, classes=counts, **sizes),
        *grid(dataset=dataset, rule="adafa", tracking=TRACKING, classes=counts, **sizes),
        *grid(dataset=dataset, rule="adafa", tracking=DIAL, classes=max(counts), **sizes),
    )


def _by_classes(table: pl.DataFrame) -> pl.DataFrame:
    runs = compared(table)
    keys = ["dataset", "rule", "classes"]
    parts = [summary(runs, value, by=keys).with_columns(shown=pl.lit(value)) for value in ("accuracy", "cosine")]
    rows = [
        {"dataset": name, "classes": count, "of": words, "shown": "correlation", **found}
        for words, kept in (("all rules", pl.lit(True)), ("without bp", pl.col("rule") != "bp"))
        for (name, count), own in correlations(runs.filter(kept)).group_by(["dataset", "classes"], maintain_order=True)
        if (found := _interval(own["correlation"]))
    ]
    return pl.concat([*parts, pl.DataFrame(rows)], how="diagonal")


def _interval(correlation: pl.Series) -> dict[str, float] | None:
    """Mean and interval of correlations over seeds; None where a seed has none, all rules being equally accurate."""
    if correlation.null_count():
        return None
    try:
        value, low, high = interval(correlation.to_list())
    except Missing:
        return None
    return {"mean": value, "low": low, "high": high}


def _by_alignment(table: pl.DataFrame) -> pl.DataFrame:
    runs = ends(table).filter(pl.col("classes") == pl.col("classes").max().over("dataset"))
    keys = ["dataset", "rule", "tracking"]
    alphas = dial(table).select(*keys, "alpha").unique()
    found = runs.group_by([*keys, "classes"]).agg(
        pl.col("cosine").mean(),
        pl.col("accuracy").mean(),
        cosine_sd=pl.col("cosine").std(),
        accuracy_sd=pl.col("accuracy").std(),
        runs=pl.len(),
    )
    return found.join(alphas, on=keys, how="left").sort(keys)


_SMALL = {"model": "mlp:128-128-128", "scale": 0.6, "rate": 0.01, "momentum": 0.9, "batch": 32}
"""Feedback of all rules is of the size of PyTorch's own weights: its norm is no difference between them."""
_PAPER = {**_SMALL, "model": "mlp:512-512-512", "batch": 128, "steps": 10000}
_CONVOLUTIONAL = {**_PAPER, "model": "lenet", "steps": 40000}

CLASSES = Experiment(
    name="robertson2024.classes",
    title="Difficulty of multi-class tasks",
    source="Robertson and Koyejo 2024, abstract; the sweep over random n-class subsets by an index of papers",
    revision=1,
    grid={
        "smoke": _points("digits", (2, 10), **{**_SMALL, "model": "mlp:32-32", "steps": 20}),
        "quick": _points("digits", (2, 3, 5, 10), **{**_SMALL, "steps": 400}),
        "paper": (
            *(
                point
                for dataset in ("mnist", "fashion-mnist", "mnist-10k")
                for point in _points(dataset, tuple(range(2, 11)), **_PAPER)
            ),
            *_points("cifar100", (2, 5, 10, 20, 50, 100), **_CONVOLUTIONAL),
            *_points("tiny-imagenet", (2, 5, 10, 20, 50, 100, 200), **_CONVOLUTIONAL),
        ),
    },
    seeds={"smoke": 2, "quick": 8, "paper": 10},
    run=run,
    agreement=1e-4,
    together=("rule", "tracking", "classes"),
    at_most=20,
    cost=lambda task: float(int(task.point["steps"])),
    pictures=(
        Picture(
            name="classes",
            caption="Test accuracy and alignment of the gradients against the number of classes, a fresh random subset "
            "a seed; mean ± standard deviation. Right: their correlation over the rules, one a seed, mean and 99 % "
            "interval (Fisher's z); none where in some seed all rules are equally accurate.",
            data=_by_classes,
            draw=by_classes,
        ),
        Picture(
            name="classes-alignment",
            caption="Test accuracy against alignment at the largest number of classes, mean ± standard deviation. The "
            "line is the dial B ← (1-α)B + αW from feedback alignment (α = 0) to backpropagation (α = 1).",
            data=_by_alignment,
            draw=by_alignment,
        ),
    ),
    claims=CLAIMS,
)
