"""What a run works with: the learner, the images, and the images on which angles are measured."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from falign.lab.batches import Images, prepare, probe
from falign.lab.config import TrainConfig
from falign.lab.data import load
from falign.lab.divergence import Start, norms
from falign.lab.law import forewarning
from falign.lab.learner import Learner, make
from falign.lab.provenance import fingerprint


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """Everything that a configuration stands for.

    Attributes:
        learner: The network before its first step.
        train: Training images.
        test: Test images.
        x: Images on which the angles are measured.
        y: Their labels.
        start: What a run that runs away is told by.
        data_sha256: Checksum of all images and labels.
        description: Data, network and rule in a few words, one line each.
    """

    learner: Learner
    train: Images
    test: Images
    x: Tensor
    y: Tensor
    start: Start
    data_sha256: str
    description: tuple[str, ...]


def settle(config: TrainConfig, *, data: Path | None, progress: bool) -> Setting:
    """Load the data and make the network.

    Args:
        config: The completed configuration.
        data: Folder of the data sets; None is what ``FALIGN_DATA`` names, then the cache.
        progress: Whether to show bars while loading.

    Returns:
        The setting.

    Raises:
        DataError: The data are missing or damaged.
        ConfigError: Data, network and rule do not fit each other.
    """
    loaded = load(config.dataset, folder=data, progress=progress)
    device = torch.device(config.device)
    train, test = prepare(loaded, device=device, dtype=getattr(torch, config.dtype))
    x, y = train.take(probe(config.seed, len(train), config.probe_size).to(device))
    learner = make(
        config,
        shape=loaded.shape,
        classes=len(loaded.classes),
        example=x[:2],
        sizes=_sizes(len(train), config.batch_size),
    )
    size = "×".join(map(str, loaded.shape))
    return Setting(
        learner=learner,
        train=train,
        test=test,
        x=x,
        y=y,
        start=Start(classes=len(loaded.classes), norms=norms(learner.model, learner.layers)),
        data_sha256=fingerprint(loaded),
        description=(
            f"{loaded.name}: {len(train):,} training and {len(test):,} test images of {size}, "
            f"{len(loaded.classes)} classes",
            *loaded.notes,
            *_described(learner),
        ),
    )


def _sizes(images: int, batch: int) -> set[int]:
    """Of the batches of an epoch."""
    return {min(batch, images), images % batch or min(batch, images)}


def _described(learner: Learner) -> list[str]:
    config = learner.config
    weights = sum(part.numel() for name, part in learner.model.named_parameters() if "feedback" not in name.split("."))
    momentum = f", momentum {config.momentum:g}" if config.momentum is not None else ""
    lines = [
        f"{config.model}: {weights:,} parameters; rule {config.rule}; {config.optimizer}, learning rate "
        f"{config.learning_rate:g}{momentum}, batches of {config.batch_size}; {config.device}, {config.dtype}"
    ]
    lines += learner.notes
    if config.rule == "kp" and not config.weight_decay:
        lines.append("kp without --weight-decay: the feedback moves, but never meets the weights")
    if config.check_law and (warning := forewarning(config)):
        lines.append(warning)
    return lines
