"""The networks that ``gpu.py`` times: a wide MLP, ResNet-18, and a pre-norm transformer of linear layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    """A stem, blocks and a head, one after another.

    Args:
        stem: What runs first.
        blocks: What activation checkpointing recomputes, block by block, where ``recompute`` is set.
        head: What runs last.
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def mlp(width: int, layers: int, classes: int) -> Network:
    """ReLU network of that many linear layers, the last one to the classes; a block is two layers."""
    hidden: list[nn.Module] = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers - 1)]
    pairs: list[nn.Module] = [nn.Sequential(*hidden[first : first + 2]) for first in range(0, layers - 1, 2)]
    return Network(nn.Identity(), pairs, nn.Linear(width, classes))


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, a 1 × 1 convolution where the size changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same or half the height and width."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def resnet18(width: int, classes: int) -> Network:
    """ResNet-18 of He, Zhang, Ren and Sun 2016, whose first stage has ``width`` channels (64 in the paper)."""
    stem = nn.Sequential(
        nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    )  # fmt: skip
    blocks: list[nn.Module] = []
    channels = width
    for stage in range(4):
        for first in (True, False):
            own = width * 2**stage
            blocks.append(BasicBlock(channels, own, 2 if first and stage else 1))
            channels = own
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return Network(stem, blocks, head)


class Tokens(nn.Module):
    """Embedding of tokens and of their positions."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time) to (batch, time, width)."""
        return self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))


class TransformerBlock(nn.Module):
    """Causal attention and a two-layer network, each normalised before and added to the stream, of ``nn.Linear``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(layers: int, width: int, heads: int, length: int, vocabulary: int) -> Network:
    """Pre-norm language model."""
    blocks: list[nn.Module] = [TransformerBlock(width, heads) for _ in range(layers)]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
    return Network(Tokens(vocabulary, length, width), blocks, head)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A network to be timed, with its batch.

    Attributes:
        title: What it is.
        numbers: How bfloat16 comes in, in words.
        make: The network.
        batch: (device) -> inputs and classes.
        autocast: Float32 weights under autocast; else bfloat16 weights.
        channels_last: Memory layout of images and convolutions.
        dfa_feedback: Feedback family of ``dfa``.
        compile_seconds: What one cold compilation takes at most, by estimate.
    """

    title: str
    numbers: str
    make: Callable[[], Network]
    batch: Callable[[torch.device], tuple[Tensor, Tensor]]
    autocast: bool
    channels_last: bool = False
    dfa_feedback: str | None = None
    compile_seconds: float


AUTOCAST = "float32 weights and feedback, autocast"
WEIGHTS = "bfloat16 weights and feedback, converted in float32"


def timed(small: bool) -> dict[str, Timed]:
    """The networks, large or of the test suite's sizes."""
    width, layers, rows = (32, 4, 8) if small else (8192, 8, 4096)
    channels, pixels, images = (4, 32, 2) if small else (64, 224, 256)
    classes = 10 if small else 1000
    depth, model, heads, length, texts, vocabulary = (2, 16, 2, 8, 2, 12) if small else (12, 768, 12, 1024, 16, 256)

    def vectors(device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, width, device=device), torch.randint(classes, (rows,), device=device)

    def pictures(device: torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(images, 3, pixels, pixels, device=device).contiguous(memory_format=torch.channels_last)
        return x, torch.randint(classes, (images,), device=device)

    def words(device: torch.device) -> tuple[Tensor, Tensor]:
        x, y = torch.randint(vocabulary, (2, texts, length), device=device)
        return x, y

    return {
        "mlp": Timed(
            title=f"MLP, {layers} linear layers, {layers - 1} of {width} x {width} and one to {classes} classes, "
            f"ReLU, batch {rows}",
            numbers=WEIGHTS,
            make=lambda: mlp(width, layers, classes),
            batch=vectors,
            autocast=False,
            compile_seconds=20,
        ),
        "transformer": Timed(
            title=f"pre-norm transformer, {depth} layers, width {model}, {heads} heads, {texts} x {length} tokens, "
            f"vocabulary {vocabulary} (bytes, so that direct feedback is of {vocabulary} rows)",
            numbers=AUTOCAST,
            make=lambda: transformer(depth, model, heads, length, vocabulary),
            batch=words,
            autocast=True,
            compile_seconds=45,
        ),
        "resnet18": Timed(
            title=f"ResNet-18 on {pixels} x {pixels}, {classes} classes, batch {images}, channels last; dfa with the "
            "shared feedback family",
            numbers=AUTOCAST,
            make=lambda: resnet18(channels, classes),
            batch=pictures,
            autocast=True,
            channels_last=True,
            dfa_feedback="shared",
            compile_seconds=45,
        ),
    }
