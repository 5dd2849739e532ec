"""Neurons followed from layer to layer: one run of a model with labelled activations shows whose input each is."""

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Connection:
    """The neurons of one layer as the inputs of another.

    Attributes:
        source: Name of the layer whose neurons they are: a linear map, a convolution (channels) or a batch
            normalisation (channels).
        target: Name of the next such layer.
        columns: For every feature (channel) of the target's input the neuron of the source that it belongs to, -1
            for a feature of another source.
    """

    source: str
    target: str
    columns: Int64[Tensor, " in"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Followed:
    """The neurons of a model, followed by ``follow`` from layer to layer.

    Attributes:
        connections: In running order of the targets.
        reasons: {layer: why the law does not hold for its neurons, in words}. Such a layer may still have connections:
            behind tanh, for example, it is known which input each neuron is, but there is no law.
        neurons: {layer: number of its neurons (channels)}, in running order.
        outputs: Layers whose output is an output of the model, element by element; under a direct rule those where the
            error begins.
        precision: The floating-point type with the fewest bits among the inputs of layers.
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
        by_source: dict[str, tuple[Connection, ...]] = {}
        for connection in self.connections:
            by_source[connection.source] = (*by_source.get(connection.source, ()), connection)
        return by_source


def follow(model: nn.Module, example: Any) -> Followed:
    """Run a model once and find, for every layer, which inputs of which layers its neurons are.

    Operations between two layers may rearrange elements, and scale each by a factor that does not depend on the
    neuron's size (ReLU and its relatives, dropout, pooling, casts): the sum of error × activation of a neuron is then
    the same on both sides, in every batch. Any other operation on a neuron's output is kept as a reason why the law
    does not hold. The model runs in the mode that it is in; its buffers, the random generators and modes are left as
    they were.

    Args:
        model: A model, or a compiled or data-parallel wrapper of it.
        example: An input of it: a tuple is positional arguments, a dict keyword arguments.

    Raises:
        ValueError: The model does not run on the example.
    """
    inner = unwrapped(model)
    return trace(inner, partial(call, inner, example))


def trace(model: nn.Module, run: Callable[[], Any]) -> Followed:
    """Follow the neurons of an unwrapped model through one pass of it, made by ``run``.

    Raises:
        ValueError: The pass fails.
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
            Connection(source=source, target=target, columns=columns)
            for (source, target), columns in tracer.connections.items()
        ),
        reasons=tracer.reasons,
        neurons=tracer.neurons,
        outputs=tracer.outputs,
        precision=min(tracer.types, key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype()),
    )


# The run itself: labels travel with every tensor that still holds the output of a layer.

_BatchNorm = nn.modules.batchnorm._BatchNorm


class _Tracer(TorchDispatchMode):
    """Keeps, for each activation, the labels of every layer (a source) whose output it still holds.

    Layers are seen by hooks: the output of one gets new labels, and its input is looked at for connections. Operations
    outside of layers are seen by ``__torch_dispatch__``, below autograd, where every operation has one name however
    the model wrote it.

    Attributes:
        connections: {(source, target): columns}.
        reasons: {layer: why the law does not hold for its neurons}.
        neurons: {layer: number of its neurons}.
        types: Data types of the layers' inputs.
        outputs: The layers whose output is the run's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._labels_by_tensor: Any = WeakTensorKeyDictionary()
        self._trained: Any = WeakTensorKeyDictionary()  # made of parameters outside of layers: keys, the value is True
        self._depth = 0  # of layers within layers
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
        return False  # entering the mode would import the compiler, which takes a second

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def finish(self, result: Any, with_error: list[Any]) -> None:
        """Read off the output layers, and the reasons that only the whole run shows.

        Args:
            result: Whatever the model returned.
            with_error: The tensors in it at which an error begins.
        """
        self.outputs = frozenset(
            source for tensor in with_error for source, labels in self._of(tensor).items() if labels.is_output
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
        return self._labels_by_tensor.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def _fresh(self, output: Tensor, axis: int) -> Tensor:
        """Labels of a layer's output, shared by outputs of one shape, so that they can be compared by identity."""
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
        columns_of: dict[int, Tensor | None] = {}  # in a residual network many sources share their labels
        for source, (labels, _) in self._of(x).items():
            if id(labels) not in columns_of:
                columns_of[id(labels)] = neuron_of_feature(labels, _axis(module, x))
            columns = columns_of[id(labels)]
            if moving:
                self._complain(source, "batch normalisation by running statistics shifts its output")
            if columns is None:
                self._complain(source, f"its neurons are not the same inputs of layer {name!r} in all positions")
            elif bool((columns != OTHER).any()):
                self.connections.setdefault((source, name), columns)

    def _leave(self, name: str, module: nn.Module, args: tuple, y: Any) -> None:
        self._depth -= 1
        if not isinstance(y, Tensor) or (kind_of(module) is None and module._parameters.get("weight") is None):
            return  # a normalisation without parameters has no neurons of its own
        self._runs[name] += 1
        axis = _axis(module, y)
        self.neurons[name] = y.shape[axis]
        self._labels_by_tensor[y] = {name: NeuronLabels(self._fresh(y, axis), is_output=True)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = [self._of(leaf) for leaf in tree_leaves((args, kwargs))] if not self._depth else []
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, Tensor) and self._varies(leaf) for leaf in tree_leaves((args, kwargs))):
            self._trained.update((output, True) for output in outputs)
        labels_of_outputs: list[dict[str, NeuronLabels]] = [{} for _ in outputs]
        # In a residual network most sources have the same labels in the same operands: they are propagated once.
        known: dict[tuple[tuple[int, bool] | None, ...], tuple[Propagated, bool]] = {}
        for source in dict.fromkeys(source for operand in operands for source in operand):
            given = (operand.get(source) for operand in operands)
            key = tuple(None if labels is None else (id(labels.labels), labels.is_output) for labels in given)
            if key not in known:
                operation = Operation(func, args, kwargs, result, partial(self._labels, source), self._varies)
                is_output = keeps_order(operation) and all(
                    operand[source].is_output for operand in operands if source in operand
                )
                known[key] = propagate(operation), is_output
            propagated, is_output = known[key]
            if propagated.reason is not None:
                self._complain(source, propagated.reason)
            for by_source, labels in zip(labels_of_outputs, tree_leaves(propagated.labels), strict=False):
                if labels is not None:
                    by_source[source] = NeuronLabels(labels, is_output)
        if any(operands):
            self._labels_by_tensor.update(zip(outputs, labels_of_outputs, strict=True))
        return result

    def _varies(self, leaf: Tensor) -> bool:
        """True if training changes it: if it is zero now, as a new bias is, it will not stay so."""
        return leaf.requires_grad or leaf in self._trained or bool(self._of(leaf))

    def _labels(self, source: str, leaf: Any) -> Tensor | None:
        labels = self._of(leaf).get(source)
        return None if labels is None else labels.labels


def _axis(module: nn.Module, x: Tensor) -> int:
    """Find the axis of the features (channels) of a layer's input or output."""
    kind = kind_of(module)
    if kind is None:
        return min(1, x.dim() - 1)
    return x.dim() - 1 - len(module.kernel_size) if kind.channel_first else x.dim() - 1  # pyright: ignore


def _faults(model: nn.Module) -> dict[str, str]:
    """Find layers whose weights the law excludes: {layer: why, in words that continue "it"}."""
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
