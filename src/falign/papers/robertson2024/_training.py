"""Training as ``falign train`` does it, on data that were cut for an experiment, and what a run leaves of it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from falign.feedback import generator
from falign.lab._batches import Images, order, prepare, probe
from falign.lab._divergence import Diverged, is_finite
from falign.lab._learner import Learner, make_learner
from falign.lab._validate import resolve
from falign.lab.config import TrainConfig
from falign.lab.data import DataError, Dataset
from falign.lab.experiment import Outcome, Scalar, Setting
from falign.lab.report.style import COLOURS, INK, Axes
from falign.measure import alignment

Record = dict[str, Scalar | None]
"""Numbers that are measured together, by column."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A learner and its images.

    Attributes:
        learner: The network before its first step.
        train: Training images.
        test: Test images.
        x: Training images on which alignment is measured.
        y: Their labels.
    """

    learner: Learner
    train: Images
    test: Images
    x: Tensor
    y: Tensor

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for ever, epoch by epoch, every epoch in a new order."""
        config, epoch = self.learner.config, 0
        while True:
            images = order(config.seed, epoch, len(self.train)).to(self.x.device)
            for batch in images.split(config.batch_size):
                yield self.train.take(batch)
            epoch += 1

    def steps_of_epoch(self) -> int:
        """Number of batches of an epoch."""
        return -(-len(self.train) // self.learner.config.batch_size)

    def loss(self) -> float:
        """On the images on which alignment is measured, in evaluation mode."""
        model = self.learner.model.eval()
        try:
            with torch.no_grad():
                return float(cross_entropy(model(self.x), self.y))
        finally:
            model.train()

    def cosine(self) -> float:
        """Mean over the layers below the output of the cosine between the gradient taken and the true one."""
        *hidden, _ = alignment(self.learner.model, cross_entropy, self.x, self.y).layers
        # A gradient that is zero has no direction, and no cosine: such a layer counts as not aligned.
        return sum(layer.cosine or 0.0 for layer in hidden) / len(hidden)


def start_training(
    data: Dataset,
    seed: int,
    setting: Setting,
    *,
    dataset: str,
    model: str,
    rule: str,
    rate: float,
    batch: int,
    **options: Scalar | None,
) -> Training:
    """Build a network, convert it and make its optimizer.

    Args:
        data: What it learns.
        seed: Of weights, feedback and batches.
        setting: Where it is computed.
        dataset: Name of the data set that the data were cut from.
        model: "mlp:128-128" has hidden layers only.
        rule: The rule.
        rate: Learning rate.
        batch: Images in a batch.
        options: Further fields of ``TrainConfig``; the optimizer is gradient descent, without momentum, by default.

    Returns:
        The training before its first step.
    """
    plain = {"momentum": 0.0} if options.get("optimizer", "sgd") == "sgd" else {}
    config = resolve(
        TrainConfig(
            dataset=dataset,
            model=_sized(model, data),
            rule=rule,
            learning_rate=rate,
            batch_size=batch,
            seed=seed,
            device=setting.device,
            **(plain | options),  # pyright: ignore[reportArgumentType]  # fields by name
        )
    )
    train, test = prepare(data, device=torch.device(config.device), dtype=getattr(torch, config.dtype))
    x, y = train.take(probe(seed, len(train), config.probe_size).to(config.device))
    learner = make_learner(config, shape=data.shape, classes=len(data.classes), example=x[:2])
    return Training(learner=learner, train=train, test=test, x=x, y=y)


def _sized(model: str, data: Dataset) -> str:
    """A perceptron with the numbers of pixels and classes; other models as they are."""
    if not model.startswith("mlp:"):
        return model
    return f"mlp:{prod(data.shape)}-{model.removeprefix('mlp:')}-{len(data.classes)}"


def train_and_measure(training: Training, at: Iterable[int], measure: Callable[[int], list[Record]]) -> Outcome:
    """Train, and measure before some steps.

    Args:
        training: Before its first step.
        at: Numbers of steps done when it is measured, rising; training ends with the last one.
        measure: Steps done -> records, all of the same columns.

    Returns:
        The records, with "step"; those before the run left the finite numbers, if it did.
    """
    rows: list[Record] = []
    batches, learner, done = training.batches(), training.learner, 0
    try:
        for step in at:
            while done < step:
                learner.step(*next(batches), done)
                done += 1
            # Before measuring: a measure of infinite weights would fail with an error of its own kind.
            if not (is_finite(learner.model) and isfinite(training.loss())):
                raise learner.locate_fault(training.x, done)
            rows += [{"step": done, **record} for record in measure(done)]
    except Diverged as diverged:
        return _outcome(rows, diverged=f"{diverged}: lower the rate")
    return _outcome(rows)


def _outcome(rows: list[Record], diverged: str | None = None) -> Outcome:
    """Records as columns."""
    names = rows[0] if rows else {}
    return Outcome(records={name: [row[name] for row in rows] for name in names}, diverged=diverged)


# Parts of a data set that an experiment trains on: some classes, some images, some labels wrong.


def with_classes(data: Dataset, count: int, seed: int) -> Dataset:
    """The images of some random classes, which are numbered anew; the classes of a smaller count are among them.

    Args:
        data: The whole.
        count: How many classes.
        seed: Of their choice.

    Returns:
        Training and test images of these classes only.

    Raises:
        DataError: The data have fewer classes.
    """
    if count > len(data.classes):
        raise DataError(f"{data.name} has {len(data.classes)} classes, expected at least {count}: ask for fewer")
    # One order of the classes a seed, cut off at the count: so the subsets are nested.
    chosen = torch.randperm(len(data.classes), generator=generator(seed, data.name, "classes"))[:count]

    def cut(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, number = (labels[:, None] == chosen).nonzero(as_tuple=True)
        return images[image], number

    train_images, train_labels = cut(data.train_images, data.train_labels)
    test_images, test_labels = cut(data.test_images, data.test_labels)
    return replace(
        data,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=tuple(data.classes[index] for index in chosen.tolist()),
    )


def with_images(data: Dataset, count: int, seed: int) -> Dataset:
    """A random part of the training images, and all test images.

    Args:
        data: The whole.
        count: How many training images.
        seed: Of their choice.

    Returns:
        The part.

    Raises:
        DataError: There are fewer training images.
    """
    there = len(data.train_labels)
    if count > there:
        raise DataError(f"{data.name} has {there} training images, expected at least {count}: ask for fewer")
    chosen = torch.randperm(there, generator=generator(seed, data.name, "images"))[:count]
    return replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])


def with_noise(data: Dataset, share: float, seed: int) -> Dataset:
    """A share of the training labels, rounded to whole images, is changed to one of the other classes, each as likely.

    Args:
        data: The whole; test labels stay right.
        share: Of the training labels, from 0 to 1.
        seed: Of which images, and of their labels.

    Returns:
        The same images.
    """
    random, labels = generator(seed, data.name, "noise"), data.train_labels.clone()
    wrong = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
    # A step of 1 to classes - 1 around the circle of the classes: never the right one, the others equally likely.
    steps = torch.randint(1, len(data.classes), (len(wrong),), generator=random)
    labels[wrong] = (labels[wrong] + steps) % len(data.classes)
    return replace(data, train_labels=labels)


# What the pictures of Robertson and Koyejo 2024 share: how rules are told apart, and points with error bars.


class Style(NamedTuple):
    """Colour and marker of a rule."""

    colour: str
    marker: str


STYLES = {
    "bp": Style(INK, "s"),
    **{
        rule: Style(colour, marker)
        for rule, colour, marker in zip(("fa", "dfa", "usf", "frsf", "kp", "adafa"), COLOURS, "oDv^PX", strict=True)
    },
}
"""Of every rule of the paper's experiments: the same in all pictures."""


def points(axes: Axes, data: pl.DataFrame, x: str, rule: str) -> None:
    """Means of a rule along an axis, with bars of a standard deviation."""
    colour, marker = STYLES[rule]
    axes.errorbar(
        data[x],
        data["mean"],
        yerr=data["sd"].fill_null(0),
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=1.4,
        elinewidth=0.9,
        label=rule,
    )
