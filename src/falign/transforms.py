"""Transforms of the error, put in front of its way back: values that any rule takes, one behind the other.

A transform maps an error (..., features) to one of the same shape. It is applied to what a rule carries on: under
direct rules to the error of the output before it is projected to the layers, under layerwise ones to the error at a
layer's output before it crosses B. A layer's own gradient, the last layer's above all, keeps its error as it is.

Every transform here commutes with a scaling of the error, so that mixed precision's loss scale and the number of
samples in the mean change nothing.

A transform that remembers errors of earlier steps (``Remembering``) is a value like the others. ``convert`` keeps what
it remembers in buffers beside the feedback: of an output under direct rules, of every layer under layerwise ones. It is
in ``state_dict``, moves in the backward passes of training alone, and a resumed run goes on from it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "TRANSFORMS",
    "Centred",
    "Keep",
    "Memory",
    "Noisy",
    "Quantised",
    "Remembering",
    "Signs",
    "Ternary",
    "Transform",
    "Transforms",
    "Whitened",
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


class Remembering:
    """Base of transforms of your own that remember earlier errors.

    A subclass is a value; what it remembers is one floating-point tensor a place, at which ``convert`` begins with
    ``start``. Without a memory it works from that start. Under DistributedDataParallel all processes go on from what
    the first one remembers. A step whose error is not finite is not remembered.
    """

    def start(self, features: int) -> Tensor:
        """Make the memory of an error of so many features, on the CPU.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError

    def remember(self, memory: Tensor, error: Tensor) -> Tensor:
        """Give the memory after a step's error (..., features); no scale of the error may matter.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError

    def __call__(self, error: Tensor, memory: Tensor | None = None) -> Tensor:
        """Transform an error (..., features) by the memory, in which it is already.

        Raises:
            NotImplementedError: a subclass has not defined it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Whitened(Remembering):
    """``e (Σ + ridge · 1)⁻¹``, Σ the running second moment of the error, of mean diagonal 1.

    ``Σ ← forgetting · Σ + (1 - forgetting) · mean êᵀ ê`` in every backward of training, before the error is whitened;
    ê is e of root mean square 1, over entries. Σ begins at 1. What all errors have in common, the mean above all, is
    carried less, and what tells them apart more, up to 1/ridge times.

    Args:
        ridge: above 0, in units of the mean of Σ's diagonal.
        forgetting: from 0 (this batch alone) to 1.

    Source: stalls of direct feedback alignment and the centred error, 2026; the scale of Σ is ours.
    """

    ridge: float = 0.1
    forgetting: float = 0.99

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"whitened: the ridge is {self.ridge}, expected a number above 0")
        if not 0 <= self.forgetting <= 1:
            raise ValueError(f"whitened: forgetting is {self.forgetting}, expected a number from 0 to 1")

    def start(self, features: int) -> Tensor:
        """The unit matrix."""
        return torch.eye(features, device="cpu", dtype=torch.float64)

    def remember(self, memory: Tensor, error: Tensor) -> Tensor:
        """Move Σ; an error of zero leaves it."""
        rows = error.reshape(-1, error.shape[-1]).to(memory.dtype)
        power = rows.square().sum()
        rows = rows * (error.shape[-1] / power.clamp_min(torch.finfo(memory.dtype).tiny)).sqrt()
        return torch.where(power > 0, memory + (1 - self.forgetting) * (rows.mT @ rows - memory), memory)

    def __call__(self, error: Float[Tensor, "... features"], memory: Tensor | None = None) -> Tensor:
        """Whiten."""
        if memory is None:
            memory = self.start(error.shape[-1]).to(error.device, torch.promote_types(error.dtype, torch.float32))
        regular = memory + self.ridge * torch.eye(len(memory), dtype=memory.dtype, device=memory.device)
        rows = error.reshape(-1, error.shape[-1]).to(memory.dtype)
        return torch.linalg.solve(regular, rows.mT).mT.to(error.dtype).reshape(error.shape)

    def __str__(self) -> str:
        return f"whitened({self.ridge:g})"


Keep = Callable[[Tensor, Tensor], None]
"""What a backward calls with a tensor that it moves, as the graph saved it, and the change of it."""


class Memory(NamedTuple):
    """Memory of a transform at one place.

    Attributes:
        place: of the transform, among all.
        keep: what is called with the memory and its change; None where it stays, outside of training.
    """

    place: int
    keep: Keep | None


def apply_transforms(
    transforms: tuple[Transform, ...],
    error: Float[Tensor, "..."],
    axis: int = -1,
    memories: tuple[Memory, ...] = (),
    tensors: tuple[Tensor, ...] | list[Tensor] = (),
) -> Tensor:
    """Apply transforms to an error, one behind the other.

    Args:
        transforms: which.
        error: of any shape.
        axis: where its features are.
        memories: of those that remember.
        tensors: what they remember, in that order.

    Raises:
        RuntimeError: one returns another shape or dtype.
    """
    remembered = {memory.place: (memory, tensor) for memory, tensor in zip(memories, tensors, strict=True)}
    for index, transform in enumerate(transforms):
        moved = error.movedim(axis, -1)
        if index in remembered and isinstance(transform, Remembering):
            memory, tensor = remembered[index]
            if memory.keep is not None:
                change = transform.remember(tensor, moved) - tensor
                change = torch.where(change.isfinite().all(), change, torch.zeros_like(change))
                before, tensor = tensor, tensor + change
                memory.keep(before, change)
            result = transform(moved, tensor)
        else:
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
    "whitened": Whitened,
}


def transforms(given: Transforms) -> tuple[Transform, ...]:
    """Make the transforms that names or callables stand for.

    Args:
        given: ``centred``, ``centred(GATE)``, ``signs``, ``ternary(THRESHOLD)``, ``quantised(BITS)``, ``noisy(SIZE)``,
            ``whitened(RIDGE)``, a callable, or several of these.

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
    known = "centred, centred(GATE), signs, ternary(THRESHOLD), quantised(BITS), noisy(SIZE), whitened(RIDGE)"
    if match is None or match[1] not in TRANSFORMS or (match[2] and match[1] == "signs"):
        raise ValueError(f"unknown transform {given!r:.60}: choose of {known}")
    if not match[2]:
        return TRANSFORMS[match[1]]()
    try:
        number = float(match[2])
    except ValueError:
        raise ValueError(f"transform {given!r:.60}: {match[2]!r} is no number") from None
    return TRANSFORMS[match[1]](int(number) if match[1] == "quantised" and number == int(number) else number)
