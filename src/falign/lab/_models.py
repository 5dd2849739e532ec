"""The networks of ``--model``: perceptrons, LeNet-5, ResNet-20, and the user's own."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from falign._preserve import seeded
from falign.feedback import generator
from falign.lab import _own_models
from falign.lab._memory import GIB, available
from falign.lab._own_models import Shape
from falign.lab._validate import check_model
from falign.lab.config import ConfigError

_LAYERS = 10_000
"""Layers that an mlp may have."""
_DIGITS = 12
"""Digits that the size of a layer may have: no memory holds larger ones."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
    "gelu": nn.GELU,
}


def build(
    model: str, *, shape: Shape, classes: int, seed: int, activation: str | None = None, room: int = 4
) -> nn.Module:
    """Build the network that a text names, its weights drawn from a generator of their own.

    While it is made, Python's and NumPy's global generators start from the seed too.

    Args:
        model: ``mlp:SIZES``, ``lenet``, ``resnet20`` or ``package.module:factory``.
        shape: Channels, height and width of the images.
        classes: Number of classes.
        seed: Seed of the weights; the same seed gives the same weights whatever was drawn before.
        activation: A name of ``ACTIVATIONS``, for ``mlp`` and ``lenet``; None is relu.
        room: Bytes that a run needs for each weight.

    Returns:
        The network, float32 on the CPU, from (batch, channels, height, width) to (batch, classes).

    Raises:
        ConfigError: There is no such network, it does not fit the data, or no memory holds it.
    """
    check_model(model)
    between = ACTIVATIONS[activation or "relu"]
    with seeded(generator(seed, "", "weights").initial_seed()):
        if model.startswith("mlp:"):
            return _mlp(model, shape, classes, between, room)
        if model == "lenet":
            return _lenet(shape, classes, between, room)
        if model == "resnet20":
            return ResNet20(shape[0], classes)
        return _own_models.make_model(model, shape, classes)


def is_own(model: str) -> bool:
    """Tell whether a text names a network of the user's own."""
    return model not in ("lenet", "resnet20") and not model.startswith("mlp:")


def _refuse_large(model: str, weights: int, room: int) -> None:
    memory = available()
    if weights * room > memory:
        raise ConfigError(
            f"--model {model if len(model) < 80 else model[:80] + '…'} has {weights:,} weights, for which a run needs "
            f"{weights * room / GIB:,.3g} GiB of memory, and this machine has {memory / GIB:.3g}: use smaller layers"
        )


def _mlp(model: str, shape: Shape, classes: int, between: Callable[[], nn.Module], room: int) -> nn.Module:
    """Linear layers fc1, fc2, … with an activation after all but the last; PyTorch's own initial weights."""
    parts = model.removeprefix("mlp:").split("-")
    longest = max(parts, key=len)
    if len(parts) > _LAYERS or len(longest) > _DIGITS:
        much = f"{len(parts) - 1:,} layers" if len(parts) > _LAYERS else f"a layer of {longest[:_DIGITS]}… neurons"
        raise ConfigError(f"--model {model[:40]}… has {much}: no memory holds that, use fewer or smaller layers")
    sizes = [int(size) for size in parts]
    if (sizes[0], sizes[-1]) != (prod(shape), classes):
        hidden = "".join(f"-{size}" for size in sizes[1:-1])
        raise ConfigError(
            f"--model {model} goes from {sizes[0]} numbers to {sizes[-1]}, but the data are "
            f"{'×'.join(map(str, shape))} = {prod(shape)} pixels in {classes} classes: "
            f"use mlp:{prod(shape)}{hidden}-{classes}"
        )
    _refuse_large(model, sum((before + 1) * after for before, after in pairwise(sizes)), room)
    made: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, after) in enumerate(pairwise(sizes), 1):
        made[f"fc{number}"] = nn.Linear(before, after)
        if number < len(sizes) - 1:
            made[f"act{number}"] = between()
    return nn.Sequential(made)


def _lenet(shape: Shape, classes: int, between: Callable[[], nn.Module], room: int) -> nn.Module:
    """LeNet-5 with max pooling, all maps connected, and a linear output in place of radial basis functions.

    Images below 32 × 32 are padded by two pixels a side in the first convolution, as 28 × 28 digits were.

    Source: LeCun, Bottou, Bengio and Haffner 1998 (Proceedings of the IEEE), section II.B.
    """
    channels, *sides = shape
    if min(sides) < 12:
        raise ConfigError(f"--model lenet needs images of at least 12×12, the data are {sides[0]}×{sides[1]}: use mlp")
    pad = 2 if min(sides) < 32 else 0
    left = [((side + 2 * pad - 4) // 2 - 4) // 2 for side in sides]
    _refuse_large("lenet", 120 * 16 * prod(left), room)
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


# ResNet-20 for small images.


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut without parameters.

    ``y = relu(s + bn(conv(relu(bn(conv(x))))))``. The shortcut s is x, or where the block widens and halves,
    every other pixel of x with channels of zeros on both sides (option A). It carries the error by autograd.

    Args:
        channels: Channels of x.
        width: Channels of y.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width == channels else 2
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.added = width - channels

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same, or to half the height and width."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            low = self.added // 2
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, low, self.added - low))
        return torch.relu(x + y)


class ResNet20(nn.Module):
    """A convolution, three stages of three blocks with 16, 32 and 64 channels, mean over positions, linear.

    Args:
        channels: Channels of the images, of any size.
        classes: Numbers of the output.

    Source: He, Zhang, Ren and Sun 2016 (CVPR), section 4.2, n = 3, option A; weights as in He et al. 2015.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(ResidualBlock(16, 16), ResidualBlock(16, 16), ResidualBlock(16, 16))
        self.stage2 = nn.Sequential(ResidualBlock(16, 32), ResidualBlock(32, 32), ResidualBlock(32, 32))
        self.stage3 = nn.Sequential(ResidualBlock(32, 64), ResidualBlock(64, 64), ResidualBlock(64, 64))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, classes)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))
