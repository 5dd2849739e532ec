"""The door of the public functions: what they are given becomes what their annotations say, or is refused.

Functions that are ``public`` or ``typed`` take arrays and lists for tensors, and NumPy's numbers for numbers.
What is of another type, shape, number format or device, or not finite, ends in a sentence that names the argument. The
door is passed once: public functions that call each other pay nothing for it.
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
"""Entries of a sequence that is looked at one by one."""

_depth: ContextVar[int] = ContextVar("depth", default=0)


def outermost() -> bool:
    """Whether a public function was called from outside, not by another one."""
    return _depth.get() == 1


def public(called: Called) -> Called:
    """Make a function take what its annotations say and refuse the rest: other types, shapes, and what is not finite.

    Of a class, what makes its instances. A function that then finds nan says so in a warning.

    Raises:
        ValueError: by what it returns, with a sentence that names the argument.
    """
    return _at_the_door(called, True, tells=True)


def recording(called: Called) -> Called:
    """As ``public`` for a function that says itself where its results hold nan."""
    return _at_the_door(called, True, tells=False)


def typed(called: Called) -> Called:
    """As ``public`` for types and number formats alone: of what looks at shapes and values itself, or reads results."""
    return _at_the_door(called, False, tells=False)


def _at_the_door(called: Called, strict: bool, *, tells: bool) -> Called:
    if isinstance(called, type):
        setattr(called, "__init__", _guarded(called.__init__, strict, False))  # noqa: B010
        return cast(Called, called)
    return cast(Called, _guarded(called, strict, tells))


def _guarded(called: Callable[..., Any], strict: bool, tells: bool) -> Callable[..., Any]:
    signature = inspect.signature(called)

    @cache
    def hints() -> dict[str, Any]:
        return get_type_hints(called)

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
                return called(*args, **kwargs)  # which says what is missing or too many
            _enter(bound.arguments, hints(), strict)
            try:
                found = called(*bound.args, **bound.kwargs)
            except _NO_ANSWER as error:
                why = str(error).partition("\n")[0]
                raise ValueError(
                    f"{called.__name__} finds no answer ({why}): numbers among its arguments are too large, too small "
                    "or too much alike"
                ) from None
            if tells:
                _tell_of_nan(called.__name__, found)
            return found
        finally:
            _depth.reset(token)

    return guarded


def _tell_of_nan(name: str, found: Any) -> None:
    """Warn of what finite numbers do not have for an answer."""
    if any(bool(part.isnan().any()) for part in _tensors(found)):
        warnings.warn(f"{name} found nan: for what it was given there is no number in its format", stacklevel=4)


def _tensors(found: Any) -> Iterator[Tensor]:
    """The floating point tensors of a result, in tuples, dictionaries and its own attributes."""
    if isinstance(found, Tensor):
        yield from (found,) if found.is_floating_point() else ()
        return
    held = vars(found) if is_dataclass(found) else found
    for part in held.values() if isinstance(held, dict) else held if isinstance(held, tuple) else ():
        if isinstance(part, (Tensor, tuple)):
            yield from _tensors(part)


class _Held(NamedTuple):
    """A tensor among the arguments and what is expected of it."""

    name: str
    tensor: Tensor
    hint: Any


def _enter(arguments: dict[str, Any], hints: Mapping[str, Any], strict: bool) -> None:
    """Put what is expected in the place of what came."""
    held: list[_Held] = []
    look = _Look(held, strict)
    for name, value in arguments.items():
        if name in hints:
            arguments[name] = look.fitted(name, value, hints[name])
    if strict:
        floating = {one.name: one.tensor for one in held if one.tensor.is_floating_point()}
        floating.pop("times", None)  # times to record at may have any format
        check_same_format(**floating)
        _shapes_fit(held)


def _shapes_fit(held: list[_Held]) -> None:
    """Refuse axes of one name that have different sizes."""
    with jaxtyped("context"):  # type: ignore[arg-type]
        for one in held:
            if not isinstance(one.tensor, one.hint):
                others = [f"{o.name} {list(o.tensor.shape)} as [{_axes(o.hint)}]" for o in held if o is not one]
                beside = f", beside {', '.join(others)}" if others else ""
                raise ValueError(
                    f"{one.name} has shape {list(one.tensor.shape)}, expected [{_axes(one.hint)}]{beside}: axes of one "
                    "name have one size"
                )


def _axes(hint: Any) -> str:
    return hint.dim_str.strip()


class _Look:
    """A look at each argument; what tensors there are is noted on the way."""

    def __init__(self, held: list[_Held], strict: bool) -> None:
        self._held, self._strict = held, strict

    def fitted(self, name: str, value: Any, hint: Any) -> Any:
        """The value as the annotation has it.

        Raises:
            ValueError: it cannot be.
        """
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
            return value  # which their function looks at itself
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
            return value  # ``Numbers``, which their function looks at itself
        if torch.device in members:
            return _device(name, value)
        wanted = [member for member in members if member is not types.NoneType]
        if set(wanted) == {float, int}:
            wanted = [int] if isinstance(value, (int, np.integer)) else [float]
        if len(wanted) > 1:  # one of a single value, or several of them
            single = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
            wanted = [one for one in wanted if (one in (int, float, SupportsIndex)) == single] or wanted
        for member in wanted[:-1]:
            try:
                return self.fitted(name, value, member)
            except ValueError:
                continue
        return self.fitted(name, value, wanted[-1])

    def _several(self, name: str, value: Any, origin: Any, inner: tuple[Any, ...]) -> Any:
        if issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} is {describe(value)}, expected names with their values")
            return {key: self.fitted(f"{name}[{key!r}]", one, inner[1]) for key, one in value.items()}
        if (
            not isinstance(value, Iterable)
            or isinstance(value, (str, bytes, Mapping))
            or getattr(value, "ndim", 1) != 1
        ):
            raise ValueError(f"{name} is {describe(value)}, expected a sequence, such as a list")
        if isinstance(value, Set) and origin is not Collection:
            raise ValueError(f"{name} is a set, which has no order: expected a sequence, such as a list")
        sized = isinstance(value, Sized) and len(value) > _LONGEST
        found = [] if sized else list(islice(value, _LONGEST + 1))
        if sized or len(found) > _LONGEST:
            raise ValueError(f"{name} has more than {_LONGEST} entries, expected fewer")
        if isinstance(value, Tensor) and all(one.numel() == 1 for one in found):
            found = value.tolist()
        kinds = inner if origin is tuple and inner[-1] is not Ellipsis else (inner[0],) * len(found)
        if len(kinds) != len(found):
            raise ValueError(f"{name} has {len(found)} entries, expected {len(kinds)}")
        fitted = [self.fitted(f"{name}[{place}]", *pair) for place, pair in enumerate(zip(found, kinds, strict=True))]
        return tuple(fitted) if origin is tuple else fitted

    def _named(self, name: str, value: Any, kind: Any) -> Any:
        """A named tuple with every field looked at."""
        hints = _hints_of(kind)
        parts = {field: self.fitted(f"{name}.{field}", getattr(value, field), hints[field]) for field in kind._fields}
        found = value._replace(**parts)
        if self._strict and hasattr(found, "fits"):
            found.fits(name)
        return found

    def _instance(self, name: str, value: Any, kind: Any) -> Any:
        if kind is Callable or getattr(kind, "__name__", "") == "Callable":
            if not callable(value):
                raise ValueError(f"{name} is {describe(value)}, expected a function")
        elif not isinstance(value, kind):
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            told_kind = {str: "a text", torch.dtype: "a torch.dtype, such as torch.float64"}.get(
                kind, f"{article} {kind.__name__} ({kind.__module__})"
            )
            raise ValueError(f"{name} is {describe(value)}, expected {told_kind}")
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
        found, plain = dense_tensor(name, value)
        wanted = {"float64": _FLOATS}.get(hint.dtypes[-1]) if "float64" in hint.dtypes else None
        dtypes = wanted or [getattr(torch, kind) for kind in hint.dtypes if hasattr(torch, kind)]
        if plain and found.dtype not in dtypes and wanted and found.dtype in (torch.int64, torch.uint8):
            found = found.double()
        if found.dtype not in dtypes:
            expected = (
                "float32 or float64, such as .double() gives" if wanted else f"{hint.__name__.split('[')[0]} numbers"
            )
            raise ValueError(f"{name} is in {str(found.dtype).removeprefix('torch.')}, expected {expected}")
        if self._strict and not found.numel():
            raise ValueError(f"{name} has shape {list(found.shape)}, expected at least one number")
        if self._strict and wanted:
            check_finite(name, found)
        self._held.append(_Held(name, found, hint))
        return found


@cache
def _hints_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _device(name: str, value: Any) -> torch.device:
    try:
        found = torch.device(value)
        torch.empty(1, device=found)
    except Exception:  # which error says that a device is not there differs from one kind of device to the next
        raise ValueError(f"{name} is {describe(value)}, expected a device of this machine, such as 'cpu'") from None
    if found.type == "meta":
        raise ValueError(f"{name} is 'meta', which holds no numbers: expected a device such as 'cpu'")
    return found
