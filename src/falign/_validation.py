"""What the public functions make of the data and numbers that they are given, and the sentences that refuse them."""

import os
from collections.abc import Iterable, Sequence
from functools import cache
from math import isfinite, prod
from operator import index
from reprlib import Repr
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

Numbers: TypeAlias = Tensor | ArrayLike | Sequence[Any] | float | int
"""Tensors, arrays, nested sequences or plain numbers."""

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60

_SQUARABLE = 1e-130, 1e150
"""Where the largest number must be for its square, and that of numbers a rounding error as large, to be normal."""
_LARGEST_LABEL = 2**53
_ENTRIES = 10**7
"""Most entries of a list."""

_LONGEST = 10**9
"""Most steps of a run; one takes ten microseconds and more."""


def dense(name: str, given: Any) -> tuple[Tensor, bool]:
    """A tensor with numbers in it, and whether it was made from plain ones; an array keeps its type.

    Raises:
        ValueError: there are none, or they make no table.
    """
    if isinstance(given, Tensor):
        if given.is_meta or given.is_nested or given.is_quantized:
            raise ValueError(f"{name} is {told(given)}, expected a plain tensor with numbers in it")
        return (given if given.layout is torch.strided else given.to_dense()), False
    sequence = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, (str, bytes, np.ma.MaskedArray))
    if not sequence and not isinstance(given, (int, float, complex, np.generic)) and not hasattr(given, "__array__"):
        raise ValueError(f"{name} is {told(given)}, expected real numbers: a tensor, an array or lists")
    if isinstance(given, Sequence) and len(given) > _ENTRIES:
        raise ValueError(f"{name} has {len(given)} entries, expected a tensor or an array of so many")
    try:
        array = np.array(given)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{name} are no table of numbers ({error}): pass a tensor, an array or lists") from None
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16:
        raise ValueError(f"{name} are of type {array.dtype}, expected real numbers: a tensor, an array or lists")
    kind = np.dtype(np.float64) if array.dtype.char == "g" else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=kind, order="C")), not isinstance(given, np.ndarray)


def numbers(name: str, given: Numbers) -> Tensor:
    """Real numbers as a dense tensor on the CPU, without a graph.

    Raises:
        ValueError: they are none.
    """
    found = dense(name, given)[0].detach().cpu()
    if found.is_complex():
        raise ValueError(f"{name} are complex ({found.dtype}): pass real numbers, such as x.real")
    return found if isinstance(given, Tensor) or found.dtype == torch.bool else found.double()


def floating(name: str, given: Numbers) -> Tensor:
    """Real numbers where they are and in their type if a tensor has them in float32 or float64, else ``numbers``.

    Raises:
        ValueError: they are none, or in less than float32.
    """
    if not (isinstance(given, Tensor) and given.is_floating_point()):
        return numbers(name, given).double()
    if given.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is in {given.dtype}, expected float32 or float64: pass .float() of it")
    return dense(name, given)[0].detach()


def table(name: str, given: Numbers) -> Float[Tensor, "n d"]:
    """Finite numbers in float64, a row a point.

    Raises:
        ValueError: there is another number of axes, none at all, or one that is not finite.
    """
    found = numbers(name, given).double()
    if found.ndim != 2:
        raise ValueError(f"{name} have shape {tuple(found.shape)}, expected (points, features): flatten or unsqueeze")
    if found.numel() == 0:
        raise ValueError(f"{name} have shape {tuple(found.shape)}: expected at least one point and one feature")
    if not found.isfinite().all():
        raise ValueError(f"{int((~found.isfinite()).sum())} numbers of the {name} are not finite: clean the data first")
    return found


def squarable(name: str, found: Tensor) -> None:
    """Refuse numbers whose squares float64 cannot hold.

    Raises:
        ValueError: they are too large or too small; all zeros are not.
    """
    largest = float(found.abs().max())
    if largest and not _SQUARABLE[0] <= largest <= _SQUARABLE[1]:
        raise ValueError(f"the largest of the {name} is {largest:g}, its square beyond float64: scale the data first")


def whole_labels(given: Numbers, points: int) -> Int64[Tensor, " n"]:
    """One whole number a point.

    Raises:
        ValueError: the shape is another, or a label is not whole.
    """
    found = numbers("labels", given)
    if found.ndim != 1:
        raise ValueError(
            f"labels have shape {tuple(found.shape)}, expected one whole number a point: of one-hot labels argmax(1)"
        )
    if len(found) != points:
        raise ValueError(f"{points} inputs and {len(found)} labels: one label an input")
    if found.is_floating_point():
        odd = ~((found == found.round()) & (found.abs() <= _LARGEST_LABEL))
        if odd.any():
            raise ValueError(f"label {float(found[odd][0]):g} is no whole number: classes are numbered")
    return found.long()


def told(value: Any) -> str:
    """What came, in a few words, for a sentence that refuses it."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array {list(value.shape)} of {value.dtype}"
    try:
        return _SHORT.repr(value)
    except ValueError:  # whole numbers of thousands of digits have no decimal text
        return f"one of type {type(value).__name__} with too many digits to be shown"


def number(value: Any) -> bool:
    """Whether it is a finite real number."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def positive(name: str, value: float | int) -> float | int:
    """The number.

    Raises:
        ValueError: it is none above 0.
    """
    if not (number(value) and value > 0):
        raise ValueError(f"{name} is {told(value)}, expected a positive number")
    return value


def whole_number(name: str, value: Any) -> int:
    """The integer that a value of any integer type is.

    Raises:
        ValueError: it is none, such as 1e9, or beyond 2⁶³ (a seed: 2⁴⁰⁹⁶).
    """
    try:
        found = None if isinstance(value, (bool, np.bool_)) else index(value)
    except (TypeError, ValueError):
        found = None
    if found is None or (isinstance(value, Tensor) and value.dtype is torch.bool):
        raise ValueError(
            f"{name} must be an integer, got {told(value)} of type {type(value).__name__}: write int({name})"
        )
    bits, most = (4096, "2⁴⁰⁹⁶") if "seed" in name else (63, "2⁶³")
    if found.bit_length() > bits:
        raise ValueError(f"{name} must be below {most}, got {told(value)}")
    return found


def room(what: str, *sizes: int) -> None:
    """Refuse arrays that this machine's memory does not hold.

    Raises:
        ValueError: there are more numbers than that, in float64.
    """
    wanted = 8 * prod(sizes)
    if wanted > _memory():
        raise ValueError(
            f"{what} of {' × '.join(map(str, sizes))} numbers would take {wanted / 2**30:.3g} GiB, of the "
            f"{_memory() / 2**30:.3g} GiB of this machine: ask for less"
        )


@cache
def _memory() -> int:
    """Bytes of this machine's memory, or more than any has where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**42


def bearable(steps: int) -> int:
    """The number of steps.

    Raises:
        ValueError: no run could make so many.
    """
    if steps > _LONGEST:
        raise ValueError(f"steps is {told(steps)}, expected at most {_LONGEST}: more would take months")
    return steps


def whole(value: Any) -> bool:
    """Whether it is a whole number, by type."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def listed(name: str, given: Any) -> list[Any]:
    """What it holds.

    Raises:
        ValueError: it is a single value.
    """
    if not isinstance(given, Iterable) or isinstance(given, str) or getattr(given, "ndim", 1) != 1:
        raise ValueError(f"{name} is {told(given)}, expected a sequence, such as a list")
    if isinstance(given, Sequence) and len(given) > _ENTRIES:
        raise ValueError(f"{name} has {len(given)} entries, expected at most {_ENTRIES}")
    return given.tolist() if isinstance(given, (Tensor, np.ndarray)) else list(given)


def recorded(steps: int, at: Sequence[int] | None) -> list[int]:
    """The steps to record at: those asked for, or about 100, evenly, from 0 to the last.

    Raises:
        ValueError: those asked for do not increase, or are out of range.
    """
    bearable(steps)
    found = sorted({round(step) for step in np.linspace(0, steps, 101)}) if at is None else listed("at", at)
    if not found or not all(map(whole, found)) or found[0] < 0 or found[-1] > steps or sorted(set(found)) != found:
        raise ValueError(f"recording steps must increase from 0 to at most {steps}, got {found[:10]}")
    return found


def moments(times: Numbers) -> Float[Tensor, " times"]:
    """Times of gradient flow, to record at.

    Raises:
        ValueError: they do not increase from 0, or there are fewer than two.
    """
    found = numbers("times", times).double()
    if found.ndim != 1 or len(found) < 2 or found[0] != 0 or not (found.diff() > 0).all() or not found.isfinite().all():
        told = found.flatten().tolist()[:10]
        raise ValueError(f"times must increase from 0, at least two of them, got {told}")
    return found


def full_rank(name: str, B: Float[Tensor, "runs out into"]) -> None:
    """Refuse matrices of a lower rank than their sizes allow: as feedback they lose directions of the error.

    Raises:
        ValueError: that of a run is.
    """
    ranks, wanted = torch.linalg.matrix_rank(B), min(B.shape[-2:])
    if bool((ranks < wanted).any()):
        run = int((ranks < wanted).int().argmax())
        raise ValueError(
            f"{name} of run {run} has rank {int(ranks[run])}, expected {wanted}, the full rank of a "
            f"{B.shape[-2]} by {B.shape[-1]} matrix: draw another"
        )


def floats(**tensors: Tensor) -> None:
    """Refuse what is no tensor of floating point numbers.

    Raises:
        ValueError: one is not.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is of type {found}, expected a tensor of floating point numbers")


def alike(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, or with none.

    Raises:
        ValueError: they differ, hold nothing, or are not of floating point numbers.
    """
    floats(**tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(tensors.values()))
    if len(set(shapes.values())) > 1 or first.ndim == 0 or first.numel() == 0:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes are {told}: expected the same of all, with at least one number")
