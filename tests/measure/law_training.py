"""Small networks on the handwritten digits, trained with the law attached."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import falign
from falign.measure.law import ConservationLaw

PIXELS, CLASSES = (torch.from_numpy(np.asarray(part)) for part in load_digits(return_X_y=True))


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 16), activation(), nn.Linear(16, 12, bias=False), activation(), nn.Linear(12, 10)
    )


def conv() -> nn.Module:
    """Groups, dropout of channels, pooling, and a channel in several features; small, for a thousand steps."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 2, groups=2), nn.Dropout2d(0.2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(6 * 4, 10),
    )  # fmt: skip


def pooled() -> nn.Module:
    """Pooling of both kinds, a transposed convolution, padding between layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.ZeroPad2d((1, 0, 0, 1)), nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), nn.PReLU(),
        nn.AvgPool2d(2), nn.ConvTranspose2d(6, 4, 2), nn.Upsample(scale_factor=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def norm() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip


def built(make: Callable[[], nn.Module], rule: Any = "fa", dtype: torch.dtype = torch.float64, **how: Any) -> nn.Module:
    """The network with fixed weights, converted."""
    torch.manual_seed(3)
    model = make().to(dtype)
    return falign.convert(model, rule, example=inputs(dtype)[:2], **how)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return PIXELS.to(dtype) / 16


def batches(steps: int, size: int = 8, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, always the same."""
    generator, x = torch.Generator().manual_seed(5), inputs(dtype)
    for _ in range(steps):
        chosen = torch.randint(len(x), (size,), generator=generator)
        yield x[chosen], CLASSES[chosen]


def sgd(model: nn.Module, rate: float = 0.1, **how: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate, **how)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    with falign.targets(model, y):
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 100, size: int = 8
) -> ConservationLaw:
    """The law of a model after some steps."""
    optimizer = sgd(model) if optimizer is None else optimizer
    law = ConservationLaw(model, optimizer)
    for x, y in batches(steps, size, next(model.parameters()).dtype):
        step(model, optimizer, x, y)
    return law


def by_layer(law: ConservationLaw) -> dict[str, Any]:
    return {row.layer: row for row in law.report().laws}


def slopes(drift: Callable[[float], float], rates: list[float]) -> list[float]:
    """d log(drift) / d log(rate) between neighbours."""
    values = [drift(rate) for rate in rates]
    return [math.log(a / b) / math.log(p / q) for a, b, p, q in zip(values, values[1:], rates, rates[1:], strict=False)]
