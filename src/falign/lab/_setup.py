"""Preparation of a run: the converted network, the images, and the images on which angles are measured."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from falign.lab._batches import Images, prepare, probe
from falign.lab._divergence import Baseline, weight_norms
from falign.lab._learner import Learner, make_learner
from falign.lab._provenance import fingerprint
from falign.lab._validate import make_rule
from falign.lab.config import TrainConfig
from falign.lab.data import load


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """Everything that a configuration stands for.

    Attributes:
        learner: The network before its first step.
        train: Training images.
        test: Test images.
        probe_images: Training images on which the angles are measured, ``(probe, channels, height, width)``.
        probe_labels: Their labels, ``(probe,)``.
        baseline: Loss and weights before the first step, by which a runaway training is recognised.
        data_sha256: Checksum of all images and labels.
        description: Data, network and rule in a few words, one line each.
    """

    learner: Learner
    train: Images
    test: Images
    probe_images: Tensor
    probe_labels: Tensor
    baseline: Baseline
    data_sha256: str
    description: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last one may be smaller."""
        return -(-len(self.train) // self.learner.config.batch_size)


def prepare_run(config: TrainConfig, *, data: Path | None, progress: bool) -> Setup:
    """Load the data and make the network.

    Args:
        config: The resolved configuration.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        progress: Whether to show bars while loading.

    Returns:
        The setup.

    Raises:
        DataError: The data are missing or damaged.
        ConfigError: Data, network and rule do not fit each other.
    """
    dataset = load(config.dataset, folder=data, progress=progress)
    device = torch.device(config.device)
    train, test = prepare(dataset, device=device, dtype=getattr(torch, config.dtype))
    probe_images, probe_labels = train.take(probe(config.seed, len(train), config.probe_size).to(device))
    learner = make_learner(
        config,
        shape=dataset.shape,
        classes=len(dataset.classes),
        example=probe_images[:2],
        sizes=_batch_sizes(len(train), config.batch_size),
    )
    size = "×".join(map(str, dataset.shape))
    return Setup(
        learner=learner,
        train=train,
        test=test,
        probe_images=probe_images,
        probe_labels=probe_labels,
        baseline=Baseline(classes=len(dataset.classes), weight_norms=weight_norms(learner.model, learner.layers)),
        data_sha256=fingerprint(dataset),
        description=(
            f"{dataset.name}: {len(train):,} training and {len(test):,} test images of {size}, "
            f"{len(dataset.classes)} classes",
            *dataset.notes,
            *_describe(learner),
        ),
    )


def _batch_sizes(images: int, batch: int) -> set[int]:
    """Return the sizes of the batches of an epoch: the full one, and that of the last."""
    return {min(batch, images), images % batch or min(batch, images)}


def _describe(learner: Learner) -> list[str]:
    config = learner.config
    # Feedback that is learned is a parameter too, but none of the network's.
    weights = sum(part.numel() for name, part in learner.model.named_parameters() if "feedback" not in name.split("."))
    momentum = f", momentum {config.momentum:g}" if config.momentum is not None else ""
    lines = [
        f"{config.model}: {weights:,} parameters; rule {config.rule}; {config.optimizer}, learning rate "
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
