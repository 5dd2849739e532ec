"""Values that others have published, and those of them that run here as their sources state them."""

from functools import cache
from importlib.resources import files
from math import prod
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, one_hot

import falign
from falign._preserve import seeded
from falign.feedback import generator
from falign.lab._batches import order
from falign.lab._divergence import is_finite
from falign.lab.data import Dataset
from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import summary
from falign.lab.report.style import AXIS, COLOURS, INK, Figure, each_of, panels
from falign.papers._images import load_images

__all__ = ["PUBLISHED", "published_values", "values_beside"]

_BATCH = 64
_SIDE = 32
"""Pixels a side to which LeNet's images are enlarged."""
_STATED = {"biotorch": "fashion-mnist", "dfa-stall": "mnist"}
"""Source -> the data set that its values are of."""


@cache
def published_values() -> pl.DataFrame:
    """Accuracies in % that others have published, one row each.

    Returns:
        Columns "source", "setting", "network", "data", "rule", "value", "sd", "tolerance" (how far ours may be off,
        where it runs here), "ours" (mean of our runs, once they are made), "runs_here" (which point of which
        experiment) and "provenance" (how the value was come by).
    """
    text = files("falign.papers.benchmark").joinpath("published.csv").read_bytes()
    numbers = ("value", "sd", "tolerance", "ours")
    return pl.read_csv(text).with_columns(pl.col(*numbers).cast(pl.Float64))


class _Images(NamedTuple):
    """Images of a run on its device, and their labels."""

    x: Tensor
    y: Tensor


def _images(data: Dataset, setting: str, device: str, images: int) -> tuple[_Images, _Images]:
    """Training and test images as a setting has them: enlarged and normalised, or with pixels from 0 to 1."""
    largest = float(data.train_images.max())
    parts = []
    for pixels, labels in (
        (data.train_images[: images or None], data.train_labels[: images or None]),
        (data.test_images, data.test_labels),
    ):
        x = pixels.to(device).float() / largest
        if setting == "biotorch":
            x = interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
        parts.append(_Images(x, labels.to(device)))
    train, test = parts
    if setting == "biotorch":
        mean, deviation = train.x.mean(), train.x.std()
        train, test = (_Images((part.x - mean) / deviation, part.y) for part in (train, test))
    return train, test


def _lenet(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten(),
        nn.Linear(120, 84), nn.Linear(84, classes),
    )  # fmt: skip


def _tanh(pixels: int, classes: int, start: str) -> nn.Module:
    model = nn.Sequential(nn.Flatten())
    for before in (pixels, 800, 800):
        model += nn.Sequential(nn.Linear(before, 800), nn.Tanh())
    model.append(nn.Linear(800, classes))
    if start == "xavier":
        for part in model:
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
    return model


def _run(
    *, seed: int, setting: Setting, source: str, dataset: str, rule: str, start: str, epochs: int, images: int
) -> Outcome:
    """Train as a source states it, and test after every epoch."""
    data = load_images(dataset, setting)
    train, test = _images(data, source, setting.device, images)
    classes = len(data.classes)
    with seeded(generator(seed, "", "weights").initial_seed()):
        model = (
            _lenet(data.shape[0], classes) if source == "biotorch" else _tanh(prod(data.shape), classes, start)
        ).to(setting.device)
    falign.convert(model, rule, seed=seed, example=train.x[:8])
    if start == "zero":  # only now: the size of the feedback is taken from the weights that were there
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    loss_of, optimizer = _learning(source, model)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
    accuracies: list[float] = []
    for epoch in range(epochs):
        for batch in order(seed, epoch, len(train.y)).to(setting.device).split(_BATCH):
            optimizer.zero_grad(set_to_none=True)
            loss_of(model(train.x[batch]), train.y[batch]).backward()
            optimizer.step()
        if source == "biotorch":
            decay.step()
        if not is_finite(model):
            return Outcome(
                records={"epoch": list(range(len(accuracies))), "accuracy": accuracies},
                diverged=f"weights stopped being finite in epoch {epoch}",
            )
        accuracies.append(_accuracy(model, test))
        setting.report((epoch + 1) / epochs)
    return Outcome(records={"epoch": list(range(epochs)), "accuracy": accuracies})


def _learning(source: str, model: nn.Module):
    """Loss and optimizer of a source."""
    if source == "biotorch":
        return cross_entropy, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        targets = one_hot(labels, output.shape[1]).to(output.dtype)
        return binary_cross_entropy_with_logits(output, targets, reduction="sum") / len(output)

    return loss, torch.optim.RMSprop(model.parameters(), lr=1e-3)


def _accuracy(model: nn.Module, images: _Images) -> float:
    model.eval()
    with torch.no_grad():
        output = torch.cat([model(x) for x in images.x.split(1000)])
    model.train()
    return 100 * int((output.argmax(-1) == images.y).sum()) / len(images.y)


# What is read off the runs.


def _ours(table: pl.DataFrame) -> pl.DataFrame:
    """One row a run: "ours", the best epoch where the source reports that, else the last one."""
    runs = table.sort("epoch").group_by("source", "dataset", "rule", "start", "seed", maintain_order=True)
    found = runs.agg(best=pl.col("accuracy").max(), last=pl.col("accuracy").last())
    return found.with_columns(ours=pl.when(pl.col("source") == "biotorch").then("best").otherwise("last"))


def _named() -> pl.DataFrame:
    """The published values that run here, with the source, rule and start of the points that run them."""
    values = published_values().drop("ours").filter(pl.col("runs_here").is_not_null())
    parts = {
        name: pl.col("runs_here").str.extract(rf"\b{key}=([\w-]+)")
        for name, key in (("source", "source"), ("start", "start"), ("dataset", "dataset"))
    }
    return values.with_columns(**parts).with_columns(pl.col("start").fill_null("default"))


def values_beside(table: pl.DataFrame) -> pl.DataFrame:
    """Ours beside the published values that run here.

    Args:
        table: Records of runs of ``PUBLISHED``.

    Returns:
        One row a point, on any data: mean and standard deviation of ours, "value", "tolerance", "runs_here", and
        "same", which is true where the data are those that the value is of.
    """
    cells = summary(_ours(table), "ours", by=["source", "dataset", "rule", "start"])
    values = _named().select("source", "rule", "start", "value", "tolerance", "runs_here", stated="dataset")
    return cells.join(values, on=["source", "rule", "start"]).with_columns(same=pl.col("dataset") == pl.col("stated"))


def _matches(table: pl.DataFrame) -> Evidence:
    cells = values_beside(table).filter("same").sort("source", "rule", "start")
    if cells.is_empty():
        raise Missing("none of these runs is on the data that the published values are of")
    return Evidence(
        checks=tuple(
            Check(
                label=f"{row['rule']}, {row['start']} start, {row['dataset']}: ours less {row['value']:g}",
                measured=row["mean"] - row["value"],
                low=-row["tolerance"],
                high=row["tolerance"],
            )
            for row in cells.to_dicts()
        ),
        note=f"{cells['runs'].min()} seeds a point",
    )


def _claim(name: str, source: str, statement: str, reference: str) -> Claim:
    return Claim(
        name=name,
        statement=statement,
        origin="paper",
        reference=reference,
        method="Mean over the seeds of our test accuracy, trained as the source states it, less the published value, "
        "in points.",
        tolerance_reason="The tolerances of published.csv, set before the runs: single seeds, a training rate or a "
        "start that is not stated, and, for direct feedback through convolutions, feedback of another form.",
        read=_matches,
        scope=pl.col("source") == source,
    )


def _draw(data: pl.DataFrame) -> Figure:
    """Ours, dots, beside what was published, bars as long as the tolerance; a panel a source."""
    parts = each_of(data, "source")
    figure, axes = panels(
        len(parts),
        titles=[f"{source}: {_STATED[source]}" for source, _ in parts],
        xlabels=["test accuracy, %"],
        width=9.0,
        height=3.2,
    )
    for panel, (_, part) in zip(axes, parts, strict=True):
        part = part.sort("value", "dataset")
        names = [
            f"{row['rule']}{'' if row['start'] == 'default' else ', ' + row['start']}"
            + ("" if row["same"] else f" ({row['dataset']})")
            for row in part.to_dicts()
        ]
        for at, row in enumerate(part.to_dicts()):
            panel.errorbar(row["value"], at, xerr=row["tolerance"], color=AXIS, linewidth=5, alpha=0.6)
            panel.plot(row["value"], at, "|", color=INK, markersize=9)
            colour = COLOURS[0] if row["same"] else AXIS
            panel.errorbar(row["mean"], at, xerr=row["sd"] or 0, marker="o", color=colour, linestyle="none")
        panel.set_yticks(range(part.height), names)
    return figure


_BIOTORCH = ("bp", "fa", "dfa", "usf", "brsf", "frsf")


def _points(
    source: str,
    datasets: tuple[str, ...],
    *,
    epochs: dict[str, int],
    images: int = 0,
    some: tuple[str, ...] = _BIOTORCH,
) -> tuple[Point, ...]:
    """All points of a source; of biotorch's rules those that are named."""
    starts = {"bp": ("default",), "dfa": ("zero", "xavier")}
    rules = some if source == "biotorch" else tuple(starts)
    return tuple(
        point
        for dataset in datasets
        for rule in rules
        for point in grid(
            source=source,
            dataset=dataset,
            rule=rule,
            start="default" if source == "biotorch" else starts[rule],
            epochs=epochs[dataset],
            images=images,
        )
    )


_UPDATES = {"mnist": 6, "mnist-10k": 47, "digits": 100}
"""Epochs of dfa-stall, so that there are about 6,000 updates."""

PUBLISHED = Experiment(
    name="benchmark.published",
    title="Published values, run as their sources state them",
    source="biotorch, Benchmarks.md; DFA-Stall, records E19",
    revision=1,
    grid={
        "smoke": (
            *_points("biotorch", ("digits",), epochs={"digits": 1}, images=128, some=("bp", "dfa")),
            *_points("dfa-stall", ("digits",), epochs={"digits": 1}, images=128),
        ),
        "quick": (
            *_points("biotorch", ("digits",), epochs={"digits": 4}),
            *_points("dfa-stall", ("digits",), epochs={"digits": 4}),
        ),
        "paper": (
            *_points("biotorch", ("fashion-mnist",), epochs={"fashion-mnist": 100}),
            *_points("dfa-stall", ("mnist", "mnist-10k"), epochs=_UPDATES),
        ),
    },
    seeds={"smoke": 1, "quick": 2, "paper": 3},
    run=_run,
    at_most=1,
    cost=lambda *, source, epochs: float(epochs) * (1.0 if source == "biotorch" else 0.5),
    agreement=1e-3,
    pictures=(
        Picture(
            name="published",
            caption="Our test accuracy (dots, mean ± standard deviation over the seeds; grey where the data are "
            "others) beside the published value (stroke) with the tolerance that was set for it (bar).",
            data=values_beside,
            draw=_draw,
        ),
    ),
    claims=(
        _claim(
            "biotorch-fashion",
            "biotorch",
            "LeNet on Fashion-MNIST has 90.8 % by bp, 86.9 by fa, 87.2 by dfa, 90.3 by usf, 90.0 by brsf and 90.4 by "
            "frsf.",
            "biotorch, Benchmarks.md, errors of single seeds at the best epoch on the test images; the network is its "
            "code's",
        ),
        _claim(
            "dfa-stall-mnist",
            "dfa-stall",
            "A tanh perceptron 784-800-800-800-10 on MNIST has 97.44 % by bp, 97.31 by dfa from zero weights and 97.25 "
            "from Xavier's, after 6,000 updates.",
            "DFA-Stall, records E19 and their configuration",
        ),
    ),
)
