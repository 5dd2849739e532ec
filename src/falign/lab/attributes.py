"""What a model keeps in Python beside its tensors: what a checkpoint can hold of it, and what it cannot."""

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import count
from operator import length_hint
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OWN = frozenset({*vars(nn.Module()), "_ddp_params_and_buffers_to_ignore"})
"""Attributes of every module, and of a converted one; its others begin with ``_falign``."""
_DEPTH = 8
"""So many levels within an attribute are looked at."""


class Attributes:
    """The attributes of a model's modules, as far as a file can hold them, from the moment at which this was made.

    Held are None, numbers, texts, tensors without a history, generators of ``random``, ``numpy.random`` and torch,
    and lists, tuples and dicts of these; and which parameters learn.

    Args:
        model: The model, before its first step.
        loose: Names of attributes that differ from one making of the model to the next.
    """

    def __init__(self, model: nn.Module, loose: Iterable[str] = ()) -> None:
        self._model = model
        self._loose = frozenset(loose)
        self._before = held(model)

    def state(self) -> dict[str, Any]:
        """{name: value} of what has changed, as lists of tensors, numbers and texts."""
        return {
            name: value
            for name, value in held(self._model).items()
            if name in self._loose or name not in self._before or not _alike(value, self._before[name])
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave; what it does not name becomes what it was at first.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: This is the state of another model.
        """
        now = held(self._model)
        for name, value in {**self._before, **state}.items():
            if name in now and _alike(now[name], value):
                continue
            path, _, key = name.rpartition(".")
            if isinstance(value, list) and value[0] == "learns":
                self._model.get_parameter(path).requires_grad_(value[1])
            else:
                values = vars(self._model.get_submodule(path))
                values[key] = _decoded(value, values.get(key))


def held(model: nn.Module) -> dict[str, Any]:
    """{name: value} of all attributes that a file can hold, as lists of tensors, numbers and texts."""
    registered, found = _registered(model), {}
    for path, module in _modules(model):
        for key, value in vars(module).items():
            if key not in _OWN and not key.startswith("_falign"):
                try:
                    found[f"{path}.{key}".lstrip(".")] = _encoded(value, registered)
                except TypeError:
                    continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{path}.{key}.requires_grad".lstrip(".")] = ["learns", parameter.requires_grad]
    return found


def marks(model: nn.Module, package: str) -> dict[str, Any]:
    """{name: what tells a value from another} of all that a model, and the code that it is made of, keep in Python.

    Args:
        model: The model.
        package: Of the code of this package, classes and variables of modules count too.
    """
    registered = _registered(model)
    found = {
        f"{path}.{key}".lstrip("."): _mark(value, set(registered), _DEPTH)
        for path, module in _modules(model)
        for key, value in vars(module).items()
        if key not in _OWN and not key.startswith("_falign")
    }
    kinds = {kind for _, module in _modules(model) for kind in type(module).__mro__}
    kinds = {kind for kind in kinds if kind.__module__.partition(".")[0] == package}
    places: dict[str, Mapping[str, Any]] = {f"{kind.__module__}.{kind.__qualname__}": vars(kind) for kind in kinds}
    for name in {package, *(kind.__module__ for kind in kinds)}:
        if name in sys.modules:
            places[name] = vars(sys.modules[name])
    for place, values in places.items():
        for key, value in list(values.items()):
            if not (
                key.startswith("__") or isinstance(value, (nn.Module, property, classmethod, staticmethod, *_CODE))
            ):
                found[f"{place}:{key}"] = _mark(value, set(registered), _DEPTH)
    return found


_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, property, classmethod, staticmethod)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if not getattr(module, "is_feedback", False):
            yield path, module


def _registered(model: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def _encoded(value: Any, registered: set[int]) -> Any:
    """A value as lists of tensors, numbers and texts, the first of which says what it is.

    Raises:
        TypeError: It is nothing that a file can hold.
    """
    kind = type(value)
    if kind in (type(None), bool, int, float):
        return value
    if kind is str:
        return ["text", f"={value}"]  # in a checkpoint some texts stand for tensors
    if kind in (list, tuple):
        return [kind.__name__, *(_encoded(part, registered) for part in value)]
    if kind is dict:
        return ["dict", *([_encoded(part, registered) for part in item] for item in value.items())]
    if kind is random.Random:
        version, key, normal = value.getstate()
        return ["random", version, list(key), normal]
    if kind is np.random.Generator:
        return ["numpy", _encoded(value.bit_generator.state, registered)]
    if kind is np.random.RandomState:
        return ["legacy", _encoded(value.get_state(legacy=False), registered)]
    if kind is torch.Generator:
        return ["torch", str(value.device), value.get_state().tolist()]
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return ["number", value.dtype.str, value.item()]
    if kind is np.ndarray and value.dtype.kind in "biuf":
        return [
            "array",
            value.dtype.str,
            torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy()),
            *value.shape,
        ]
    if isinstance(value, Tensor) and kind is Tensor and _bare(value) and id(value) not in registered:
        return ["tensor", str(value.device), value.detach().clone()]
    raise TypeError(f"a {kind.__name__}")


def _bare(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory, and no more."""
    return tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_meta


def _decoded(value: Any, there: Any) -> Any:
    """The value that ``_encoded`` was given; a generator that is there already is moved, as others may share it."""
    if not isinstance(value, list):
        return value
    kind, *parts = value
    match kind:
        case "text":
            return parts[0].removeprefix("=")
        case "list" | "tuple":
            beside = [*there] if isinstance(there, (list, tuple)) else []
            beside += [None] * (len(parts) - len(beside))
            decoded = [_decoded(part, other) for part, other in zip(parts, beside, strict=False)]
            return decoded if kind == "list" else tuple(decoded)
        case "dict":
            beside = there if isinstance(there, dict) else {}
            keys = [_decoded(key, None) for key, _ in parts]
            return {key: _decoded(part, beside.get(key)) for key, (_, part) in zip(keys, parts, strict=True)}
        case "random":
            found = there if type(there) is random.Random else random.Random()
            found.setstate((parts[0], tuple(parts[1]), parts[2]))
            return found
        case "numpy" | "legacy":
            state = _decoded(parts[0], None)
            wanted = np.random.Generator if kind == "numpy" else np.random.RandomState
            bits = {kind.__name__: kind for kind in np.random.BitGenerator.__subclasses__()}[state["bit_generator"]]
            found = there if type(there) is wanted else wanted(bits())
            if isinstance(found, np.random.Generator):
                found.bit_generator.state = state
            else:
                found.set_state(state)
            return found
        case "torch":
            found = there if isinstance(there, torch.Generator) else torch.Generator(parts[0])
            found.set_state(torch.tensor(parts[1], dtype=torch.uint8))
            return found
        case "number":
            return np.dtype(parts[0]).type(parts[1])
        case "array":
            return np.frombuffer(parts[1].numpy().tobytes(), np.dtype(parts[0])).reshape(parts[2:]).copy()
        case "tensor":
            return parts[1].to(parts[0]).clone()
    raise ValueError(f"an attribute of the unknown kind {kind!r}")


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        return same and torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other) and one == other


def _mark(value: Any, seen: set[int], depth: int) -> Any:
    """What tells a value from what it may become, by numbers and texts in tuples; ``seen``: what has no mark here."""
    kind: type = type(value)
    if isinstance(value, (nn.Module, *_CODE)) or depth == 0 or id(value) in seen:
        return kind.__name__
    if isinstance(value, (str, bytes, int, float, complex, np.generic, count)) or value is None:
        return kind.__name__, repr(value)
    if hasattr(kind, "__length_hint__"):  # iterators of lists and ranges
        return kind.__name__, length_hint(value)
    if isinstance(value, Tensor):
        if not _bare(value):  # made anew at every pass
            return kind.__name__, str(value.layout)
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), sha256(content.numpy().tobytes()).hexdigest()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.dtype.str, value.shape, sha256(value.tobytes()).hexdigest()
    if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)):
        try:
            return kind.__name__, repr(_encoded(value, set()))
        except TypeError:
            return kind.__name__
    seen.add(id(value))  # only of what stays alive meanwhile: the id of a passing object may come again
    parts = [(name, _mark(part, seen, depth - 1)) for name, part in _parts(value)]
    return kind.__name__, *(sorted(parts, key=repr) if isinstance(value, (set, frozenset)) else parts)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a container or an object holds."""
    try:
        if isinstance(value, GeneratorType):
            frame = value.gi_frame
            return [] if frame is None else [("at", frame.f_lasti), *frame.f_locals.items()]
        if isinstance(value, Mapping):
            return [(repr(key), part) for key, part in value.items()]
        if isinstance(value, (list, tuple, deque, set, frozenset)):
            return [("", part) for part in value]
        slots = (base.__dict__.get("__slots__", ()) for base in type(value).__mro__)
        names = [name for part in slots for name in ((part,) if isinstance(part, str) else part)]
        return [*vars(value).items(), *((name, getattr(value, name)) for name in names if hasattr(value, name))]
    except Exception:  # it is the user's code, or an object of C that shows nothing
        return []
