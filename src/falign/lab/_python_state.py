"""State of a model in attributes of its modules, in Python and not in parameters and buffers.

A counter, a moving average in a list, a generator of its own: a run that goes on from a checkpoint comes to the same
numbers only if such state is put back, too. It is stored without pickle, as nested lists of tensors, numbers and texts.
"""

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

from falign._expand import Product
from falign._wiring import is_standard_attribute

_DEPTH = 8
"""Levels of nested containers and objects that are looked at."""


class Attributes:
    """Attributes of a model's modules, as far as a file can hold them, and how they were when this was made.

    A file can hold None, numbers, texts, tensors without a history, generators of ``random``, ``numpy.random``, torch,
    and lists, tuples and dicts of these; and which parameters learn. An object that several attributes share stays
    shared.

    Args:
        model: The model, before its first step.
        varying: Names of attributes that differ each time the model is made, so that they are always stored.
    """

    def __init__(self, model: nn.Module, varying: Iterable[str] = ()) -> None:
        self._model = model
        self._varying = frozenset(varying)
        self._before = _Snapshot(model)

    def state(self) -> dict[str, Any]:
        """Return {name: value} of the attributes that have changed, encoded."""
        before, now = self._before.values, _Snapshot(self._model)
        changed = {
            name: value
            for name, value in now.values.items()
            if name in self._varying or name not in before or not _alike(value, before[name])
        }
        return changed | {name: ["gone"] for name in before if name not in now.names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back the attributes that ``state`` gave; the others become what they were when this was made.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: This is the state of another model.
        """
        values, before = {**self._before.values, **state}, self._before
        registered = {_memory(tensor) for tensor in before.registered}
        self._put(values, before, registered)
        now = _Snapshot(self._model).values
        if not all(_alike(now[name], value) for name, value in values.items() if name in now):
            # Views in this model share memory, but the stored tensors differ: they get memory of their own.
            shared = Counter(map(_memory, before.objects.values()))
            self._put(values, before, registered | {place for place, number in shared.items() if number > 1})

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put all attributes back that change within this context."""
        before = _Snapshot(self._model)
        try:
            yield
        finally:
            self._put(before.values, before)

    def _put(self, values: Mapping[str, Any], snapshot: "_Snapshot", spared: Container[int | None] = ()) -> None:
        """Set the attributes, in place in the objects of a snapshot, but for memory that is ``spared``."""
        decoding = _Decoding(values, snapshot.objects, spared)
        for name, value in values.items():
            path, _, key = name.rpartition(".")
            if isinstance(value, list) and value[0] == "learns":
                self._model.get_parameter(path).requires_grad_(value[1])
            elif isinstance(value, list) and value[0] == "gone":
                vars(self._model.get_submodule(path)).pop(key, None)
            else:
                vars(self._model.get_submodule(path))[key] = decoding.of(name)
        for name in _Snapshot(
            self._model, without=snapshot.names | values.keys()
        ).values:  # attributes that were added since
            path, _, key = name.rpartition(".")
            vars(self._model.get_submodule(path)).pop(key, None)


def storable_attributes(model: nn.Module) -> dict[str, Any]:
    """Return {name: value} of all attributes that a file can hold, encoded."""
    return _Snapshot(model).values


def attribute_fingerprints(model: nn.Module, package: str) -> dict[str, Any]:
    """Return {name: fingerprint} of the attributes of a model, and of variables of its classes and their modules.

    Args:
        model: The model.
        package: Package of the user's code: variables of its classes and modules count.
    """
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    fingerprints = {
        f"{path}.{key}".lstrip("."): _fingerprint(value, set(registered), _DEPTH)
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
                fingerprints[f"{place}:{key}"] = _fingerprint(value, set(registered), _DEPTH)
    return fingerprints


_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, property, classmethod, staticmethod)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if not (getattr(module, "is_feedback", False) or isinstance(module, Product)):  # which a conversion makes
            yield path, module


class _Snapshot:
    """Snapshot of the attributes of a model.

    Attributes:
        values: {name: value} of those that a file can hold, encoded.
        names: Names of all attributes.
        objects: {(name, number): object} of the mutable objects, which attributes may share.
        registered: Parameters and buffers.

    Args:
        model: The model.
        without: Names to leave out.
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
    """Encodes values as lists whose first element names the kind.

    A mutable object gets a number within the attribute that is encoded first; the others refer to name and number.
    """

    def __init__(self, registered: Iterable[int] = ()) -> None:
        self.objects: dict[tuple[str, int], Any] = {}  # kept alive: ids of dead objects are used again
        self._registered = frozenset(registered)
        self._places: dict[int, tuple[str, int]] = {}

    def of(self, name: str, value: Any) -> Any:
        """Encode the value of an attribute.

        Raises:
            TypeError: A file cannot hold it.
        """
        known = len(self.objects)
        try:
            return self._encoded(name, value, known)
        except (TypeError, RecursionError):
            while len(self.objects) > known:  # later attributes must not refer to parts of one that is not stored
                del self._places[id(self.objects.popitem()[1])]
            raise

    def _encoded(self, name: str, value: Any, known: int) -> Any:
        kind = type(value)
        if kind in (type(None), bool, int, float):
            return value
        if kind is str:
            return ["text", f"={value}"]  # the sign keeps it apart from texts by which a checkpoint names tensors
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
        elif kind is Tensor and _is_plain(value) and id(value) not in self._registered:
            yield from ("tensor", number, str(value.device), value.detach().clone())
        else:
            raise TypeError(f"a {kind.__name__}")


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is plain numbers in memory, without gradient or special layout."""
    return tensor.layout is torch.strided and not tensor.requires_grad and not tensor.is_meta


class _Decoding:
    """Decodes values in place, in the objects of a snapshot, which attributes may share.

    Args:
        values: {name: encoded value}.
        objects: {(name, number): object of the snapshot}.
        spared: Addresses of memory that is not written into: see ``_memory``.
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
        """Decode the value of an attribute."""
        if name not in self._named:
            self._named[name] = None  # a cycle that comes back here refers to a part, which exists already
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
        self._made[place] = self._restored(kind, self._objects.get(place), parts[1:])
        return self._made[place]

    def _filled(self, name: str, kind: str, parts: list[Any]) -> list[Any] | dict[Any, Any]:
        number, *parts = parts
        existing = self._objects.get((name, number))
        if kind == "list":
            filled = self._made[name, number] = existing if type(existing) is list else []
            filled[:] = [self._decoded(name, part) for part in parts]
            return filled
        mapping = self._made[name, number] = existing if type(existing) is dict else {}
        items = [(self._decoded(name, key), self._decoded(name, part)) for key, part in parts]
        mapping.clear()
        mapping.update(items)
        return mapping

    def _restored(self, kind: str, existing: Any, parts: list[Any]) -> Any:
        """Restore an array, a tensor or a generator, in the existing object where that is possible."""
        match kind:
            case "random":
                generator = existing if type(existing) is random.Random else random.Random()
                generator.setstate((parts[0], tuple(parts[1]), parts[2]))
                return generator
            case "numpy" | "legacy":
                state = _Decoding({"": parts[0]}).of("")
                wanted = np.random.Generator if kind == "numpy" else np.random.RandomState
                bits = {kind.__name__: kind for kind in np.random.BitGenerator.__subclasses__()}[state["bit_generator"]]
                generator = existing if type(existing) is wanted else wanted(bits())
                if isinstance(generator, np.random.Generator):
                    generator.bit_generator.state = state
                else:
                    generator.set_state(state)
                return generator
            case "torch":
                generator = existing if isinstance(existing, torch.Generator) else torch.Generator(parts[0])
                generator.set_state(torch.tensor(parts[1], dtype=torch.uint8))
                return generator
            case "array":
                content = np.frombuffer(parts[1].numpy().tobytes(), np.dtype(parts[0])).reshape(parts[2:]).copy()
                return self._copied(content, existing)
            case "tensor":
                return self._copied(parts[1].to(parts[0]).clone(), existing)
        raise ValueError(f"an attribute of the unknown kind {kind!r}")

    def _copied(self, content: Any, existing: Any) -> Any:
        """Copy a tensor or an array into the existing one if that can take it."""
        if type(existing) is not type(content) or (existing.shape, existing.dtype) != (content.shape, content.dtype):
            return content
        if isinstance(content, np.ndarray):
            equal = existing.tobytes() == content.tobytes()
        else:
            equal = existing.device == content.device and torch.equal(existing, content)
        if equal or _memory(existing) in self._spared:
            return existing if equal else content
        try:
            target = (
                existing if isinstance(existing, np.ndarray) else existing.data
            )  # .data: autograd must not count the write
            target[...] = content
        except (RuntimeError, ValueError):  # read-only memory, or expanded tensors whose elements share it
            return content
        return existing


def _memory(value: Any) -> int | None:
    """Return the address of the memory of a tensor or an array, the same for all views of it."""
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


def _fingerprint(value: Any, seen: set[int], depth: int) -> Any:
    """Return nested tuples of numbers and texts that change when the value does; objects in ``seen`` count by type."""
    kind: type = type(value)
    if isinstance(value, (nn.Module, *_CODE)) or depth == 0 or id(value) in seen:
        return kind.__name__
    if isinstance(value, (str, bytes, int, float, complex, np.generic, count)) or value is None:
        return kind.__name__, repr(value)
    if hasattr(kind, "__length_hint__"):  # iterators of lists and ranges
        return kind.__name__, length_hint(value)
    if isinstance(value, Tensor):
        if not _is_plain(value):  # such a tensor is made anew in every forward pass
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
    seen.add(id(value))  # only of objects that stay alive meanwhile: ids of dead ones are used again
    parts = [(name, _fingerprint(part, seen, depth - 1)) for name, part in _parts(value)]
    return kind.__name__, *(sorted(parts, key=repr) if isinstance(value, (set, frozenset)) else parts)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """List the named parts of a container or an object."""
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
    except Exception:  # code of the user, or an object of C without attributes
        return []
