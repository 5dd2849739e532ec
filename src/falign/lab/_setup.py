"""Preparation of a run: the converted network, the data, and the part of them on which angles are measured."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from falign.lab._batches import Samples, cut, keep_apart, prepare, probe
from falign.lab._divergence import Baseline, weight_norms, weighted_layers
from falign.lab._learner import Learner, make_learner, required
from falign.lab._own_models import Shape, make_dataset
from falign.lab._provenance import fingerprint
from falign.lab._validate import is_code, make_rule
from falign.lab.config import TrainConfig, is_text, rule_title
from falign.lab.data import load, load_text


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """Everything that a configuration stands for.

    Attributes:
        learner: The network before its first step.
        train: What is trained on.
        validation: What is measured beside the test, of a text; None of images.
        test: What is tested on.
        probe_inputs: Part of it on which the angles are measured: images, ``(probe, channels, height, width)``, or
            texts, ``(probe, context)``.
        probe_labels: Their labels, ``(probe,)`` or ``(probe, context)``.
        baseline: Loss and weights before the first step, by which a runaway training is recognised.
        data_sha256: Checksum of all images and labels, or of the text.
        description: Data, network and rule in a few words, one line each.
    """

    learner: Learner
    train: Samples
    validation: Samples | None
    test: Samples
    probe_inputs: Tensor
    probe_labels: Tensor
    baseline: Baseline
    data_sha256: str
    description: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last one may be smaller."""
        return -(-len(self.train) // self.learner.config.batch_size)


def prepare_run(config: TrainConfig, *, data: Path | None, progress: bool, parts: "Parts | None" = None) -> Setup:
    """Load the data and make the network.

    Args:
        config: The resolved configuration.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        progress: Whether to show bars while loading.
        parts: The data, where they are loaded already.

    Returns:
        The setup.

    Raises:
        DataError: The data are missing or damaged.
        ConfigError: Data, network and rule do not fit each other.
    """
    parts = parts or load_parts(config, data, progress=progress)
    train = parts.train
    probe_inputs, probe_labels = train.take(probe(config.seed, len(train), config.probe_size).to(config.device))
    learner = make_learner(
        config,
        shape=parts.shape,
        classes=parts.classes,
        example=probe_inputs[:2],
        sizes=_batch_sizes(len(train), config.batch_size),
    )
    return Setup(
        learner=learner,
        train=train,
        validation=parts.validation,
        test=parts.test,
        probe_inputs=probe_inputs,
        probe_labels=probe_labels,
        baseline=Baseline(
            classes=parts.classes, weight_norms=weight_norms(learner.model, weighted_layers(learner.model))
        ),
        data_sha256=parts.sha256,
        description=(*parts.description, *_describe(learner)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Parts of a data set, images or text, as a training takes them; see :class:`Setup`."""

    train: Samples
    validation: Samples | None = None
    test: Samples
    shape: Shape
    classes: int
    sha256: str
    description: tuple[str, ...]


def load_parts(config: TrainConfig, data: Path | None, *, progress: bool, apart: bool = False) -> Parts:
    """Load the data of a configuration.

    Args:
        config: The resolved configuration.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        progress: Whether to show bars while loading.
        apart: Whether validation images are kept apart from those for training, as a text always has some.

    Raises:
        DataError: The data are missing or damaged.
    """
    return _text(config) if is_text(config.dataset) else _images(config, data, progress, apart)


def _images(config: TrainConfig, data: Path | None, progress: bool, apart: bool) -> Parts:
    if is_code(config.dataset):
        dataset = make_dataset(config.dataset, data)
    else:
        dataset = load(config.dataset, folder=data, progress=progress)
    place, dtype = torch.device(config.device), getattr(torch, config.dtype)
    validation, digest = None, fingerprint(dataset)
    if apart:
        dataset, other = keep_apart(dataset)
        _, validation = prepare(other, device=place, dtype=dtype)
    train, test = prepare(dataset, device=place, dtype=dtype)
    size = "×".join(map(str, dataset.shape))
    kept = "" if validation is None else f", {len(validation):,} validation"
    return Parts(
        train=train,
        validation=validation,
        test=test,
        shape=dataset.shape,
        classes=len(dataset.classes),
        sha256=digest,
        description=(
            f"{dataset.name}: {len(train):,} training{kept} and {len(test):,} test images of {size}, "
            f"{len(dataset.classes)} classes",
            *dataset.notes,
        ),
    )


def _text(config: TrainConfig) -> Parts:
    text, context = load_text(config.dataset), required(config.context)
    train, validation, test = cut(text, context=context, device=torch.device(config.device))
    return Parts(
        train=train,
        validation=validation,
        test=test,
        shape=(context,),
        classes=len(text.vocabulary),
        sha256=text.sha256,
        description=(
            f"{text.name}: {len(text.train):,} training, {len(text.validation):,} validation and {len(text.test):,} "
            f"test characters of {len(text.vocabulary)} kinds, in pieces of {context}; perplexity by their frequencies "
            f"alone: {text.unigram_perplexity():.4g}",
            *text.notes,
        ),
    )


def _batch_sizes(number: int, batch: int) -> set[int]:
    """Return the sizes of the batches of an epoch: the full one, and that of the last."""
    return {min(batch, number), number % batch or min(batch, number)}


def _describe(learner: Learner) -> list[str]:
    config = learner.config
    # Feedback that is learned is a parameter too, but none of the network's.
    weights = sum(part.numel() for name, part in learner.model.named_parameters() if "feedback" not in name.split("."))
    momentum = f", momentum {config.momentum:g}" if config.momentum is not None else ""
    lines = [
        f"{config.model}: {weights:,} parameters; rule {rule_title(config)}; {config.optimizer}, learning rate "
        f"{config.learning_rate:g}{momentum}, batches of {config.batch_size}; {config.device}, {config.dtype}"
    ]
    lines += learner.notes
    if make_rule(config).learned and not config.weight_decay:
        lines.append(f"{config.rule} without --weight-decay: the feedback moves, but never meets the weights")
    if config.check_law and (warning := _law_warning(config)):
        lines.append(warning)
    return lines


def _law_warning(config: TrainConfig) -> str:
    """Say under which options the conservation law is not exact; empty if it is."""
    if config.optimizer != "sgd":
        return f"the conservation law is exact under plain SGD: with {config.optimizer} it is reported as a drift"
    if config.momentum:
        return (
            f"the conservation law is exact under plain SGD (--momentum 0): with momentum {config.momentum:g} it drifts"
        )
    return ""
