"""Checks of arguments, each with the sentence that refuses: what came, what was expected, what to do.

A function named ``check_…`` returns nothing and refuses; the others return the value in the form that is worked with.
Every refusal is a ``ValueError``. The public functions of the theory have most of this done by their annotations, see
``falign.theory._coerce``; what annotations cannot say, such as a range, is asked for here.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import isfinite, prod
from operator import index
from reprlib import Repr
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

Numbers: TypeAlias = Tensor | ArrayLike | Sequence[Any] | float | int
"""Tensors, arrays, nested sequences or plain numbers."""

Value = TypeVar("Value")
Real = TypeVar("Real", int, float)

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def describe(value: Any) -> str:
    """Describe an argument in a few words, for the sentence that refuses it."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array {list(value.shape)} of {value.dtype}"
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no decimal text for integers of thousands of digits
        return f"one of type {type(value).__name__} with too many digits to be shown"


# Single numbers.

_LONGEST = 10**9
"""Most steps of a run; each takes ten microseconds or more."""


def is_number(value: Any) -> bool:
    """Test for a finite real number; booleans are none."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def is_whole(value: Any) -> bool:
    """Test for a value of an integer type; booleans are of none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def positive(name: str, value: Real) -> Real:
    """Return a number above 0.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} is {describe(value)}, expected a positive number")
    return value


def non_negative(name: str, value: Real) -> Real:
    """Return a number of at least 0.

    Raises:
        ValueError: it is not a finite number of at least 0.
    """
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} is {describe(value)}, expected a number of at least 0")
    return value


def fraction(name: str, value: Real, *, below: bool = True) -> Real:
    """Return a number above 0 and below 1, or up to 1 unless ``below``.

    Raises:
        ValueError: it is not such a number.
    """
    if not (is_number(value) and 0 < value <= 1) or (below and value == 1):
        raise ValueError(
            f"{name} is {describe(value)}, expected a number above 0 and {'below' if below else 'up to'} 1"
        )
    return value


def whole_number(name: str, value: Any) -> int:
    """Convert a value of any integer type to int.

    Raises:
        ValueError: its type is not one of integers (1e9 is a float), or it is beyond 2⁶³ (a seed: 2⁴⁰⁹⁶).
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or (isinstance(value, Tensor) and value.dtype is torch.bool):
        raise ValueError(
            f"{name} must be an integer, got {describe(value)} of type {type(value).__name__}: write int({name})"
        )
    bits, limit = (4096, "2⁴⁰⁹⁶") if "seed" in name else (63, "2⁶³")
    if number.bit_length() > bits:
        raise ValueError(f"{name} must be below {limit}, got {describe(value)}")
    return number


def check_sizes(**sizes: int | None) -> None:
    """Refuse sizes that are not whole numbers from 1 on; None passes."""
    for name, size in sizes.items():
        if size is not None:
            whole_between(name, size, 1)


def whole_between(name: str, value: int, least: int, most: int | None = None) -> int:
    """Return a whole number from ``least`` on, up to ``most`` if that is given.

    Raises:
        ValueError: it is not of an integer type, out of that range, or beyond 2⁶³, which no tensor could hold.
    """
    if not is_whole(value) or value < least or (most is not None and value > most):
        limit = "on" if most is None else f"on, up to {most}"
        raise ValueError(f"{name} is {describe(value)}, expected a whole number from {least} {limit}")
    whole_number(name, value)
    return value


def step_count(steps: int, least: int = 0) -> int:
    """Return a number of steps that a run can make.

    Raises:
        ValueError: it is not a whole number from ``least`` on, or more than a run could make in months.
    """
    check_steps(whole_between("steps", steps, least))
    return steps


def check_steps(steps: int) -> None:
    """Refuse more steps than a run could make in months."""
    if steps > _LONGEST:
        raise ValueError(f"steps is {describe(steps)}, expected at most {_LONGEST}: more would take months")


# Choices by name, lists, and the steps or times to record at.

_ENTRIES = 10**7
"""Most entries of a list; looking at so many one by one takes seconds."""


def named(kind: str, name: Any, table: Mapping[str, Value]) -> Value:
    """Look up an entry of a table.

    Raises:
        ValueError: the table has no entry of that name.
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {kind} {describe(name)}: choose one of {', '.join(table)}")
    return table[name]


def one_of(name: str, value: Value, choices: Sequence[Any]) -> Value:
    """Return a value that is among the choices.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {describe(value)}, expected one of {', '.join(choices)}")
    return value


def as_list(name: str, given: Any) -> list[Any]:
    """Convert a sequence, tensor or array of one axis to a list.

    Raises:
        ValueError: it is a single value, a string, or too long.
    """
    if not isinstance(given, Iterable) or isinstance(given, str) or getattr(given, "ndim", 1) != 1:
        raise ValueError(f"{name} is {describe(given)}, expected a sequence, such as a list")
    if isinstance(given, Sequence) and len(given) > _ENTRIES:
        raise ValueError(f"{name} has {len(given)} entries, expected at most {_ENTRIES}")
    return given.tolist() if isinstance(given, (Tensor, np.ndarray)) else list(given)


def recording_steps(steps: int, at: Sequence[int] | None) -> list[int]:
    """Return the steps to record at: those given, or about 100, evenly from 0 to the last.

    Raises:
        ValueError: those given do not increase, or are out of range.
    """
    check_steps(steps)
    chosen = sorted({round(step) for step in np.linspace(0, steps, 101)}) if at is None else as_list("at", at)
    whole = bool(chosen) and all(map(is_whole, chosen))
    if not whole or chosen[0] < 0 or chosen[-1] > steps or sorted(set(chosen)) != chosen:
        raise ValueError(f"recording steps must increase from 0 to at most {steps}, got {chosen[:10]}")
    return chosen


def recording_times(times: Numbers) -> Float[Tensor, " times"]:
    """Return times of gradient flow to record at, in float64.

    Raises:
        ValueError: they do not increase from 0, or there are fewer than two.
    """
    t = real_tensor("times", times).double()
    if t.ndim != 1 or len(t) < 2 or t[0] != 0 or not (t.diff() > 0).all() or not t.isfinite().all():
        raise ValueError(f"times must increase from 0, at least two of them, got {t.flatten().tolist()[:10]}")
    return t


def check_recording(t: int, at: Sequence[int]) -> None:
    """Refuse steps to record at that do not increase from an engine's step t on."""
    if not at or any(later <= earlier for earlier, later in pairwise([t - 1, *at])):
        raise ValueError(f"recording steps must increase from the engine's t={t} on, got {list(at)[:10]}")
    check_steps(at[-1])


# Tensors: numbers of any kind made into one, then what a tensor must be.

_SQUARABLE = 1e-130, 1e150
"""Range of the largest number such that its square, and that of numbers a rounding error as large, is normal."""

_LARGEST_LABEL = 2**53
"""From here on float64 skips whole numbers."""


def dense_tensor(name: str, given: Any) -> tuple[Tensor, bool]:
    """Convert numbers to a dense tensor; also say whether they were plain ones, not a tensor or an array.

    The type of an array is kept.

    Raises:
        ValueError: they are not numbers, make no rectangular table, or are a tensor without numbers (meta).
    """
    if isinstance(given, Tensor):
        if given.is_meta or given.is_nested or given.is_quantized:
            raise ValueError(f"{name} is {describe(given)}, expected a plain tensor with numbers in it")
        return (given if given.layout is torch.strided else given.to_dense()), False
    sequence = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, (str, bytes, np.ma.MaskedArray))
    if not sequence and not isinstance(given, (int, float, complex, np.generic)) and not hasattr(given, "__array__"):
        raise ValueError(f"{name} is {describe(given)}, expected real numbers: a tensor, an array or lists")
    if isinstance(given, Sequence) and len(given) > _ENTRIES:
        raise ValueError(f"{name} has {len(given)} entries, expected a tensor or an array of so many")
    try:
        array = np.array(given)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{name} are no table of numbers ({error}): pass a tensor, an array or lists") from None
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16:
        raise ValueError(f"{name} are of type {array.dtype}, expected real numbers: a tensor, an array or lists")
    # PyTorch knows neither long double ("g") nor bytes in the other order.
    kind = np.dtype(np.float64) if array.dtype.char == "g" else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=kind, order="C")), not isinstance(given, np.ndarray)


def real_tensor(name: str, given: Numbers) -> Tensor:
    """Convert real numbers to a dense tensor on the CPU, without a graph.

    Raises:
        ValueError: they are not real numbers.
    """
    tensor = dense_tensor(name, given)[0].detach().cpu()
    if tensor.is_complex():
        raise ValueError(f"{name} are complex ({tensor.dtype}): pass real numbers, such as x.real")
    return tensor if isinstance(given, Tensor) or tensor.dtype == torch.bool else tensor.double()


def float_tensor(name: str, given: Numbers) -> Tensor:
    """Convert real numbers to float64 on the CPU; a floating point tensor keeps its type and device.

    Raises:
        ValueError: they are not real numbers, or a tensor of less than float32.
    """
    if not (isinstance(given, Tensor) and given.is_floating_point()):
        return real_tensor(name, given).double()
    if given.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is in {given.dtype}, expected float32 or float64: pass .float() of it")
    return dense_tensor(name, given)[0].detach()


def feature_table(name: str, given: Numbers) -> Float[Tensor, "n d"]:
    """Convert finite numbers, a row a point, to float64 on the CPU.

    Raises:
        ValueError: they have not two axes, an axis is empty, or one is not finite.
    """
    table = real_tensor(name, given).double()
    if table.ndim != 2:
        raise ValueError(f"{name} have shape {tuple(table.shape)}, expected (points, features): flatten or unsqueeze")
    if table.numel() == 0:
        raise ValueError(f"{name} have shape {tuple(table.shape)}: expected at least one point and one feature")
    check_finite(f"the {name}", table)
    return table


def class_labels(given: Numbers, points: int) -> Int64[Tensor, " n"]:
    """Convert labels, one whole number a point, to int64 on the CPU.

    Raises:
        ValueError: the shape is another, or a label is not whole.
    """
    labels = real_tensor("labels", given)
    if labels.ndim != 1:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected one whole number a point: of one-hot labels argmax(1)"
        )
    if len(labels) != points:
        raise ValueError(f"{points} inputs and {len(labels)} labels: one label an input")
    if labels.is_floating_point():
        odd = ~((labels == labels.round()) & (labels.abs() <= _LARGEST_LABEL))
        if odd.any():
            raise ValueError(f"label {float(labels[odd][0]):g} is no whole number: classes are numbered")
    return labels.long()


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds nan or infinity."""
    if not tensor.isfinite().all():
        raise ValueError(f"{int((~tensor.isfinite()).sum())} numbers of {name} are not finite: clean them first")


def check_squarable(name: str, tensor: Tensor) -> None:
    """Refuse numbers whose squares float64 cannot hold; all zeros pass."""
    largest = float(tensor.abs().max())
    if largest and not _SQUARABLE[0] <= largest <= _SQUARABLE[1]:
        raise ValueError(f"the largest of the {name} is {largest:g}, its square beyond float64: scale the data first")


def check_full_rank(name: str, B: Float[Tensor, "runs out into"]) -> None:
    """Refuse matrices of less than full rank: as feedback they lose directions of the error."""
    ranks, full = torch.linalg.matrix_rank(B), min(B.shape[-2:])
    if bool((ranks < full).any()):
        run = int((ranks < full).int().argmax())
        raise ValueError(
            f"{name} of run {run} has rank {int(ranks[run])}, expected {full}, the full rank of a "
            f"{B.shape[-2]} by {B.shape[-1]} matrix: draw another"
        )


def check_floating(**tensors: Tensor) -> None:
    """Refuse anything but tensors of floating point numbers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is of type {kind}, expected a tensor of floating point numbers")


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, without numbers, or not of floating point."""
    check_floating(**tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(tensors.values()))
    if len(set(shapes.values())) > 1 or first.ndim == 0 or first.numel() == 0:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes are {listed}: expected the same of all, with at least one number")


def check_same_format(**tensors: Tensor) -> None:
    """Refuse tensors of different number formats or on different devices."""
    for (first, one), (name, other) in pairwise(tensors.items()):
        if (other.dtype, other.device) != (one.dtype, one.device):
            raise ValueError(
                f"{name} is {other.dtype} on {other.device}, {first} {one.dtype} on {one.device}: pass one number "
                f"format on one device, such as {name}.to({first})"
            )


# Memory.


def check_memory(what: str, *sizes: int) -> None:
    """Refuse float64 arrays of these sizes if this machine's memory cannot hold them."""
    needed = 8 * prod(sizes)
    if needed > _memory():
        raise ValueError(
            f"{what} of {' × '.join(map(str, sizes))} numbers would take {needed / 2**30:.3g} GiB, of the "
            f"{_memory() / 2**30:.3g} GiB of this machine: ask for less"
        )


@cache
def _memory() -> int:
    """Bytes of this machine's memory; 4 TiB where the system does not say, so that nothing is refused."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**42
