"""A run of a model in which every activation knows whose output it is."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from falign._attached import Feedback
from falign._outputs import pick
from falign._preserve import force_eager
from falign._survey import call
from falign._wiring import preserve_state, unwrapped, wiring_of
from falign.layers import LOOKUPS, kind_of
from falign.measure.law._propagate import (
    OTHER,
    NeuronLabels,
    Operation,
    Propagated,
    keeps_order,
    labels_of_output,
    neuron_of_feature,
    propagate,
)

_BatchNorm = nn.modules.batchnorm._BatchNorm


class _Tracer(TorchDispatchMode):
    """Carries a ``Mark`` for every source along with each activation that still holds its output.

    Attributes:
        connections: {(source, target): columns}.
        reasons: {layer: why the balance of its neurons does not hold}.
        neurons: {layer: how many it has}.
        types: Of what the layers were given.
        outputs: The layers whose output is the run's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._marks: Any = WeakTensorKeyDictionary()
        self._trained: Any = WeakTensorKeyDictionary()  # what comes of parameters, outside the layers
        self._depth = 0
        self._runs: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.connections: dict[tuple[str, str], Tensor] = {}
        self.neurons: dict[str, int] = {}
        self.types: list[torch.dtype] = []
        self._faults = _faults(model)
        self.outputs: frozenset[str] = frozenset()
        self._new: dict[tuple[Any, ...], Tensor] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if kind_of(module) is not None or isinstance(module, _BatchNorm):
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                self._handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                self._handles.append(module.register_forward_hook(leave, always_call=True))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else entering the mode imports the compiler, for a second

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def finish(self, result: Any, carrying: list[Any]) -> None:
        """Look at what the run returned, and at the layers that the law cannot be of.

        Args:
            result: What the model returned.
            carrying: The tensors in it at which an error begins.
        """
        self.outputs = frozenset(
            source for tensor in carrying for source, mark in self._of(tensor).items() if mark.bare
        )
        for source in (source for tensor in tree_leaves(result) for source in self._of(tensor)):
            self._complain(source, "its output is an output of the model")
        for name in (name for name, runs in self._runs.items() if runs > 1):
            self._faults.setdefault(name, "runs twice in a pass")
        for source, target in self.connections:
            if target in self._faults:
                self.reasons[source] = f"layer {target!r}, which it feeds, {self._faults[target]}"
        self.reasons |= {name: f"it {fault}" for name, fault in self._faults.items()}

    def _of(self, tensor: Any) -> dict[str, NeuronLabels]:
        return self._marks.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def _fresh(self, output: Tensor, axis: int) -> Tensor:
        """Labels of a layer's own output; outputs of one shape have the same ones."""
        key = (*output.shape, *output.stride(), axis, output.device)
        if key not in self._new:
            self._new[key] = labels_of_output(output, axis)
        return self._new[key]

    def _complain(self, source: str, reason: str) -> None:
        self.reasons.setdefault(source, reason)

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._depth += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            return
        self.types.append(x.dtype)
        moving = isinstance(module, _BatchNorm) and not (module.training or module.running_mean is None)
        known: dict[int, Tensor | None] = {}
        for source, mark in self._of(x).items():
            if id(mark.labels) not in known:
                known[id(mark.labels)] = neuron_of_feature(mark.labels, _axis(module, x))
            found = known[id(mark.labels)]
            if moving:
                self._complain(source, "batch normalisation by running statistics shifts its output")
            if found is None:
                self._complain(source, f"its neurons are not the same inputs of layer {name!r} in all positions")
            elif bool((found != OTHER).any()):
                self.connections.setdefault((source, name), found)

    def _leave(self, name: str, module: nn.Module, args: tuple, y: Any) -> None:
        self._depth -= 1
        if not isinstance(y, Tensor) or (kind_of(module) is None and module._parameters.get("weight") is None):
            return  # a normalisation without parameters has no neurons of its own
        self._runs[name] += 1
        axis = _axis(module, y)
        self.neurons[name] = y.shape[axis]
        self._marks[y] = {name: NeuronLabels(self._fresh(y, axis), bare=True)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = [self._of(leaf) for leaf in tree_leaves((args, kwargs))] if not self._depth else []
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, Tensor) and self._varies(leaf) for leaf in tree_leaves((args, kwargs))):
            self._trained.update((output, True) for output in outputs)
        marks: list[dict[str, NeuronLabels]] = [{} for _ in outputs]
        known: dict[tuple[tuple[int, bool] | None, ...], tuple[Propagated, bool]] = {}
        for source in dict.fromkeys(source for operand in operands for source in operand):
            # In a residual network most sources have the same labels in the same operands, and the same happens to all.
            own = (operand.get(source) for operand in operands)
            alike = tuple(None if mark is None else (id(mark.labels), mark.bare) for mark in own)
            if alike not in known:
                step = Operation(func, args, kwargs, result, partial(self._labels, source), self._varies)
                bare = keeps_order(step) and all(operand[source].bare for operand in operands if source in operand)
                known[alike] = propagate(step), bare
            crossed, bare = known[alike]
            if crossed.reason is not None:
                self._complain(source, crossed.reason)
            for mark, labels in zip(marks, tree_leaves(crossed.labels), strict=False):
                if labels is not None:
                    mark[source] = NeuronLabels(labels, bare)
        if any(operands):
            self._marks.update(zip(outputs, marks, strict=True))
        return result

    def _varies(self, leaf: Tensor) -> bool:
        """Whether training changes it, so that it is zero, if it is, only at first."""
        return leaf.requires_grad or leaf in self._trained or bool(self._of(leaf))

    def _labels(self, source: str, leaf: Any) -> Tensor | None:
        mark = self._of(leaf).get(source)
        return None if mark is None else mark.labels


def _axis(module: nn.Module, x: Tensor) -> int:
    """The axis of the features (channels) of a layer's input or output."""
    kind = kind_of(module)
    if kind is None:
        return min(1, x.dim() - 1)
    return x.dim() - 1 - len(module.kernel_size) if kind.channel_first else x.dim() - 1  # pyright: ignore


def _faults(model: nn.Module) -> dict[str, str]:
    """{layer: what is the matter with its weights}, in words that continue "it"."""
    faults: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Feedback):
            continue
        for parameter in {id(parameter) for parameter in module._parameters.values() if parameter is not None}:
            owners.setdefault(parameter, []).append(name)
        if isinstance(module, LOOKUPS):
            faults[name] = "looks its input up"
        if kind_of(module) is not None and "weight" not in module._parameters:
            faults[name] = "has a parametrised weight"
    for shared in (names for names in owners.values() if len(names) > 1):
        for name in shared:
            others = ", ".join(repr(other) for other in shared if other != name)
            faults.setdefault(name, f"shares a parameter with {others}")
    return faults


# Which neurons of one layer are which inputs of another, found while a model runs once.


@dataclass(frozen=True, kw_only=True, eq=False)
class Connection:
    """The neurons of one layer as the inputs of another.

    Attributes:
        source: Name of the layer whose neurons they are: a linear map, a convolution (channels) or a batch
            normalisation (channels).
        target: Name of the next such layer.
        columns: For every feature (channel) of the target's input the neuron of the source that it belongs to, -1
            where it is none of this source.
    """

    source: str
    target: str
    neuron_of_feature: Int64[Tensor, " in"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Followed:
    """What ``follow`` found.

    Attributes:
        connections: In running order of the targets.
        reasons: {layer: why the balance of its neurons does not hold, in words}; a layer with a reason may still have
            connections, where only the law and not the way of its neurons is lost.
        neurons: {layer: how many neurons (channels) it has}, in running order.
        outputs: Layers whose output is an output of the model, element by element; under a direct rule the one where
            the error begins.
        precision: The shortest floating-point type that a layer was given.
    """

    connections: tuple[Connection, ...]
    reasons: dict[str, str]
    neurons: dict[str, int]
    outputs: frozenset[str]
    precision: torch.dtype

    def targets(self, source: str) -> tuple[Connection, ...]:
        """The connections out of one layer."""
        return self._by_source.get(source, ())

    @cached_property
    def _by_source(self) -> dict[str, tuple[Connection, ...]]:
        found: dict[str, tuple[Connection, ...]] = {}
        for connection in self.connections:
            found[connection.source] = (*found.get(connection.source, ()), connection)
        return found


def follow(model: nn.Module, example: Any) -> Followed:
    """Run a model once and find, for every layer, which inputs of which layers its neurons are.

    What lies between two layers may rearrange elements and scale each by something that does not depend on the
    neuron's size (ReLU and its relatives, dropout, pooling, casts): there the sum of error × activation of a neuron
    is the same on both sides, in every batch. Whatever else happens to a neuron's output becomes a reason. The model
    runs in its own training mode; its buffers, the random generators and modes are left as they were.

    Args:
        model: The model, or a compiled or data-parallel wrapper of it.
        example: Its input; a tuple is positional arguments, a dict keyword arguments.

    Raises:
        ValueError: The model does not run on the example.
    """
    inner = unwrapped(model)
    return trace(inner, partial(call, inner, example))


def trace(model: nn.Module, run: Callable[[], Any]) -> Followed:
    """Follow the neurons of a model, unwrapped, through what ``run`` does: one pass of it.

    Raises:
        ValueError: It fails.
    """
    tracer = _Tracer(model)
    try:
        with force_eager(), torch.no_grad(), preserve_state(model), tracer:
            result = run()
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example: {type(error).__name__}: {error}; give one batch of its input, a "
            "tuple for positional and a dict for keyword arguments"
        ) from error
    finally:
        tracer.remove()
        torch.clear_autocast_cache()  # weights cast here know of no gradient, and the next pass would take them
    wiring = wiring_of(model)
    if wiring is not None and wiring.rule.wiring == "direct":
        tracer.finish(result, [pick(result, end.output) for end in wiring.ends])
    else:
        tracer.finish(result, tree_leaves(result))
    return Followed(
        connections=tuple(
            Connection(source=source, target=target, columns=found)
            for (source, target), found in tracer.connections.items()
        ),
        reasons=tracer.reasons,
        neurons=tracer.neurons,
        outputs=tracer.outputs,
        precision=min(tracer.types, key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype()),
    )
