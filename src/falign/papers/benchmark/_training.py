"""One run of the table: a row's learning rate tuned on validation images, the test set looked at once, and the cost."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from falign.lab._batches import Images, keep_apart, label_loss, order, prepare, probe
from falign.lab._divergence import is_finite
from falign.lab._learner import Learner, make_learner
from falign.lab._tune import optuna, search
from falign.lab._validate import resolve
from falign.lab.config import TrainConfig
from falign.lab.data import Dataset
from falign.lab.experiment import Setting
from falign.measure import alignment
from falign.papers._images import load_images
from falign.papers.benchmark._steps import Steps
from falign.rules import ALL_RULES

# The rows and the networks.

BATCH, MOMENTUM, RATE_DECAY = 64, 0.9, 0.6
"""Of every training: stochastic gradient descent, its rate times 0.6 after every epoch."""
LADDER = (0.03, 0.01, 0.1)
"""Learning rates with which every study begins."""
RATES = (1e-3, 0.3)
"""Between which it then searches, on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: a rule, and what is done to it.

    Attributes:
        rule: Its name.
        kind: "bp", "layerwise", "learned direct", "fixed", "transport" of rules that read the weights or their signs,
            at every step or now and then, or "reference".
        transform: Of the error that is carried on; None for none.
        decay: Weight decay, of rules whose feedback would never meet the weights without.
        calibrate: One step in so many is backpropagated truly; 0 for none.
    """

    rule: str
    kind: str
    transform: str | None = None
    decay: float = 0.0
    calibrate: int = 0


_ALL = {
    "bp": Row(rule="bp", kind="bp"),
    "kp": Row(rule="kp", kind="layerwise", decay=1e-3),
    "pfa": Row(rule="pfa", kind="layerwise", decay=1e-3),
    "wm": Row(rule="wm", kind="layerwise"),
    "usf": Row(rule="usf", kind="transport"),
    "adafa": Row(rule="adafa", kind="transport"),
    "dkp": Row(rule="dkp", kind="learned direct"),
    "dkp+centred": Row(rule="dkp", kind="learned direct", transform="centred"),
    "probe": Row(rule="probe", kind="learned direct"),
    "probe+centred": Row(rule="probe", kind="learned direct", transform="centred"),
    "ldfa": Row(rule="ldfa", kind="learned direct", decay=1e-3),
    "ebd": Row(rule="ebd", kind="learned direct"),
    "fdfa": Row(rule="fdfa", kind="learned direct"),
    "grape": Row(rule="grape", kind="learned direct"),
    "dfa": Row(rule="dfa", kind="fixed"),
    "dfa+centred": Row(rule="dfa", kind="fixed", transform="centred"),
    "fa": Row(rule="fa", kind="fixed"),
    "afa": Row(rule="afa", kind="fixed"),
    "dfa+calibrated": Row(rule="dfa", kind="transport", calibrate=100),
    "shallow": Row(rule="shallow", kind="reference"),
    "frozen": Row(rule="frozen", kind="reference"),
}
ROWS: Mapping[str, Row] = MappingProxyType({name: row for name, row in _ALL.items() if row.rule in ALL_RULES})
"""Name -> row, of those whose rule the package has."""


def rows_of(*kinds: str) -> tuple[str, ...]:
    """Names of the rows of some kinds."""
    return tuple(name for name, row in ROWS.items() if row.kind in kinds)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the table.

    Attributes:
        title: Its name in pictures.
        model: As ``falign train --model`` takes it, with a place for the width; "mlp:{0}-{0}" has hidden layers only.
        activation: Between its layers; None where it has no choice.
        width: Of hidden layers, at the preset ``paper``; 0 where it is fixed.
        epochs: Of a training, likewise.
        cost: Seconds of a step, roughly, relative to the perceptron's.
    """

    title: str
    model: str
    activation: str | None = None
    width: int = 0
    epochs: int = 4
    cost: float = 1.0


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "mlp": Network(title="two hidden layers, ReLU", model="mlp:{0}-{0}", activation="relu", width=1000, epochs=10),
        "lenet": Network(title="LeNet, tanh, average pooling", model="lenet-average", activation="tanh"),
        "lenet-relu": Network(title="LeNet, ReLU, max pooling", model="lenet", activation="relu"),
        "lenet-norm": Network(title="LeNet, batch norm, ReLU", model="lenet-norm", activation="relu"),
        "resnet": Network(title="ResNet-8", model="resnet8", cost=4.0),
        "residual": Network(title="residual MLP, pre-LN", model="residual:width={0}", activation="relu", width=256),
    }
)
"""Name -> network."""
SMALLEST = 12
"""Pixels a side below which images are shown to LeNet at twice their size."""

# Their trainings.

PROBE = 256
"""Training images on which alignment is measured."""
_LOOK = 50
"""Steps after which it is looked whether the loss is still a number: looking waits for the device."""
_PIECE, _PIECES = 20, 3
"""Steps that are timed at once, in turn with as many of backpropagation, and how often."""


class Split(NamedTuple):
    """The images of a run on its device, normalised by the mean and deviation of those that are trained on."""

    shape: tuple[int, ...]
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images


def split_images(dataset: str, setting: Setting, *, images: int, enlarged: bool) -> Split:
    """Load a data set and keep validation images apart, the same ones for all runs.

    Args:
        dataset: Its name.
        setting: Device and folder.
        images: Training images that are used, before the validation images are kept apart; 0 is all.
        enlarged: Whether every pixel becomes 2 × 2.

    Returns:
        The parts.

    Raises:
        DataError: The data set is not here, or has fewer images.
    """
    load_images(dataset, setting)  # where it is absent that is said each time, and nothing is kept
    return _split(dataset, setting.data, setting.device, images, enlarged)


@lru_cache(maxsize=1)  # the runs that a process computes one after the other mostly have the same data
def _split(dataset: str, folder: Path | None, device: str, images: int, enlarged: bool) -> Split:
    data = load_images(dataset, Setting(data=folder))
    if enlarged:
        train, test = (each.repeat_interleave(2, -1).repeat_interleave(2, -2) for each in _pixels(data))
        data = replace(data, train_images=train, test_images=test)
    kept, other = keep_apart(data, images)
    place = torch.device(device)
    train, test = prepare(kept, device=place, dtype=torch.float32)
    _, validation = prepare(other, device=place, dtype=torch.float32)
    return Split(shape=data.shape, classes=data.classes, train=train, validation=validation, test=test)


def _pixels(data: Dataset) -> tuple[Tensor, Tensor]:
    return data.train_images, data.test_images


def needs_enlarging(network: str, dataset: str, setting: Setting) -> bool:
    """Tell whether the images are too small for a network that has two convolutions of 5 × 5."""
    small = min(load_images(dataset, setting).shape[1:]) < SMALLEST
    return NETWORKS[network].model.startswith("lenet") and small


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the table with a seed: all that is the same in the trials of its study.

    Attributes:
        dataset: Name of the data set.
        network: A name of ``NETWORKS``.
        row: A name of ``ROWS``.
        width: Of its hidden layers, where that is not fixed.
        epochs: Of a training.
        seed: Of weights, feedback and batches.
        device: A torch device.
        split: The images.
    """

    dataset: str
    network: str
    row: str
    width: int
    epochs: int
    seed: int
    device: str
    split: Split

    def learner(self, rate: float) -> Learner:
        """Make the network, converted, with its optimizer."""
        row, network, images = ROWS[self.row], NETWORKS[self.network], self.split
        model = network.model.format(self.width)
        if model.startswith("mlp:"):
            model = f"mlp:{prod(images.shape)}-{model.removeprefix('mlp:')}-{len(images.classes)}"
        config = resolve(
            TrainConfig(
                dataset=self.dataset,
                model=model,
                activation=network.activation,  # pyright: ignore[reportArgumentType]  # it is one of them
                epochs=self.epochs,
                rule=row.rule,
                transform=row.transform,
                calibrate=row.calibrate,
                learning_rate=rate,
                rate_decay=RATE_DECAY,
                momentum=MOMENTUM,
                weight_decay=row.decay,
                batch_size=BATCH,
                seed=self.seed,
                device=self.device,
            )
        )
        example, _ = images.train.take(slice(0, 2))
        return make_learner(config, shape=images.shape, classes=len(images.classes), example=example)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Positions of the images of an epoch's batches, the same for all rows of a seed.

        A last batch of a single image, which batch normalisation cannot take, is left out.
        """
        images = order(self.seed, epoch, len(self.split.train)).to(self.split.train.labels.device)
        return (batch for batch in images.split(BATCH) if len(batch) > 1)


class Trained(NamedTuple):
    """A trained network, and whether its steps were replayed."""

    learner: Learner
    recorded: bool


def train(cell: Cell, rate: float, *, graphs: bool = True) -> Trained | None:
    """Train a network; None where it leaves the finite numbers.

    Nothing waits for the device but a look at the loss now and then; see :mod:`falign.papers.benchmark._steps`.

    Args:
        cell: The cell.
        rate: Learning rate.
        graphs: Whether steps on a GPU may be recorded and replayed.
    """
    learner, done = cell.learner(rate), 0
    steps = Steps(learner, cell.split.train, BATCH, graphs=graphs)
    with steps.at_work():
        for epoch in range(cell.epochs):
            steps.begin_epoch(epoch)
            for batch in cell.batches(epoch):
                steps.make(batch, done)
                done += 1
                if done % _LOOK == 0 and not bool(torch.isfinite(steps.total)):
                    return None
        steps.finish()
        if not bool(torch.isfinite(steps.total)):
            return None
    x, y = cell.split.train.take(next(cell.batches(cell.epochs)))
    finite = is_finite(learner.model) and learner.has_finite_loss(x, y)
    return Trained(learner, steps.recorded) if finite else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training of a study.

    Attributes:
        rate: Its learning rate.
        validation: Its accuracy on the validation images; None if it diverged.
    """

    rate: float
    validation: float | None


def tune(
    trials: int, seed: int, attempt: Callable[[float], tuple[float, Any] | None]
) -> tuple[list[Trial], int | None, Any]:
    """Search the learning rate of the best validation accuracy: the rates of a ladder, then TPE.

    Args:
        trials: Trainings, the same number for every row.
        seed: Of the search.
        attempt: Rate -> validation accuracy and the trained network; None if the training diverged.

    Returns:
        All trials, the number of the best one, None if all diverged, and its network.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    library = optuna("the benchmark tunes every row")
    study = library.create_study(
        direction="maximize", sampler=library.samplers.TPESampler(seed=seed, n_startup_trials=len(LADDER))
    )
    for rate in LADDER[:trials]:
        study.enqueue_trial({"rate": rate})
    kept: list[Trial] = []

    def one(asked: Any) -> tuple[float, Any] | None:
        rate = float(asked.suggest_float("rate", *RATES, log=True))
        result = attempt(rate)
        kept.append(Trial(rate=rate, validation=None if result is None else result[0]))
        return result

    best, network = search(study, trials, one)
    return kept, best, network


def end_columns(cell: Cell, learner: Learner) -> dict[str, float | int | None]:
    """Columns of a trained network: mean cosine of the hidden layers to the true gradient, and growth.

    Layers whose cosine rests on rounding, or that take no gradient, are no part of the mean; None if there is no other.
    Growth is the largest |h_{l+1}| / |h_l| of a block, or of a layer where the network has no row of blocks.
    """
    x, y = cell.split.train.take(probe(cell.seed, len(cell.split.train), PROBE).to(cell.split.train.labels.device))
    report = alignment(learner.model, label_loss, x, y)
    hidden = [row for row in report.layers if row.layer != learner.layers[-1]]
    learning = {name.rpartition(".")[0] for name, each in learner.model.named_parameters() if each.requires_grad}
    cosines = [row.cosine for row in hidden if row.cosine is not None and row.layer in learning]
    growths = list(report.growth.values()) or [row.growth for row in report.layers if row.growth is not None]
    return {
        "cosine": sum(cosines) / len(cosines) if cosines else None,
        "unreadable": report.unreadable,
        "growth": max(growths, default=None),
    }


def cost_columns(cell: Cell, *, pieces: int = _PIECES, length: int = _PIECE) -> dict[str, float | int]:
    """Columns of what a training step costs, on networks of their own before their first step.

    Seconds are medians of a few pieces of steps, by turns of the row and of backpropagation in one process, so that
    both meet the same load; floating-point operations are counted, those of passes between steps shared out among
    the steps; bytes are those of the tensors that autograd keeps for the backward pass, weights left out.

    Args:
        cell: The cell.
        pieces: Pieces of each.
        length: Steps of a piece.
    """
    row = cell.learner(LADDER[1])
    true = replace(cell, row="bp").learner(LADDER[1])
    x, y = cell.split.train.take(next(cell.batches(0)))
    columns = {
        "flops": _flops(row, x, y),
        "bp_flops": _flops(true, x, y),
        "kept_bytes": _kept(row, x, y),
        "bp_kept_bytes": _kept(true, x, y),
    }
    seconds: dict[str, list[float]] = {"step_seconds": [], "bp_step_seconds": []}
    for _ in range(pieces):
        for name, learner in zip(seconds, (row, true), strict=True):
            seconds[name].append(_time(learner, x, y, length))
    return {**columns, **{name: median(values) for name, values in seconds.items()}}


def _time(learner: Learner, x: Tensor, y: Tensor, length: int) -> float:
    """Seconds of a step."""
    _wait(x)
    begin = perf_counter()
    for done in range(length):
        learner.propagate(x, y, done)
        learner.update(done)
    _wait(x)
    return (perf_counter() - begin) / length


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _flops(learner: Learner, x: Tensor, y: Tensor) -> float:
    """Floating-point operations of a step on average, without the optimizer's."""

    def count(done: int) -> int:
        with FlopCounterMode(display=False) as counter:
            learner.propagate(x, y, done)
        return counter.get_total_flops()

    config, plain = learner.config, count(1)
    sometimes = ((config.mirror_every, 0), (config.follow_every, 0), (config.calibrate, config.calibrate - 1))
    return float(plain + sum((count(done) - plain) / every for every, done in sometimes if every))


def _kept(learner: Learner, x: Tensor, y: Tensor) -> int:
    """Bytes of the tensors that autograd keeps in a forward pass, each once, without parameters and their feedback."""
    state = (*learner.model.parameters(), *learner.model.buffers())
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in state}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        learner.propagate(x, y, 1)
    return sum(kept.values())
