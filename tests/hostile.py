"""Hostile arguments in the place of good ones, and the verdict on what a call makes of them."""

import dis
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PACKAGE = Path(__import__("falign").__file__).parent
_RAISE = dis.opmap["RAISE_VARARGS"]


def anything() -> Iterator[tuple[str, Any]]:
    """Values that hardly any argument takes."""
    yield from {
        "None": None,
        "text": "text",
        "text with NUL": "a\0b",
        "bytes": b"1",
        "3.5": 3.5,
        "True": True,
        "-1": -1,
        "0": 0,
        "10**12": 10**12,
        "10**400": 10**400,
        "10**5000": 10**5000,
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "1e308": 1e308,
        "5e-324": 5e-324,
        "1j": 1j,
        "[]": [],
        "ragged": [[1], [1, 2]],
        "[None]": [None],
        "['x']": ["x"],
        "[nan]": [math.nan],
        "object": object(),
        "a class": int,
        "{}": {},
        "a set": {1, 2},
        "NumPy float": np.float32(0.5),
        "NumPy int": np.int64(2),
        "NumPy bool": np.bool_(True),
        "NumPy text": np.array(["a", "b"]),
        "NumPy objects": np.array([None, 1], dtype=object),
        "empty": torch.empty(0),
        "empty 0 × 0": torch.empty(0, 0),
        "0-d": torch.tensor(0.5),
        "1-d": torch.ones(2, dtype=torch.float64),
        "4-d": torch.ones(2, 1, 2, 3, dtype=torch.float64),
        "meta": torch.ones(2, 2, device="meta"),
        "range": range(10**12),
    }.items()


def same(good: Any) -> Iterator[tuple[str, Any]]:
    """The same numbers in another wrapping: refused, or answered with the same result."""
    if isinstance(good, Tensor):
        if good.is_floating_point() and good.ndim:
            yield "NumPy", good.numpy()
            yield "list", good.tolist()
            yield "strided", torch.stack([good, good], -1)[..., 0]
            yield "with gradient", good.clone().requires_grad_()
            yield "Fortran order", np.asfortranarray(good.numpy())
            yield "big-endian", good.numpy().astype(">f8")
            if good.ndim > 1:
                yield "sparse", good.to_sparse()
    elif isinstance(good, (list, tuple)) and not hasattr(good, "_fields"):
        yield "the other sequence", tuple(good) if isinstance(good, list) else list(good)
        if good and all(type(one) in (int, float) for one in good):
            yield "NumPy", np.array(good)
            yield "tensor", torch.tensor(good, dtype=torch.float64 if isinstance(good[0], float) else torch.int64)
            yield "NumPy numbers", [np.array(one)[()] for one in good]
    elif type(good) is int:
        yield "NumPy int", np.int64(good)
    elif type(good) is float:
        yield "NumPy float", np.float64(good)


def other(good: Any) -> Iterator[tuple[str, Any]]:
    """Numbers that differ from the good ones in one way."""
    if isinstance(good, Tensor):
        yield from _other_tensors(good)
    elif isinstance(good, tuple) and hasattr(good, "_fields"):
        for field in good._fields:
            part = getattr(good, field)
            for name, value in [*anything(), *other(part)]:
                yield f".{field} {name}", good._replace(**{field: value})
    elif isinstance(good, (list, tuple)) and good:
        kind = type(good)
        for name, value in anything():
            if name != "range":
                yield f"[0] {name}", kind([value, *good[1:]])
        if isinstance(good[0], Tensor):
            for name, value in [*_other_tensors(good[0]), *same(good[0])]:
                yield f"[0] {name}", kind([value, *good[1:]])
        yield "backwards", kind(reversed(good))
        yield "one more", kind([*good, good[0]])
        yield "one less", kind(good[1:])


def _other_tensors(good: Tensor) -> Iterator[tuple[str, Any]]:
    if good.ndim:
        yield "one more row", torch.cat([good, good[:1]])
        yield "no row", good[:0]
        yield "one row", good[:1]
        yield "one less column", good[..., 1:]
        yield "one more axis", good[None]
        yield "one axis less", good[0]
        yield "expanded", good[:1].expand_as(good)
    yield "integers", good.to(torch.int64)
    yield "bool", good > 0
    yield "complex", good.to(torch.complex128)
    yield "meta", good.to("meta")
    if good.is_floating_point():
        yield "float32", good.float()
        yield "half", good.half()
        yield "bfloat16", good.bfloat16()
        yield "zeros", torch.zeros_like(good)
        yield "negative", -good
        yield "1e200", good * 1e200
        yield "1e-200", good * 1e-200
        for name, bad in (("nan", math.nan), ("inf", math.inf)):
            spoilt = good.clone()
            spoilt.view(-1)[:1] = bad
            yield f"a {name}", spoilt
        yield "masked", np.ma.masked_array(good.numpy(), mask=good.numpy() > 0)


def numbers_in(found: Any, depth: int = 0) -> list[Tensor]:
    """Every number that a result holds, as tensors."""
    if isinstance(found, Tensor):
        return [found.detach()]
    if isinstance(found, int) and abs(found) >= 2**53:
        return []
    if isinstance(found, (bool, int, float, np.number)):
        return [torch.tensor(float(found), dtype=torch.float64)]
    if depth > 4:
        return []
    if isinstance(found, Mapping):
        parts: list[Any] = list(found.values())
    elif is_dataclass(found) and not isinstance(found, type):
        parts = [getattr(found, field.name) for field in fields(found)]
    elif isinstance(found, (list, tuple)):
        parts = list(found)
    else:
        return []
    return [number for part in parts for number in numbers_in(part, depth + 1)]


def alike(one: Any, two: Any) -> bool:
    """Whether two results hold the same numbers, to the rounding of another memory layout."""
    left, right = numbers_in(one), numbers_in(two)
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


class TookTooLongError(BaseException):
    """A call that did not end."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise ``TookTooLongError`` in a block that takes longer."""

    def ring(*_: Any) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raised_on_purpose(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is ours and raises by itself: no error of a library or of the language."""
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return Path(code.co_filename).is_relative_to(_PACKAGE) and code.co_code[trace.tb_lasti] == _RAISE


def fault(
    call: Callable[..., Any],
    arguments: dict[str, Any],
    expected: Any,
    *,
    equal: bool,
    documented: bool = False,
    seconds: float = 60,
) -> str:
    """What is wrong with the answer to hostile arguments; empty if it is right, or a sentence.

    Args:
        call: What is called.
        arguments: Hostile ones.
        expected: What the good ones gave.
        equal: Whether an answer must hold the same numbers.
        documented: Whether the docstring says where there is nan.
        seconds: How long it may take.
    """
    try:
        with warnings.catch_warnings(record=True) as heard, within(seconds):
            warnings.simplefilter("always")
            found = call(**arguments)
    except TookTooLongError:
        return f"took more than {seconds} s"
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        if not raised_on_purpose(error.__traceback__):
            return f"raw {type(error).__name__}: {text[:200]}"
        listed = "\n- " in text  # every problem of a conversion, one a line
        return "" if 20 < len(text) < 3000 and (listed or "\n" not in text) else f"no sentence: {text[:200]!r}"
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error)[:200]}"
    if raw := [w for w in heard if not issubclass(w.category, UserWarning)]:
        return f"a warning of the libraries: {raw[0].message}"
    nans = lambda held: sum(int(part.isnan().sum()) for part in numbers_in(held))  # noqa: E731
    if equal and not alike(found, expected):
        return "another answer for the same numbers"
    said = heard or getattr(found, "failing", ())  # by a warning, or by the verdict of a theorem's check
    if nans(found) > nans(expected) and not said and not documented:
        return "nan without a word"
    return ""
