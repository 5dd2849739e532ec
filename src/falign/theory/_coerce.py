"""Decorators that make arguments what the annotations say: ``public``, ``recording`` and ``typed``.

A decorated function takes arrays and lists for tensors, and NumPy's numbers for numbers. Arguments of another type,
shape, number format or device, and numbers that are not finite, are refused in a sentence that names the argument.
This is done for the outermost call alone: decorated functions that call each other pay nothing for it.
"""

import inspect
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set, Sized
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import cache, wraps
from itertools import islice
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from falign._validation import check_finite, check_same_format, dense_tensor, describe, is_number, one_of, whole_number

Called = TypeVar("Called", bound=Callable[..., Any])

_FLOATS = (torch.float32, torch.float64)
_NO_ANSWER = (ArithmeticError, np.linalg.LinAlgError, torch.linalg.LinAlgError)  # pyright: ignore
_LONGEST = 10**7
"""Most entries of a sequence; looking at so many one by one takes seconds."""

_depth: ContextVar[int] = ContextVar("depth", default=0)
"""How many decorated functions are being called, each by the one before."""


def public(called: Called) -> Called:
    """Decorate a function, or a class, whose arguments must be of the annotated types and shapes and be finite.

    The decorated function raises a ValueError that names the argument, and warns if its result holds nan.
    """
    return _decorated(called, True, warns=True)


def recording(called: Called) -> Called:
    """Decorate as ``public`` does, without the warning: for functions that themselves say where a result is nan."""
    return _decorated(called, True, warns=False)


def typed(called: Called) -> Called:
    """Decorate as ``public`` does, for types and number formats alone: the function checks shapes and values itself."""
    return _decorated(called, False, warns=False)


def outermost() -> bool:
    """Test whether the decorated function that asks was called from outside, not by another decorated one."""
    return _depth.get() == 1


def _decorated(called: Called, strict: bool, *, warns: bool) -> Called:
    if isinstance(called, type):
        setattr(called, "__init__", _guarded(called.__init__, strict, False))  # noqa: B010
        return cast(Called, called)
    return cast(Called, _guarded(called, strict, warns))


def _guarded(called: Callable[..., Any], strict: bool, warns: bool) -> Callable[..., Any]:
    signature = inspect.signature(called)

    @cache
    def hints() -> dict[str, Any]:
        return get_type_hints(called)  # at the first call: an annotation may name what is defined further down

    @wraps(called)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        depth = _depth.get()
        token = _depth.set(depth + 1)
        try:
            if depth:
                return called(*args, **kwargs)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return called(*args, **kwargs)  # Python's own message says what is missing or too many
            _coerce(bound.arguments, hints(), strict)
            try:
                result = called(*bound.args, **bound.kwargs)
            except _NO_ANSWER as error:
                why = str(error).partition("\n")[0]
                raise ValueError(
                    f"{called.__name__} finds no answer ({why}): numbers among its arguments are too large, too small "
                    "or too much alike"
                ) from None
            if warns:
                _warn_of_nan(called.__name__, result)
            return result
        finally:
            _depth.reset(token)

    return guarded


def _warn_of_nan(name: str, result: Any) -> None:
    if any(bool(part.isnan().any()) for part in _tensors(result)):
        warnings.warn(f"{name} found nan: for these arguments the result is no number in their format", stacklevel=4)


def _tensors(result: Any) -> Iterator[Tensor]:
    """Iterate over the floating point tensors of a result, in tuples, dictionaries and attributes of dataclasses."""
    if isinstance(result, Tensor):
        yield from (result,) if result.is_floating_point() else ()
        return
    parts = vars(result) if is_dataclass(result) else result
    for part in parts.values() if isinstance(parts, dict) else parts if isinstance(parts, tuple) else ():
        if isinstance(part, (Tensor, tuple)):
            yield from _tensors(part)


class _Given(NamedTuple):
    """A tensor among the arguments, with its annotation."""

    name: str
    tensor: Tensor
    hint: Any


def _coerce(arguments: dict[str, Any], hints: Mapping[str, Any], strict: bool) -> None:
    """Replace the arguments, in their dictionary, by what their annotations say."""
    given: list[_Given] = []
    coercion = _Coercion(given, strict)
    for name, value in arguments.items():
        if name in hints:
            arguments[name] = coercion.coerced(name, value, hints[name])
    if strict:
        floating = {name: tensor for name, tensor, _ in given if tensor.is_floating_point()}
        floating.pop("times", None)  # times to record at may have any format
        check_same_format(**floating)
        _check_axes(given)


def _check_axes(given: list[_Given]) -> None:
    """Refuse axes that have one name in the annotations and different sizes."""
    with jaxtyped("context"):  # type: ignore[arg-type]  # within it jaxtyping remembers the sizes of axes
        for name, tensor, hint in given:
            if not isinstance(tensor, hint):
                others = [f"{other} {list(t.shape)} as [{_axes(h)}]" for other, t, h in given if other != name]
                beside = f", beside {', '.join(others)}" if others else ""
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, expected [{_axes(hint)}]{beside}: axes of one name have "
                    "one size"
                )


def _axes(hint: Any) -> str:
    return hint.dim_str.strip()


class _Coercion:
    """Coerces one argument after the other, and keeps the tensors among them for what is asked of all together."""

    def __init__(self, given: list[_Given], strict: bool) -> None:
        self._given, self._strict = given, strict

    def coerced(self, name: str, value: Any, hint: Any) -> Any:
        """Coerce a value to an annotation; see ``falign._validation`` for what tensors and numbers may be."""
        origin = get_origin(hint)
        if hint in (Any, object) or isinstance(hint, TypeVar):
            return value
        if origin in (Union, types.UnionType):
            return self._any_of(name, value, get_args(hint))
        if origin is Literal:
            return one_of(name, value, get_args(hint))
        if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Collection)):
            return self._several(name, value, origin, get_args(hint))
        if origin is not None:  # a callable with its arguments
            return self._instance(name, value, origin)
        if isinstance(hint, type) and issubclass(hint, AbstractArray):
            return self._tensor(name, value, hint)
        return self._single(name, value, hint)

    def _single(self, name: str, value: Any, hint: Any) -> Any:
        if hint is float:
            return self._number(name, value)
        if hint is SupportsIndex:
            return value  # seeds, which the function checks itself
        if hint is int:
            return whole_number(name, value)
        if hint is bool:
            if not isinstance(value, (bool, np.bool_)):
                raise ValueError(f"{name} is {describe(value)}, expected True or False")
            return bool(value)
        if hint is Tensor:
            return dense_tensor(name, value)[0]
        if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
            return self._named(name, self._instance(name, value, hint), hint)
        return self._instance(name, value, hint)

    def _any_of(self, name: str, value: Any, members: tuple[Any, ...]) -> Any:
        if value is None and types.NoneType in members:
            return None
        if Tensor in members:
            return value  # ``Numbers``, which the function converts itself
        if torch.device in members:
            return _device(name, value)
        wanted = [member for member in members if member is not types.NoneType]
        if set(wanted) == {float, int}:
            wanted = [int] if isinstance(value, (int, np.integer)) else [float]
        if len(wanted) > 1:  # of a number or a sequence of them, try the one that it looks like
            single = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
            wanted = [one for one in wanted if (one in (int, float, SupportsIndex)) == single] or wanted
        for member in wanted[:-1]:
            try:
                return self.coerced(name, value, member)
            except ValueError:
                continue
        return self.coerced(name, value, wanted[-1])

    def _several(self, name: str, value: Any, origin: Any, inner: tuple[Any, ...]) -> Any:
        if issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} is {describe(value)}, expected names with their values")
            return {key: self.coerced(f"{name}[{key!r}]", one, inner[1]) for key, one in value.items()}
        if (
            not isinstance(value, Iterable)
            or isinstance(value, (str, bytes, Mapping))
            or getattr(value, "ndim", 1) != 1
        ):
            raise ValueError(f"{name} is {describe(value)}, expected a sequence, such as a list")
        if isinstance(value, Set) and origin is not Collection:
            raise ValueError(f"{name} is a set, which has no order: expected a sequence, such as a list")
        sized = isinstance(value, Sized) and len(value) > _LONGEST
        entries = [] if sized else list(islice(value, _LONGEST + 1))  # an iterator may never end
        if sized or len(entries) > _LONGEST:
            raise ValueError(f"{name} has more than {_LONGEST} entries, expected fewer")
        if isinstance(value, Tensor) and all(entry.numel() == 1 for entry in entries):
            entries = value.tolist()
        kinds = inner if origin is tuple and inner[-1] is not Ellipsis else (inner[0],) * len(entries)
        if len(kinds) != len(entries):
            raise ValueError(f"{name} has {len(entries)} entries, expected {len(kinds)}")
        pairs = enumerate(zip(entries, kinds, strict=True))
        coerced = [self.coerced(f"{name}[{place}]", entry, kind) for place, (entry, kind) in pairs]
        return tuple(coerced) if origin is tuple else coerced

    def _named(self, name: str, value: Any, kind: Any) -> Any:
        """Coerce every field of a named tuple, then have it check itself if it can."""
        hints = _hints_of(kind)
        parts = {field: self.coerced(f"{name}.{field}", getattr(value, field), hints[field]) for field in kind._fields}
        coerced = value._replace(**parts)
        if self._strict and hasattr(coerced, "check"):
            coerced.check()
        return coerced

    def _instance(self, name: str, value: Any, kind: Any) -> Any:
        if kind is Callable or getattr(kind, "__name__", "") == "Callable":
            if not callable(value):
                raise ValueError(f"{name} is {describe(value)}, expected a function")
        elif not isinstance(value, kind):
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            expected = {str: "a text", torch.dtype: "a torch.dtype, such as torch.float64"}.get(
                kind, f"{article} {kind.__name__} ({kind.__module__})"
            )
            raise ValueError(f"{name} is {describe(value)}, expected {expected}")
        return value

    def _number(self, name: str, value: Any) -> float:
        real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not real or (self._strict and not is_number(value)):
            raise ValueError(f"{name} is {describe(value)}, expected a finite number")
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is {describe(value)}, expected a number that float64 holds") from None

    def _tensor(self, name: str, value: Any, hint: Any) -> Tensor:
        tensor, plain = dense_tensor(name, value)
        wanted = {"float64": _FLOATS}.get(hint.dtypes[-1]) if "float64" in hint.dtypes else None
        dtypes = wanted or [getattr(torch, kind) for kind in hint.dtypes if hasattr(torch, kind)]
        if plain and tensor.dtype not in dtypes and wanted and tensor.dtype in (torch.int64, torch.uint8):
            tensor = tensor.double()  # plain numbers such as [1, 2] are meant as floating point; an array of int is not
        if tensor.dtype not in dtypes:
            expected = (
                "float32 or float64, such as .double() gives" if wanted else f"{hint.__name__.split('[')[0]} numbers"
            )
            raise ValueError(f"{name} is in {str(tensor.dtype).removeprefix('torch.')}, expected {expected}")
        if self._strict and not tensor.numel():
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected at least one number")
        if self._strict and wanted:
            check_finite(name, tensor)
        self._given.append(_Given(name, tensor, hint))
        return tensor


@cache
def _hints_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _device(name: str, value: Any) -> torch.device:
    try:
        device = torch.device(value)
        torch.empty(1, device=device)
    except Exception:  # each kind of device has an error of its own for one that is not there
        raise ValueError(f"{name} is {describe(value)}, expected a device of this machine, such as 'cpu'") from None
    if device.type == "meta":
        raise ValueError(f"{name} is 'meta', which holds no numbers: expected a device such as 'cpu'")
    return device
