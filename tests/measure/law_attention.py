"""A small network with attention written with linear layers, in the variants of which the law is asked."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import falign
from falign.measure.law import ConservationLaw

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries, keys, values), each (batch, heads, positions, width), to what the values are mixed to."""


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).softmax(-1) @ v


def relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).relu() @ v / q.shape[-2]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(later, -torch.inf).relu() @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v) / q.shape[-2]


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of queries, one of keys and values."""
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q, k[:, :1].repeat_interleave(2, 1), v[:, :1].repeat_interleave(2, 1))


class Attention(nn.Module):
    """Neurons, attention of two heads of width 2, neurons again: 3 features in, 3 classes out."""

    def __init__(self, attend: Attend, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(4, 3)
        self.q, self.k, self.v = (nn.Linear(5, 4, bias=bias) for _ in range(3))
        self.o, self.attend = nn.Linear(4, 4), attend

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        q, k, v = (part(x).unflatten(-1, (2, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.last(self.o(self.attend(q, k, v).transpose(1, 2).flatten(2)).relu()).mean(1)


class Fused(nn.Module):
    """As ``Attention``, of one matrix for queries, keys and values, or of one for keys and values."""

    def __init__(self, attend: Attend, all_three: bool = True) -> None:
        super().__init__()
        self.first, self.last, self.o = nn.Linear(3, 5), nn.Linear(4, 3), nn.Linear(4, 4)
        self.q, self.qkv = (None, nn.Linear(5, 12)) if all_three else (nn.Linear(5, 4), nn.Linear(5, 8))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        parts = self.qkv(x) if self.q is None else torch.cat([self.q(x), self.qkv(x)], -1)
        q, k, v = parts.unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return self.last(self.o(self.attend(q, k, v).transpose(1, 2).flatten(2)).relu()).mean(1)


def data(batch: int = 6, positions: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, positions, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (batch,), generator=generator)


def made(model: nn.Module, rule: str = "fa", **options: Any) -> nn.Module:
    """With large fixed weights, so that scores matter, converted in float64."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.double().parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return falign.convert(model, rule, example=data()[0], **options)


def watched(model: nn.Module, steps: int = 10, rate: float = 0.05, **options: Any) -> ConservationLaw:
    """The law after some steps on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, **options)
    law = ConservationLaw(model, optimizer)
    train(model, optimizer, steps)
    return law


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
