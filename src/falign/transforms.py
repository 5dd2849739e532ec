"""Transforms of the error, put in front of its way back: values that any rule takes, one behind the other.

A transform maps an error (..., features) to one of the same shape. It is applied to what a rule carries on: under
direct rules to the error of the output before it is projected to the layers, under layerwise ones to the error at a
layer's output before it crosses B. A layer's own gradient, the last layer's above all, keeps its error as it is.

Every transform here commutes with a scaling of the error, so that mixed precision's loss scale and the number of
samples in the mean change nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "TRANSFORMS",
    "Centred",
    "Noisy",
    "Quantised",
    "Signs",
    "Ternary",
    "Transform",
    "Transforms",
    "apply_transforms",
    "transforms",
]

Transform = Callable[[Tensor], Tensor]
"""(error, features last) -> an error of the same shape and dtype."""

Transforms = str | Transform | tuple[str | Transform, ...] | list[str | Transform] | None
"""One transform or several, by name or as callables; the first is applied first."""


@dataclass(frozen=True)
class Centred:
    """``e - m`` with m the mean over samples and positions, of each feature; only where m is large.

    The mean moves every neuron alike for all samples; in deep networks of saturating units it pushes them into
    saturation before they have learned anything.

    Args:
        gate: least share ``|m|² / mean |e|²`` of the error's power from which on the mean is taken off; 0: always.

    Source: stalls of direct feedback alignment and the centred error, 2026.
    """

    gate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gate < 1:
            raise ValueError(f"centred: the gate is {self.gate}, expected a share of the error's power, from 0 to 1")

    def __call__(self, error: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Take the mean off."""
        rows = error.reshape(-1, error.shape[-1])
        mean = rows.mean(0)
        if self.gate:
            power = rows.square().sum(1).mean()
            mean = torch.where(mean.square().sum() > self.gate * power, mean, torch.zeros_like(mean))
        return error - mean

    def __str__(self) -> str:
        return f"centred({self.gate:g})" if self.gate else "centred"


@dataclass(frozen=True)
class Signs:
    """``r · sign(e)``, r the root mean square of all entries: one bit an entry and one number a batch."""

    def __call__(self, error: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Keep the signs."""
        return _rms(error) * error.sign()

    def __str__(self) -> str:
        return "signs"


@dataclass(frozen=True)
class Ternary:
    """``s · sign(e)`` where ``|e| > threshold · r``, else 0, r the root mean square; s keeps the error's norm.

    Args:
        threshold: in units of r.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"ternary: the threshold is {self.threshold}, expected a number from 0 on")

    def __call__(self, error: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Keep the signs of large entries."""
        size = _rms(error)
        kept = error.sign() * (error.abs() > self.threshold * size)
        share = kept.abs().mean()
        return kept * (size * share.clamp(min=1 / max(error.numel(), 1)).rsqrt())

    def __str__(self) -> str:
        return f"ternary({self.threshold:g})"


@dataclass(frozen=True)
class Quantised:
    """Rounded to 2^bits - 1 levels, evenly from -max|e| to max|e| of the batch, zero among them.

    Args:
        bits: at least 2.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits != int(self.bits) or not 2 <= self.bits <= 16:
            raise ValueError(f"quantised: bits is {self.bits}, expected a whole number from 2 to 16 (1: signs)")

    def __call__(self, error: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Round."""
        step = error.abs().amax() / (2 ** (self.bits - 1) - 1)
        step = torch.where(step > 0, step, torch.ones_like(step))
        return (error / step).round() * step

    def __str__(self) -> str:
        return f"quantised({self.bits:g})"


@dataclass(frozen=True)
class Noisy:
    """``e + size · r · N(0, 1)``, r the root mean square of all entries: analogue hardware.

    Args:
        size: of the noise, relative to the error. It is drawn from PyTorch's generator of the device.
    """

    size: float = 0.1

    def __post_init__(self) -> None:
        if not self.size >= 0:
            raise ValueError(f"noisy: the size is {self.size}, expected a number from 0 on")

    def __call__(self, error: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Add noise."""
        return error + self.size * _rms(error) * torch.randn_like(error)

    def __str__(self) -> str:
        return f"noisy({self.size:g})"


def apply_transforms(transforms: tuple[Transform, ...], error: Float[Tensor, "..."], axis: int = -1) -> Tensor:
    """Apply transforms to an error, one behind the other.

    Args:
        transforms: which.
        error: of any shape.
        axis: where its features are.

    Raises:
        RuntimeError: one returns another shape or dtype.
    """
    for transform in transforms:
        moved = error.movedim(axis, -1)
        result = transform(moved)
        if not isinstance(result, Tensor) or result.shape != moved.shape or result.dtype != moved.dtype:
            got = f"{tuple(result.shape)} of {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
            raise RuntimeError(
                f"the transform {transform} returned {got}, expected an error {tuple(moved.shape)} of {moved.dtype}"
            )
        error = result.movedim(-1, axis)
    return error


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


TRANSFORMS: dict[str, type] = {
    "centred": Centred,
    "signs": Signs,
    "ternary": Ternary,
    "quantised": Quantised,
    "noisy": Noisy,
}


def transforms(given: Transforms) -> tuple[Transform, ...]:
    """Make the transforms that names or callables stand for.

    Args:
        given: ``centred``, ``centred(GATE)``, ``signs``, ``ternary(THRESHOLD)``, ``quantised(BITS)``, ``noisy(SIZE)``,
            a callable, or several of these.

    Raises:
        TypeError: one is neither.
        ValueError: a name is unknown, or its number is out of range.
    """
    several = given if isinstance(given, (tuple, list)) else () if given is None else (given,)
    return tuple(_transform(one) for one in several)


def _transform(given: str | Transform) -> Transform:
    if not isinstance(given, str):
        if not callable(given):
            raise TypeError(f"a transform is a {type(given).__name__}, expected a name or a callable")
        return given
    match = re.fullmatch(r"([a-z]+)(?:[(:]([-+.0-9e]+)\)?)?", given.strip())
    known = "centred, centred(GATE), signs, ternary(THRESHOLD), quantised(BITS), noisy(SIZE)"
    if match is None or match[1] not in TRANSFORMS or (match[2] and match[1] == "signs"):
        raise ValueError(f"unknown transform {given!r:.60}: choose of {known}")
    if not match[2]:
        return TRANSFORMS[match[1]]()
    try:
        number = float(match[2])
    except ValueError:
        raise ValueError(f"transform {given!r:.60}: {match[2]!r} is no number") from None
    return TRANSFORMS[match[1]](int(number) if match[1] == "quantised" and number == int(number) else number)
