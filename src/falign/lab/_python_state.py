"""What a model keeps in Python beside its tensors: what a checkpoint can hold of it, and what it cannot."""

import random
import sys
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import count
from operator import length_hint
from types import BuiltinFunctionType, FunctionType, GeneratorType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from falign._wiring import is_standard_attribute

_DEPTH = 8
"""So many levels within an attribute are looked at."""


class Attributes:
    """The attributes of a model's modules, as far as a file can hold them, from the moment at which this was made.

    Held are None, numbers, texts, tensors without a history, generators of ``random``, ``numpy.random`` and torch,
    and lists, tuples and dicts of these; and which parameters learn. What several places share they share afterwards.

    Args:
        model: The model, before its first step.
        loose: Names of attributes that differ from one making of the model to the next.
    """

    def __init__(self, model: nn.Module, loose: Iterable[str] = ()) -> None:
        self._model = model
        self._loose = frozenset(loose)
        self._before = _Taken(model)

    def state(self) -> dict[str, Any]:
        """{name: value} of what has changed, as lists of tensors, numbers and texts."""
        before, now = self._before.values, _Taken(self._model)
        changed = {
            name: value
            for name, value in now.values.items()
            if name in self._loose or name not in before or not _alike(value, before[name])
        }
        return changed | {name: ["gone"] for name in before if name not in now.names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave; what it does not name becomes what it was at first.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: This is the state of another model.
        """
        values, before = {**self._before.values, **state}, self._before
        registered = {_memory(tensor) for tensor in before.registered}
        self._put(values, before, registered)
        now = _Taken(self._model).values
        if not all(_alike(now[name], value) for name, value in values.items() if name in now):
            # What had its memory with others in this model has its own in the one whose state it is.
            shared = Counter(map(_memory, before.objects.values()))
            self._put(values, before, registered | {place for place, number in shared.items() if number > 1})

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put everything back that changes within."""
        before = _Taken(self._model)
        try:
            yield
        finally:
            self._put(before.values, before)

    def _put(self, values: Mapping[str, Any], there: "_Taken", spared: Container[int | None] = ()) -> None:
        """Give the attributes their values, in the objects that were taken, but for memory that is ``spared``."""
        decoding = _Decoding(values, there.objects, spared)
        for name, value in values.items():
            path, _, key = name.rpartition(".")
            if isinstance(value, list) and value[0] == "learns":
                self._model.get_parameter(path).requires_grad_(value[1])
            elif isinstance(value, list) and value[0] == "gone":
                vars(self._model.get_submodule(path)).pop(key, None)
            else:
                vars(self._model.get_submodule(path))[key] = decoding.of(name)
        for name in _Taken(self._model, without=there.names | values.keys()).values:  # what has come since
            path, _, key = name.rpartition(".")
            vars(self._model.get_submodule(path)).pop(key, None)


def storable_attributes(model: nn.Module) -> dict[str, Any]:
    """{name: value} of all attributes that a file can hold, as lists of tensors, numbers and texts."""
    return _Taken(model).values


def attribute_fingerprints(model: nn.Module, package: str) -> dict[str, Any]:
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
        if not is_standard_attribute(key)
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


class _Taken:
    """The attributes of a model at one moment.

    Attributes:
        values: {name: value} of those that a file can hold, as lists of tensors, numbers and texts.
        names: Of all attributes.
        objects: {(name, number): object} of what may be shared and may change.
        registered: Parameters and buffers.

    Args:
        model: The model.
        without: Names that are left out.
    """

    def __init__(self, model: nn.Module, without: Container[str] = ()) -> None:
        self.values: dict[str, Any] = {}
        self.names: set[str] = set()
        self.registered = [*model.parameters(), *model.buffers()]
        encoding = _Encoding(map(id, self.registered))
        self.objects = encoding.objects
        for path, module in _modules(model):
            for key, value in vars(module).items():
                name = f"{path}.{key}".lstrip(".")
                if is_standard_attribute(key) or name in without:
                    continue
                self.names.add(name)
                with suppress(TypeError, RecursionError):
                    self.values[name] = encoding.of(name, value)
            for key, parameter in module._parameters.items():
                name = f"{path}.{key}.requires_grad".lstrip(".")
                if parameter is not None and name not in without:
                    self.names.add(name)
                    self.values[name] = ["learns", parameter.requires_grad]


class _Encoding:
    """Values as lists of tensors, numbers and texts, the first of which says what it is.

    What may be shared has a number within the value that came to it first; the others have its name and number.
    """

    def __init__(self, registered: Iterable[int] = ()) -> None:
        self.objects: dict[tuple[str, int], Any] = {}  # which stay alive: the id of a passing object may come again
        self._registered = frozenset(registered)
        self._places: dict[int, tuple[str, int]] = {}

    def of(self, name: str, value: Any) -> Any:
        """The value of a name.

        Raises:
            TypeError: It is nothing that a file can hold.
        """
        known = len(self.objects)
        try:
            return self._encoded(name, value, known)
        except (TypeError, RecursionError):
            while len(self.objects) > known:  # nobody can refer to a part of what is not held
                del self._places[id(self.objects.popitem()[1])]
            raise

    def _encoded(self, name: str, value: Any, known: int) -> Any:
        kind = type(value)
        if kind in (type(None), bool, int, float):
            return value
        if kind is str:
            return ["text", f"={value}"]  # in a checkpoint some texts stand for tensors
        if kind is tuple:
            return ["tuple", *(self._encoded(name, part, known) for part in value)]
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return ["number", value.dtype.str, value.item()]
        if (place := self._places.get(id(value))) is not None:
            return ["same", *place]
        number = len(self.objects) - known
        self.objects[name, number], self._places[id(value)] = value, (name, number)
        return [*self._shared(name, value, known, number)]

    def _shared(self, name: str, value: Any, known: int, number: int) -> Iterator[Any]:
        kind = type(value)
        if kind is list:
            yield from ("list", number, *(self._encoded(name, part, known) for part in value))
        elif kind is dict:
            yield from ("dict", number)
            yield from ([self._encoded(name, part, known) for part in item] for item in value.items())
        elif kind is random.Random:
            version, key, normal = value.getstate()
            yield from ("random", number, version, list(key), normal)
        elif kind is np.random.Generator:
            yield from ("numpy", number, _Encoding().of("", value.bit_generator.state))
        elif kind is np.random.RandomState:
            yield from ("legacy", number, _Encoding().of("", value.get_state(legacy=False)))
        elif kind is torch.Generator:
            yield from ("torch", number, str(value.device), value.get_state().tolist())
        elif kind is np.ndarray and value.dtype.kind in "biuf":
            content = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
            yield from ("array", number, value.dtype.str, content, *value.shape)
        elif kind is Tensor and _bare(value) and id(value) not in self._registered:
            yield from ("tensor", number, str(value.device), value.detach().clone())
        else:
            raise TypeError(f"a {kind.__name__}")


def _bare(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory, and no more."""
    return tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_meta


class _Decoding:
    """The values that ``_Encoding`` was given, in the objects that were taken: others may share them.

    Args:
        values: {name: what ``_Encoding`` gave}.
        objects: {(name, number): what was taken}.
        spared: Memory that is not written into, as ``_memory`` tells it.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        objects: Mapping[tuple[str, int], Any] = MappingProxyType({}),
        spared: Container[int | None] = (),
    ) -> None:
        self._values, self._objects, self._spared = values, objects, spared
        self._made: dict[tuple[str, int], Any] = {}
        self._named: dict[str, Any] = {}

    def of(self, name: str) -> Any:
        """The value of a name."""
        if name not in self._named:
            self._named[name] = None  # whoever comes again meanwhile wants a part that is made already
            self._named[name] = self._decoded(name, self._values[name])
        return self._named[name]

    def _decoded(self, name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *parts = value
        match kind:
            case "text":
                return parts[0].removeprefix("=")
            case "tuple":
                return tuple(self._decoded(name, part) for part in parts)
            case "number":
                return np.dtype(parts[0]).type(parts[1])
            case "same":
                self.of(parts[0])
                return self._made[parts[0], parts[1]]
            case "list" | "dict":
                return self._filled(name, kind, parts)
        place = name, parts[0]
        self._made[place] = self._moved(kind, self._objects.get(place), parts[1:])
        return self._made[place]

    def _filled(self, name: str, kind: str, parts: list[Any]) -> list[Any] | dict[Any, Any]:
        number, *parts = parts
        there = self._objects.get((name, number))
        if kind == "list":
            found = self._made[name, number] = there if type(there) is list else []
            found[:] = [self._decoded(name, part) for part in parts]
            return found
        found = self._made[name, number] = there if type(there) is dict else {}
        items = [(self._decoded(name, key), self._decoded(name, part)) for key, part in parts]
        found.clear()
        found.update(items)
        return found

    def _moved(self, kind: str, there: Any, parts: list[Any]) -> Any:
        """An array, tensor or generator."""
        match kind:
            case "random":
                found = there if type(there) is random.Random else random.Random()
                found.setstate((parts[0], tuple(parts[1]), parts[2]))
                return found
            case "numpy" | "legacy":
                state = _Decoding({"": parts[0]}).of("")
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
            case "array":
                content = np.frombuffer(parts[1].numpy().tobytes(), np.dtype(parts[0])).reshape(parts[2:]).copy()
                return self._copied(content, there)
            case "tensor":
                return self._copied(parts[1].to(parts[0]).clone(), there)
        raise ValueError(f"an attribute of the unknown kind {kind!r}")

    def _copied(self, content: Any, there: Any) -> Any:
        """A tensor or an array, in the one that is there if that can take it."""
        if type(there) is not type(content) or (there.shape, there.dtype) != (content.shape, content.dtype):
            return content
        if isinstance(content, np.ndarray):
            equal = there.tobytes() == content.tobytes()
        else:
            equal = there.device == content.device and torch.equal(there, content)
        if equal or _memory(there) in self._spared:
            return there if equal else content
        try:
            target = there if isinstance(there, np.ndarray) else there.data  # its version stays, as of a buffer
            target[...] = content
        except (RuntimeError, ValueError):  # memory that is not to be written, or of which several elements are one
            return content
        return there


def _memory(value: Any) -> int | None:
    """Where a tensor or an array has its memory, whatever part of it."""
    while isinstance(value, np.ndarray) and isinstance(value.base, np.ndarray):
        value = value.base
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) and value.layout is torch.strided else None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        return same and bool(((one == other) | ((one != one) & (other != other))).all())
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
            return kind.__name__, repr(_Encoding().of("", value))
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
