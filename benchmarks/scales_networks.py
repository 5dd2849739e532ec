"""The networks on which the scale of the feedback is measured, and the images; torch, numpy and the standard library.

Images are 28 × 28 of one channel in 10 classes. ``LLAMA`` alone works on tokens: its gradients are looked at, it is
not trained.
"""

import gzip
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, scaled_dot_product_attention, silu


def mlp() -> nn.Module:
    """784-256-256-10 with ReLU, PyTorch's own initial weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max pooling, PyTorch's own initial weights: ``falign train --model lenet``."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Block(nn.Module):
    """``relu(s + norm(conv(relu(norm(conv(x))))))`` with the parameter-free shortcut s of ResNet-20."""

    def __init__(self, channels: int, width: int, normalised: bool) -> None:
        super().__init__()
        self.stride, self.added = (1 if width == channels else 2), width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, padding=1, bias=not normalised)
        self.norm1 = _norm(width, normalised)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=not normalised)
        self.norm2 = _norm(width, normalised)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same, or to half the height and width."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            low = self.added // 2
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, low, self.added - low))
        return torch.relu(x + y)


def _norm(width: int, normalised: bool) -> nn.Module:
    """Statistics of the batch in evaluation too: the copies that are trained together share no running ones."""
    return nn.BatchNorm2d(width, track_running_stats=False) if normalised else nn.Identity()


class ResNet20(nn.Module):
    """ResNet-20 with 8, 16 and 32 channels on images averaged to 14 × 14.

    With BatchNorm the convolutions have the initial weights of He et al. 2015, without it PyTorch's own.
    """

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=not normalised)
        self.norm = _norm(8, normalised)
        widths = (8, 8, 8, 8, 16, 16, 16, 32, 32, 32)
        self.blocks = nn.Sequential(*(Block(a, b, normalised) for a, b in pairwise(widths)))
        self.head = nn.Linear(32, 10)
        for module in self.modules():
            if normalised and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = self.blocks(torch.relu(self.norm(self.conv(avg_pool2d(x, 2)))))
        return self.head(x.mean((2, 3)))


def _patches(x: Tensor) -> Tensor:
    """(batch, 1, 28, 28) to (batch, 16, 49): patches of 7 × 7."""
    return x.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)


class Mix(nn.Module):
    """One layer of MLP-Mixer: an MLP over the patches, one over the channels, both on a residual stream."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Attend(nn.Module):
    """One pre-norm transformer layer: attention and an MLP on a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same, four heads."""
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Patchwise(nn.Module):
    """Patches to tokens, layers, normalisation, mean over the tokens, classes."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        return self.head(self.norm(self.layers(self.embed(_patches(x)) + self.position)).mean(1))


def small(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with weights N(0, 0.02²) and biases of zero, as language models have them."""
    model = make()
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.02)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
    return model


class LlamaLayer(nn.Module):
    """RMSNorm, causal attention and a gated MLP, without biases (and without rotations: nothing here needs them)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def llama(layers: int, width: int = 256, vocabulary: int = 512) -> nn.Module:
    """A language model's stack with weights N(0, 0.02²)."""
    return nn.Sequential(
        nn.Embedding(vocabulary, width), *(LlamaLayer(width) for _ in range(layers)), nn.RMSNorm(width),
        nn.Linear(width, vocabulary, bias=False),
    )  # fmt: skip


def transformer() -> nn.Module:
    """Six layers of width 64."""
    return Patchwise([Attend(64) for _ in range(6)], 64)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "mlp-0.02": partial(small, mlp),
    "lenet": lenet,
    "resnet20-bn": partial(ResNet20, True),
    "resnet20-plain": partial(ResNet20, False),
    "mixer": lambda: Patchwise([Mix(64, 16) for _ in range(4)], 64),
    "transformer": transformer,
    "transformer-0.02": partial(small, transformer),
}
LLAMA = {f"llama-{layers}": partial(small, partial(llama, layers)) for layers in (2, 6, 12)}


def make(network: str, seed: int) -> nn.Module:
    """A network with the weights of a seed."""
    torch.manual_seed(seed)
    return {**NETWORKS, **LLAMA}[network]()


def fashion(train: int = 60000, test: int = 5000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of Fashion-MNIST, normalised, and labels: training, test; from ``$FALIGN_DATA/fashion-mnist``."""
    folder = Path(os.environ["FALIGN_DATA"]) / "fashion-mnist"

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{name}.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    parts: list[Tensor] = []
    for name, count in (("train", train), ("t10k", test)):
        images = read(f"{name}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28)
        labels = read(f"{name}-labels-idx1-ubyte", 8)
        chosen = np.random.default_rng(0).permutation(len(images))[:count]
        parts += [torch.from_numpy(images[chosen]).float() / 255, torch.from_numpy(labels[chosen].astype(np.int64))]
    mean, std = parts[0].mean(), parts[0].std()
    return (parts[0] - mean) / std, parts[1], (parts[2] - mean) / std, parts[3]
