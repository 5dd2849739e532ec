"""The named streams of random numbers that a seed means: inputs, teacher, weights."""

from collections.abc import Iterator
from math import sqrt
from typing import Literal as OneOf

import torch
from jaxtyping import Float
from torch import Tensor

from falign.feedback import generator
from falign.theory.inputs import told, whole_number
from falign.theory.two_layer.activations import activation as activation_named

Scale = OneOf["standard", "scaled"]
Teacher = OneOf["network", "linear"]

_ROWS = 1024
"""W is drawn in pieces of that many rows; the pieces are part of what a seed means."""


def normal(seed: int, purpose: str, *shape: int) -> Tensor:
    """N(0, 1) in float32 on the CPU, a function of its arguments only; float64 draws would be another stream."""
    return torch.randn(shape, generator=generator(seed, "two-layer", purpose))


def rows_of(seed: int, purpose: str, p: int, d: int) -> Iterator[tuple[slice, Tensor]]:
    """N(0, 1) of shape [p d], in pieces."""
    random = generator(seed, "two-layer", purpose)
    for first in range(0, p, _ROWS):
        rows = min(_ROWS, p - first)
        yield slice(first, first + rows), torch.randn(rows, d, generator=random)


def inputs_of(seed: int, n: int, d: int, inputs: Scale, purpose: str = "inputs") -> Float[Tensor, "n d"]:
    """A seed's inputs, N(0, I_d) or N(0, I_d/d), float64 on the CPU."""
    return normal(seed, purpose, n, d).double() / (sqrt(d) if inputs == "scaled" else 1.0)


def answers(seed: int, X: Tensor, p: int, activation: str, teacher: Teacher, outputs: int | None) -> Tensor:
    """The teacher's outputs at X [m d], in float64."""
    k, d = outputs or 1, X.shape[1]
    if teacher == "linear":
        y = X @ normal(seed, "linear teacher", d, k).double()
    else:
        value = activation_named(activation).value
        beta = normal(seed, "teacher beta", p, k).double()
        y = X.new_zeros(X.shape[0], k)
        for rows, W in rows_of(seed, "teacher W", p, d):
            y += value(X @ W.double().mT) @ beta[rows]
        y /= sqrt(p)
    return y if outputs else y[:, 0]


def check_sizes(**sizes: int | None) -> None:
    """Refuse a size that is no integer or below 1; for ``test`` below 0."""
    for name, size in sizes.items():
        least = 0 if name == "test" else 1
        if size is not None and whole_number(name, size) < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what a run loses its small steps in."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"runs are in float32 or float64, got {dtype}: η/√p times an error is lost in fewer digits")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known."""
    if value not in known:
        raise ValueError(f"unknown {name} {told(value)}: choose one of {', '.join(known)}")
