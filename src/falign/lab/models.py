"""The networks of ``--model``: perceptrons, LeNet-5, ResNet-20, and the user's own."""

import importlib
import inspect
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import nn

from falign.feedback import generator
from falign.lab.config import ConfigError
from falign.lab.resnet import ResNet20

Shape = tuple[int, int, int]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
    "gelu": nn.GELU,
}


def build(model: str, *, shape: Shape, classes: int, seed: int, activation: str | None = None) -> nn.Module:
    """The network that a text names, its weights drawn from a generator of their own.

    Args:
        model: ``mlp:SIZES``, ``lenet``, ``resnet20`` or ``package.module:factory``.
        shape: Channels, height and width of the images.
        classes: Number of classes.
        seed: Of the weights; the same seed gives the same weights whatever else was drawn before.
        activation: A name of ``ACTIVATIONS``, for ``mlp`` and ``lenet``; None is relu.

    Returns:
        The network, float32 on the CPU, from (batch, channels, height, width) to (batch, classes).

    Raises:
        ConfigError: There is no such network, or it does not fit the data.
    """
    between = ACTIVATIONS[activation or "relu"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "", "weights").initial_seed())
        if model.startswith("mlp:"):
            return _mlp(model, shape, classes, between)
        if model == "lenet":
            return _lenet(shape, classes, between)
        if model == "resnet20":
            return ResNet20(shape[0], classes)
        return _own(model, shape, classes)


def _mlp(model: str, shape: Shape, classes: int, between: Callable[[], nn.Module]) -> nn.Module:
    """Linear layers fc1, fc2, … with an activation after all but the last; PyTorch's own initial weights."""
    if not re.fullmatch(r"mlp:[1-9]\d*(-[1-9]\d*)+", model):
        raise ConfigError(f"--model is {model!r}, expected sizes like mlp:784-1000-10: inputs, hidden layers, classes")
    sizes = [int(size) for size in model.removeprefix("mlp:").split("-")]
    if (sizes[0], sizes[-1]) != (prod(shape), classes):
        hidden = "".join(f"-{size}" for size in sizes[1:-1])
        raise ConfigError(
            f"--model {model} goes from {sizes[0]} numbers to {sizes[-1]}, but the data are "
            f"{'×'.join(map(str, shape))} = {prod(shape)} pixels in {classes} classes: "
            f"use mlp:{prod(shape)}{hidden}-{classes}"
        )
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(pairwise(sizes), 1):
        parts[f"fc{number}"] = nn.Linear(before, after)
        if number < len(sizes) - 1:
            parts[f"act{number}"] = between()
    return nn.Sequential(parts)


def _lenet(shape: Shape, classes: int, between: Callable[[], nn.Module]) -> nn.Module:
    """LeNet-5 with max pooling, all maps connected, and a linear output in place of radial basis functions.

    Images below 32 × 32 are padded by two pixels a side in the first convolution, as 28 × 28 digits were.

    Source: LeCun, Bottou, Bengio and Haffner 1998 (Proceedings of the IEEE), section II.B.
    """
    channels, *sides = shape
    if min(sides) < 12:
        raise ConfigError(f"--model lenet needs images of at least 12×12, the data are {sides[0]}×{sides[1]}: use mlp")
    pad = 2 if min(sides) < 32 else 0
    left = [((side + 2 * pad - 4) // 2 - 4) // 2 for side in sides]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5, padding=pad),
        act1=between(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        act2=between(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * prod(left), 120),
        act3=between(),
        fc2=nn.Linear(120, 84),
        act4=between(),
        fc3=nn.Linear(84, classes),
    )
    return nn.Sequential(parts)


def _own(model: str, shape: Shape, classes: int) -> nn.Module:
    """What ``package.module:factory`` returns, called with what it takes of ``shape`` and ``classes``."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", model):
        raise ConfigError(
            f"--model is {model!r}, expected mlp:SIZES, lenet, resnet20 or package.module:factory: "
            "see falign train --help"
        )
    factory = _imported(model)
    known = {"shape": shape, "classes": classes}
    try:
        taken = inspect.signature(factory).parameters
        given = {key: value for key, value in known.items() if key in taken or _takes_any(taken)}
        inspect.signature(factory).bind(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--model {model} cannot be called with shape= and classes=, or without arguments: {error}"
        ) from None
    try:
        made = factory(**given)
    except Exception as error:
        raise ConfigError(f"--model {model} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"--model {model} returned a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _imported(model: str) -> Callable[..., object]:
    module, _, path = model.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # `python -m` has the working folder there, an installed command has not
    try:
        found: object = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ConfigError(f"--model {model} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"--model {model} is a {type(found).__name__}, expected a function or class to call")
    return found


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
