"""Inner products and angles of large tensors, summed in float64."""

from math import acos, degrees, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_PIECE = 1 << 16
"""Elements at a time: what is read stays in the cache until it is summed in float64."""
_TINY = 1e-12
"""Below it the square of a norm in float32 may have lost what its small elements add."""
_SAMPLES = 64
"""So many samples are enough for an effective rank."""


class Products(NamedTuple):
    """⟨a, b⟩, |a|² and |b|² of two tensors."""

    inner: float = 0.0
    one: float = 0.0
    other: float = 0.0

    @property
    def cosine(self) -> float | None:
        """cos∠(a, b); None where one of them is zero."""
        size = sqrt(self.one) * sqrt(self.other)
        return max(-1.0, min(1.0, self.inner / size)) if size > 0 else None

    @property
    def angle(self) -> float | None:
        """∠(a, b) in degrees; None where one of them is zero."""
        return None if self.cosine is None else degrees(acos(self.cosine))

    def __add__(self, more: tuple) -> "Products":
        return Products(*(float(a + b) for a, b in zip(self, more, strict=True)))


def products(one: Tensor, other: Tensor) -> Products:
    """Compute inner product and squared norms of two tensors of one size, summed piece by piece in float64."""
    a, b = (tensor.detach().reshape(-1) for tensor in (one, other))
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    sums = _products(a, b)
    if a.dtype != torch.float64 and min(sums.one, sums.other) < _TINY:
        return _products(a.double(), b.double())  # squares that float32 may have lost
    return sums


def _products(a: Float[Tensor, " size"], b: Float[Tensor, " size"]) -> Products:
    piece = _PIECE if a.device.type == "cpu" else 1 << 24
    pieces = [torch.stack((p @ q, p @ p, q @ q)) for p, q in zip(a.split(piece), b.split(piece), strict=True)]
    return Products(*torch.stack(pieces).double().sum(0).tolist())


def length(tensor: Tensor) -> float:
    """Compute |a|, also where float32 is too short for the squares of its elements."""
    a = tensor.detach()
    if a.device.type != "cpu":  # no second look, which would wait for the device
        return float(torch.linalg.vector_norm(a, dtype=torch.float64 if a.device.type != "mps" else torch.float32))
    norm = float(torch.linalg.vector_norm(a, dtype=torch.float32 if a.dtype.itemsize < 4 else a.dtype))
    if a.dtype == torch.float64 or _TINY < norm < 1 / _TINY:
        return norm
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def angle(one: Tensor, other: Tensor) -> float:
    """Measure the angle between two tensors as vectors.

    Args:
        one: A tensor of any shape.
        other: One of the same shape and device.

    Returns:
        Degrees, from 0 to 180; 90 where one is zero.

    Raises:
        TypeError: they are no floating-point tensors.
        ValueError: they have not the same shape.
    """
    for value in (one, other):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
            what = f"a tensor of {value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"an angle is between two floating-point tensors, got {what}")
    if one.shape != other.shape or one.device != other.device:
        raise ValueError(
            f"an angle is between tensors of one shape and device, got {tuple(one.shape)} on {one.device} and "
            f"{tuple(other.shape)} on {other.device}"
        )
    degrees_between = products(one, other).angle
    return 90.0 if degrees_between is None else degrees_between


def sample_angles(one: Float[Tensor, "batch ..."], other: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Measure ∠(one_n, other_n) of every sample n in degrees, to 0.05° where the errors are float32.

    Samples of which one error is zero have no angle: nan.
    """
    a, b = (error.detach().reshape(len(error), -1) for error in (one, other))
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    cosines = _cosines(a, b)
    if cosines is None:
        cosines = _cosines(a.double(), b.double())
    assert cosines is not None
    return torch.rad2deg(cosines.clamp(-1, 1).acos())


def _cosines(a: Float[Tensor, "batch size"], b: Float[Tensor, "batch size"]) -> Float[Tensor, " batch"] | None:
    """Compute cosines, nan where there is none; None where float32 is too short for a norm."""
    sizes = [torch.linalg.vector_norm(error, dim=1).double() for error in (a, b)]
    if a.dtype != torch.float64 and any(bool((size < _TINY).any()) for size in sizes):
        return None
    if torch.equal(a, b):
        return torch.where(sizes[0] > 0, 1.0, torch.nan)
    rows = max(1, _PIECE // a.shape[1])
    inner = torch.cat([(p * q).sum(1) for p, q in zip(a.split(rows), b.split(rows), strict=True)]).double()
    return inner / sizes[0] / sizes[1]


def effective_rank(error: Float[Tensor, "batch ..."]) -> float | None:
    """Count the directions that share the power: ``(Σσ²)² / Σσ⁴``, σ the singular values of (samples, elements).

    It is 1 if all samples have the same direction and at most min(samples, elements); also known as the participation
    ratio. Of a large batch the first 64 samples are taken. None where the error is zero.
    """
    matrix = error.detach()[:_SAMPLES].reshape(min(len(error), _SAMPLES), -1)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    if matrix.dtype != torch.float64 and not gram.diagonal().sum() > _TINY:
        return effective_rank(matrix.double()) if matrix.any() else None
    total = gram.diagonal().double().sum()
    return float(total**2 / (gram / total).double().square().sum() / total**2) if total > 0 else None
