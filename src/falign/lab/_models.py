"""The networks of ``--model``: perceptrons, LeNet-5, ResNets, recurrent ones, transformers, and the user's own."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn

from falign._preserve import seeded
from falign.feedback import generator
from falign.lab import _own_models
from falign.lab._memory import GIB, available
from falign.lab._own_models import Shape
from falign.lab._validate import DIGITS, check_model, is_built_in, sizes
from falign.lab.config import ConfigError

_LAYERS = 10_000
"""Layers that an mlp may have."""
_BLOCKS = 1_000
"""Blocks that a transformer may have, and layers of a recurrent network."""
_EMBEDDING = 0.02
"""Standard deviation of gpt's embeddings before training, that of GPT-2."""

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
        model: A model of ``--model``.
        shape: Channels, height and width of the images; of texts, the characters of a context.
        classes: Number of classes; of texts, characters of the vocabulary.
        seed: Seed of the weights; the same seed gives the same weights whatever was drawn before.
        activation: A name of ``ACTIVATIONS``, for ``mlp``, the kinds of ``lenet``, ``residual``, ``vit`` and ``gpt``;
            None is relu.
        room: Bytes that a run needs for each weight.

    Returns:
        The network, float32 on the CPU, from (batch, channels, height, width) to (batch, classes), or from
        (batch, context) to (batch, context, classes).

    Raises:
        ConfigError: There is no such network, it does not fit the data, or no memory holds it.
    """
    check_model(model)
    between = ACTIVATIONS[activation or "relu"]
    with seeded(generator(seed, "", "weights").initial_seed()):
        if not is_built_in(model):
            return _own_models.make_model(model, shape, classes)
        name = model.partition(":")[0]
        text = len(shape) == 1
        if text and name not in ("gru", "lstm", "gpt"):
            raise ConfigError(f"--model {model} is for images, and the data are a text: use gpt, gru or lstm")
        if name == "gpt" and not text:
            raise ConfigError(f"--model {model} is for text, and the data are images: use vit, gru or lstm")
        if name == "mlp":
            return _mlp(model, shape, classes, between, room)
        if name.startswith("lenet"):
            return _lenet(name, shape, classes, between, room)
        if name in ("resnet8", "resnet20"):
            return ResNet(shape[0], classes, blocks={"resnet8": 1, "resnet20": 3}[name])
        if name == "residual":
            return _residual(model, shape, classes, between, room)
        if name in ("gru", "lstm"):
            return _recurrent(model, shape, classes, room)
        return _transformer(model, shape, classes, between, room)


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
    if len(parts) > _LAYERS or len(longest) > DIGITS:
        much = f"{len(parts) - 1:,} layers" if len(parts) > _LAYERS else f"a layer of {longest[:DIGITS]}… neurons"
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


def _lenet(name: str, shape: Shape, classes: int, between: Callable[[], nn.Module], room: int) -> nn.Module:
    """LeNet-5, all maps connected, and a linear output in place of radial basis functions.

    Images below 32 × 32 are padded by two pixels a side in the first convolution, as 28 × 28 digits were. ``lenet`` has
    maximum pooling, ``lenet-average`` the mean, ``lenet-norm`` maximum pooling and batch normalisation in front of
    each activation.

    Source: LeCun, Bottou, Bengio and Haffner 1998 (Proceedings of the IEEE), section II.B.
    """
    channels, *sides = shape
    if min(sides) < 12:
        raise ConfigError(f"--model {name} needs images of at least 12×12, the data are {sides[0]}×{sides[1]}: use mlp")
    pad = 2 if min(sides) < 32 else 0
    left = [((side + 2 * pad - 4) // 2 - 4) // 2 for side in sides]
    _refuse_large(name, 120 * 16 * prod(left), room)
    pool = nn.AvgPool2d if name == "lenet-average" else nn.MaxPool2d
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(16), nn.BatchNorm1d(120), nn.BatchNorm1d(84)]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5, padding=pad),
        norm1=norms[0],
        act1=between(),
        pool1=pool(2),
        conv2=nn.Conv2d(6, 16, 5),
        norm2=norms[1],
        act2=between(),
        pool2=pool(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * prod(left), 120),
        norm3=norms[2],
        act3=between(),
        fc2=nn.Linear(120, 84),
        norm4=norms[3],
        act4=between(),
        fc3=nn.Linear(84, classes),
    )
    plain = name != "lenet-norm"
    return nn.Sequential(OrderedDict((key, part) for key, part in parts.items() if part not in norms or not plain))


# Residual networks for small images.


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


class ResNet(nn.Module):
    """A convolution, three stages of residual blocks with 16, 32 and 64 channels, mean over positions, linear.

    Args:
        channels: Channels of the images, of any size.
        classes: Numbers of the output.
        blocks: Blocks of a stage: 3 in ResNet-20, 1 in ResNet-8.

    Source: He, Zhang, Ren and Sun 2016 (CVPR), section 4.2, n = 3 or 1, option A; weights as in He et al. 2015.
    """

    def __init__(self, channels: int, classes: int, *, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(*(ResidualBlock(16, 16) for _ in range(blocks)))
        self.stage2 = nn.Sequential(*(ResidualBlock(32 if at else 16, 32) for at in range(blocks)))
        self.stage3 = nn.Sequential(*(ResidualBlock(64 if at else 32, 64) for at in range(blocks)))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, classes)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))


# Residual perceptrons.


def _residual(model: str, shape: Shape, classes: int, between: Callable[[], nn.Module], room: int) -> nn.Module:
    read = _fitting(model)
    width, blocks = read["width"], read["blocks"]
    _refuse_large(model, (prod(shape) + classes + 2 * blocks * width) * width, room)
    return ResidualPerceptron(prod(shape), classes, width=width, blocks=blocks, between=between)


class PerceptronBlock(nn.Module):
    """``x + fc2(act(fc1(norm(x))))``, all of one width.

    Args:
        width: Numbers of x.
        between: Makes the activation.
    """

    def __init__(self, width: int, between: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.act = between()
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class ResidualPerceptron(nn.Module):
    """All pixels linearly to a stream, blocks that add to it with the norm in front of each, norm, linear.

    Direct feedback lets the stream of such a network grow without bound, which the last norm hides from the output.

    Args:
        pixels: Numbers of an image.
        classes: Numbers of the output.
        width: Numbers of the stream.
        blocks: Blocks.
        between: Makes the activation.
    """

    def __init__(self, pixels: int, classes: int, *, width: int, blocks: int, between: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.embedding = nn.Linear(pixels, width)
        self.blocks = nn.Sequential(*(PerceptronBlock(width, between) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, classes)."""
        return self.head(self.norm(self.blocks(self.embedding(self.flatten(x)))))


# Recurrent networks.


def _recurrent(model: str, shape: Shape, classes: int, room: int) -> nn.Module:
    name, read = model.partition(":")[0], _fitting(model)
    hidden, layers = read["hidden"], read["layers"]
    gates = {"gru": 3, "lstm": 4}[name]
    embedding, inputs = (classes * hidden, hidden) if len(shape) == 1 else (0, shape[0] * shape[2])
    recurrent = gates * hidden * (inputs + hidden + 2 + (layers - 1) * (2 * hidden + 2))
    _refuse_large(model, embedding + recurrent + (hidden + 1) * classes, room)
    kind = {"gru": nn.GRU, "lstm": nn.LSTM}[name]
    return Recurrent(kind, shape, classes, hidden=hidden, layers=layers)


def _fitting(model: str) -> Any:
    """Read the sizes of a model, and refuse more blocks or layers than can be."""
    read = sizes(model)
    for name in ("layers", "blocks"):
        if (number := read.get(name) or 0) > _BLOCKS:
            raise ConfigError(f"--model {model} has {number:,} {name}, expected at most {_BLOCKS:,}: use fewer")
    return read


class Recurrent(nn.Module):
    """A GRU or an LSTM that reads an image row by row, or a text character by character, and a linear layer behind it.

    Of an image the state after the last row gives the classes; of a text every state gives the next character.

    Args:
        kind: ``nn.GRU`` or ``nn.LSTM``.
        shape: Channels, height and width of the images; of texts, the characters of a context.
        classes: Numbers of the output; of texts, characters of the vocabulary too.
        hidden: Size of the state.
        layers: Recurrent layers on top of each other.
    """

    def __init__(
        self, kind: type[nn.GRU] | type[nn.LSTM], shape: Shape, classes: int, *, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, hidden) if len(shape) == 1 else None
        inputs = hidden if len(shape) == 1 else shape[0] * shape[2]
        self.rnn = kind(inputs, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, classes), or (batch, context) to (batch, context, classes)."""
        if self.embedding is not None:
            return self.head(self.rnn(self.embedding(x))[0])
        rows = x.transpose(1, 2).flatten(2)
        return self.head(self.rnn(rows)[0][:, -1])


# Transformers.


def _transformer(model: str, shape: Shape, classes: int, between: Callable[[], nn.Module], room: int) -> nn.Module:
    read = _fitting(model)
    width, blocks = read["width"], read["blocks"]
    if len(shape) == 1:
        first, positions = classes * width, shape[0]
    else:
        channels, *sides = shape
        patch = read["patch"] = read["patch"] or _usual_patch(*sides)
        if any(side % patch for side in sides):
            raise ConfigError(
                f"--model {model} has patches of {patch}×{patch} pixels, of which no whole number covers images of "
                f"{sides[0]}×{sides[1]}: use a patch that divides both"
            )
        first, positions = channels * patch**2 * width, prod(sides) // patch**2
    _refuse_large(model, first + positions * width + blocks * 12 * width**2 + width * classes, room)
    if len(shape) == 1:
        return CharacterTransformer(shape[0], classes, between=between, **read)
    return VisionTransformer(shape, classes, between=between, **read)


def _usual_patch(height: int, width: int) -> int:
    """Return the side of the largest patches of which at least 4 × 4 cover an image: 2 for 8 × 8 pixels, 7 for 28²."""
    fitting = (side for side in range(1, min(height, width) // 4 + 1) if gcd(height, width) % side == 0)
    return max(fitting, default=1)


class Attention(nn.Module):
    """Attention of several heads, ``softmax(q kᵀ / √d) v`` of linear q, k and v, and a linear layer behind it.

    Args:
        width: Numbers of a position.
        heads: Heads, which share the width.
        causal: Whether a position sees those before it and itself only.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions, width) to the same."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + fc2(act(fc1(norm(x))))`` with 4 times the width in between.

    Args:
        width: Numbers of a position.
        heads: Heads of the attention.
        between: Makes the activation.
        causal: Whether a position sees those before it and itself only.
    """

    def __init__(self, width: int, heads: int, between: Callable[[], nn.Module], *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = between()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions, width) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Square patches of an image as positions: linear, embedding of the position, blocks, norm, mean, linear.

    Args:
        shape: Channels, height and width of the images.
        classes: Numbers of the output.
        patch: Side of a patch in pixels.
        width: Numbers of a position.
        blocks: Blocks.
        heads: Heads of the attention.
        between: Makes the activation.

    Source: Dosovitskiy et al. 2021 (ICLR), section 3.1; the mean over the positions in place of a class token as in
    Beyer, Zhai and Kolesnikov 2022 (arXiv:2205.01580).
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        patch: int,
        width: int,
        blocks: int,
        heads: int,
        between: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        channels, height, width_of_image = shape
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = Positions((height // patch) * (width_of_image // patch), width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, between, causal=False) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, classes)."""
        x = self.positions(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(x)).mean(1))


class CharacterTransformer(nn.Module):
    """Characters as positions: embedding of character and position, causal blocks, norm, linear.

    Args:
        context: Characters that it sees at once.
        classes: Characters of the vocabulary.
        width: Numbers of a position.
        blocks: Blocks.
        heads: Heads of the attention.
        between: Makes the activation.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3 (GPT-2), without
    dropout, and with an output layer that shares no weights with the embedding.
    """

    def __init__(
        self, context: int, classes: int, *, width: int, blocks: int, heads: int, between: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = Positions(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, between, causal=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.characters.weight, std=_EMBEDDING)
        nn.init.normal_(self.positions.embedding.weight, std=_EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context) to (batch, context, classes)."""
        return self.head(self.norm(self.blocks(self.positions(self.characters(x)))))


class Positions(nn.Module):
    """Adds the embedding of its position to every position.

    Args:
        number: Positions.
        width: Numbers of a position.
    """

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(number, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions, width) to the same."""
        return x + self.embedding(torch.arange(x.shape[1], device=x.device))
