"""Neurons followed from layer to layer: one run of a model with labelled activations shows whose input each is."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

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
from falign._wiring import feedbacks, preserve_state, unwrapped, wiring_of, wirings
from falign.layers import LOOKUPS, kind_of
from falign.measure.law._products import Factors, Product, factors, grouped, paired, summed_labels
from falign.measure.law._propagate import (
    OTHER,
    VIEWS,
    NeuronLabels,
    Operation,
    Propagated,
    attended_values,
    common_label,
    keeps_order,
    labels_of_output,
    neuron_of_feature,
    propagate,
)
from falign.measure.law._structures import Structure, labels_of_outputs, structure_of
from falign.measure.law._weights import LinearMap


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
        products: Layers whose neurons are multiplied with each other, as queries with keys.
        maps: {name: linear map} of those that are no layers of their own, such as the rows of a fused weight.
        into: {layer: all maps whose sum its neurons are given}, where there are several.
    """

    connections: tuple[Connection, ...]
    reasons: dict[str, str]
    neurons: dict[str, int]
    outputs: frozenset[str]
    precision: torch.dtype
    products: tuple[Product, ...] = ()
    maps: dict[str, LinearMap] = field(default_factory=dict)
    into: dict[str, tuple[str, ...]] = field(default_factory=dict)

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
        tracer.finish(result, [pick(result, end.output) for end in wiring.ends if end.layer is None])
        tracer.outputs |= {end.layer for end in wiring.ends if end.layer is not None}
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
        products=tracer.products(),
        maps=tracer.maps,
        into=tracer.into,
    )


# The run itself: labels travel with every tensor that still holds the output of a layer.

_BatchNorm = nn.modules.batchnorm._BatchNorm

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)

_HEADS = " (heads)"
"""Behind a layer's name: its scores, followed as groups of its neurons."""


class _Product(NamedTuple):
    """Layers whose outputs a product of two activations has as factors.

    Attributes:
        scores: {layer with ``_HEADS``: its group in each matrix of the result}.
        paired: Layers whose every neuron meets a known one of another layer: they are followed no further.
        values: Layers that are weighed by scores.
        carried: {layer: labels of the result}, of paired ones that have values as well, in attention in one operation.
    """

    scores: dict[str, Tensor]
    paired: set[str]
    values: set[str]
    carried: dict[str, Tensor]


def _disjoint(source: str, partner: str, pairs: Tensor) -> bool:
    """Test whether no neuron is on both sides of the pairs, if both sides are of one layer, as of fused weights."""
    return source != partner or not bool(torch.isin(pairs[:, 0], pairs[:, 1]).any())


def _constant(*labels: Tensor | None) -> bool:
    """Test whether all labels are the same along the axis that is summed over, or are not known."""
    return all(label is None or common_label(label, [-1], False)[1] for label in labels)


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
        self._parameters: Any = WeakTensorKeyDictionary()  # parameters and views of them, with the parameter's name
        self._parameters.update((parameter, name) for name, parameter in model.named_parameters())
        self._fed = set(feedbacks(model)) if wirings(model) else set()
        self._depth = 0  # of layers within layers
        self._open: str | None = None  # the batch normalisation that runs, of those with more in their forward
        self._runs: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.connections: dict[tuple[str, str], Tensor] = {}
        self.neurons: dict[str, int] = {}
        self.types: list[torch.dtype] = []
        self._faults = _faults(model)
        self.outputs: frozenset[str] = frozenset()
        self._used: list[tuple[str, Tensor | None]] = []  # neurons, by labels, whose output is no mere factor
        self._pairs: dict[tuple[str, str], Tensor] = {}
        self._groups: dict[str, Tensor] = {}
        self._new: dict[tuple[Any, ...], Tensor] = {}
        self._handles: list[Any] = []
        self.maps: dict[str, LinearMap] = {}
        self.into: dict[str, tuple[str, ...]] = {}
        self._layers: set[str] = set()
        self._structures: dict[str, tuple[str, ...]] = {}
        inside: tuple[str, ...] = ()  # of a module whose inside is known
        cut = {name for name, part in (feedbacks(model) if wirings(model) else {}).items() if _is_direct(part)}
        for name, module in model.named_modules():
            if name in cut and kind_of(module) is None:
                self._handles.append(module.register_forward_pre_hook(partial(self._cut, name), with_kwargs=True))
            if name.startswith(inside):
                continue
            structure = structure_of(name, module)
            if structure is not None:
                inside = (*inside, f"{name}." if name else "")
                self._structures[name] = tuple(structure.maps)
                self.maps |= structure.maps
                self.into |= {source.name: source.maps for source in structure.sources if len(source.maps) > 1}
                for one in structure.maps if name in self._faults else ():
                    self._faults[one] = self._faults[name]
                enter, leave = partial(self._enter_whole, structure), partial(self._leave_whole, structure)
            elif isinstance(module, _BatchNorm) and type(module).forward not in _FORWARDS:
                enter, leave = partial(self._enter_open, name), self._leave_open
            else:
                enter, leave = partial(self._enter, name), partial(self._leave, name)
            if structure is not None or kind_of(module) is not None or isinstance(module, _BatchNorm):
                self._layers.add(name)
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
        for source, labels in (pair for tensor in tree_leaves(result) for pair in self._of(tensor).items()):
            self._complain(source, "its output is an output of the model", [labels])
        for name in (name for name, runs in self._runs.items() if runs > 1):
            self._faults.setdefault(name, "runs twice in a pass")
        for source, target in self.connections:
            if target in self._faults:
                self.reasons[source] = f"layer {target!r}, which it feeds, {self._faults[target]}"
        self.reasons |= {name: f"it {fault}" for name, fault in self._faults.items()}

    def products(self) -> tuple[Product, ...]:
        """The pairs of layers that are multiplied with each other and have a law by it.

        One factor must be nothing else, so that its whole sum of error × value is the other's by the product.
        """
        kept: list[Product] = []
        for (source, partner), pairs in self._pairs.items():
            if source in self._groups:
                groups, factor = self._groups[source], source.removesuffix(_HEADS)
                alone = self._alone(factor, groups >= 0) and self._alone(partner, pairs[:, 1])
                if alone and source not in self.reasons:
                    kept.append(Product(source=factor, partner=partner, pairs=pairs, groups=groups))
                continue
            for one, other, both in ((source, partner, pairs), (partner, source, pairs.flip(1))):
                if self._alone(other, both[:, 1]):
                    alone = self._alone(one, both[:, 0])
                    kept.append(Product(source=one, partner=other, pairs=both, alone=alone))
                    break
            else:
                for one, other in ((source, partner), (partner, source)):
                    reason = self.reasons.get(other, "it is used elsewhere as well")
                    self._complain(one, f"layer {other!r}, with which it is multiplied, is under no law: {reason}")
        for name in self._groups:
            self.reasons.pop(name, None)
        return tuple(kept)

    def _alone(self, name: str, rows: Tensor) -> bool:
        """Test whether neurons are a factor of one product at most, be it with neurons or scores, and nothing else."""
        if name in self._faults or (name, None) in self._used:
            return False
        uses = torch.zeros(self.neurons[name], dtype=torch.int64)
        for source, labels in self._used:
            if source == name and labels is not None:
                members = labels.unique().cpu()
                uses[members[members >= 0]] += 2
        for pair, pairs in self._pairs.items():
            for one, members in zip(pair, pairs.cpu().unbind(1), strict=True):
                if one == name:
                    uses[members.unique()] += 1
        return not bool((uses[rows.cpu()] > 1).any())

    def _of(self, tensor: Any) -> dict[str, NeuronLabels]:
        return self._labels_by_tensor.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def _fresh(self, output: Tensor, axis: int) -> Tensor:
        """Labels of a layer's output, shared by outputs of one shape, so that they can be compared by identity."""
        key = (*output.shape, *output.stride(), axis, output.device)
        if key not in self._new:
            self._new[key] = labels_of_output(output, axis)
        return self._new[key]

    def _complain(self, source: str, reason: str, operands: list[NeuronLabels] | None = None) -> None:
        """Note a reason against a law, and which neurons it is about: all, if no labels are given."""
        self.reasons.setdefault(source, reason)
        if operands is None:
            self._used.append((source, None))
        for operand in operands or ():
            self._use(source, operand)

    def _use(self, source: str, operand: NeuronLabels) -> None:
        """Note neurons whose output does something else than be a factor of a product."""
        if operand.direct:
            self._used.append((source, operand.labels))

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._depth += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            return
        moving = isinstance(module, _BatchNorm) and not (module.training or module.running_mean is None)
        self._feed(name, x, _axis(module, x), moving)

    def _feed(self, name: str, x: Tensor, axis: int, moving: bool = False) -> None:
        """Note whose neurons are the input of a layer, along an axis."""
        self.types.append(x.dtype)
        columns_of: dict[int, Tensor | None] = {}  # in a residual network many sources share their labels
        for source, operand in self._of(x).items():
            if source in self._groups:
                self._complain(source, "they are the input of a layer")
                continue
            self._use(source, operand)
            labels = operand.labels
            if id(labels) not in columns_of:
                columns_of[id(labels)] = neuron_of_feature(labels, axis)
            columns = columns_of[id(labels)]
            if moving:
                self._complain(source, "batch normalisation by running statistics shifts its output")
            if columns is None:
                self._complain(source, f"its neurons are not the same inputs of layer {name!r} in all positions")
            elif bool((columns != OTHER).any()):
                self.connections.setdefault((source, name), columns)

    def _enter_open(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of a batch normalisation with more in its forward, as an activation: what follows is looked at."""
        self._enter(name, module, args, kwargs)
        self._depth -= 1
        self._open = name if module._parameters.get("weight") is not None else None

    def _leave_open(self, *_: Any) -> None:
        self._open = None

    def _cut(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of a module that a direct rule cuts as a whole: its input gets another error than its own."""
        for tensor in tree_leaves((args, kwargs)):
            for source in self._of(tensor):
                self._complain(source, f"module {name!r} hands back the output's error (direct feedback), not its own")

    def _enter_whole(self, structure: Structure, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of a module whose inside is known."""
        self._depth += 1
        given = [*args, *(kwargs.get(name) for name in structure.arguments[len(args) :])]
        for x, names in zip(given, structure.inputs, strict=False):
            x = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
            for name in names if isinstance(x, Tensor) else ():
                self._feed(name, x, x.dim() - 1)
        state = given[1] if structure.recurrent and len(given) > 1 else None
        state = state[0] if isinstance(state, tuple) else state
        if isinstance(state, Tensor) and (self._varies(state) or bool(state.any())):
            for source in structure.sources:
                self._complain(source.name, source.reason or "it starts from a state that is not zero")

    def _leave_whole(self, structure: Structure, module: nn.Module, args: tuple, result: Any) -> None:
        """Hook of a module whose inside is known: its neurons, which feed maps inside, and what it returned."""
        self._depth -= 1
        for source in structure.sources:
            self._runs[source.name] += 1
            self.neurons[source.name] = structure.maps[source.name].weight.count
            if source.reason:
                self._complain(source.name, source.reason)
            for target, columns in source.targets.items():
                self.connections.setdefault((source.name, target), columns)
        for pair in structure.products:
            pairs = torch.arange(self.neurons[pair[0]])
            self._pairs[pair] = torch.stack([pairs, pairs], 1)
        for tensor, source, labels, is_output in labels_of_outputs(structure, result):
            known = self._of(tensor)
            self._labels_by_tensor[tensor] = {**known, source: NeuronLabels(labels, is_output)}

    def _leave(self, name: str, module: nn.Module, args: tuple, y: Any) -> None:
        self._depth -= 1
        if not isinstance(y, Tensor) or (kind_of(module) is None and module._parameters.get("weight") is None):
            return  # a normalisation without parameters has no neurons of its own
        self._name_neurons(name, y, _axis(module, y))

    def _name_neurons(self, name: str, y: Tensor, axis: int) -> None:
        self._runs[name] += 1
        self.neurons[name] = y.shape[axis]
        self._labels_by_tensor[y] = {name: NeuronLabels(self._fresh(y, axis), is_output=True)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = [self._of(leaf) for leaf in tree_leaves((args, kwargs))] if not self._depth else []
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if self._open is not None and not self._depth and "batch_norm" in func.overloadpacket.__name__:
            name, self._open = self._open, None
            self._name_neurons(name, outputs[0], min(1, outputs[0].dim() - 1))
            return result
        if not self._depth:
            self._note_parameters(func.overloadpacket.__name__, tree_leaves((args, kwargs)), outputs)
        product = _Product({}, set(), set(), {})
        if any(operands):
            self._multiply(func.overloadpacket.__name__, args, outputs[0], product)
        if any(isinstance(leaf, Tensor) and self._varies(leaf) for leaf in tree_leaves((args, kwargs))):
            self._trained.update((output, True) for output in outputs)
        labels_of_outputs: list[dict[str, NeuronLabels]] = [{} for _ in outputs]
        # In a residual network most sources have the same labels in the same operands: they are propagated once.
        known: dict[tuple[tuple[int, bool] | None, ...], tuple[Propagated, bool]] = {}
        for source in dict.fromkeys(source for operand in operands for source in operand):
            if source in product.paired:
                if source in product.carried:
                    labels_of_outputs[0][source] = NeuronLabels(product.carried[source], False)
                continue
            given = (operand.get(source) for operand in operands)
            key = tuple(None if labels is None else (id(labels.labels), labels.is_output) for labels in given)
            if key not in known:
                operation = Operation(func, args, kwargs, result, partial(self._labels, source), self._varies)
                is_output = keeps_order(operation) and all(
                    operand[source].is_output for operand in operands if source in operand
                )
                known[key] = propagate(operation), is_output
            propagated, is_output = known[key]
            direct = all(operand[source].direct for operand in operands if source in operand)
            if propagated.reason is not None:
                scored = source + _HEADS in product.scores
                mine = [] if scored else [operand[source] for operand in operands if source in operand]
                self._complain(source, propagated.reason, mine)
            parts = propagated.labels if isinstance(propagated.labels, (list, tuple)) else [propagated.labels]
            for by_source, labels in zip(labels_of_outputs, parts, strict=False):
                if labels is not None:
                    by_source[source] = NeuronLabels(labels, is_output, direct and source not in product.values)
        for source, groups in product.scores.items():
            labels_of_outputs[0][source] = NeuronLabels(groups.expand(outputs[0].shape).clone(), False, False)
        if any(operands):
            self._labels_by_tensor.update(zip(outputs, labels_of_outputs, strict=True))
        return result

    def _note_parameters(self, operation: str, operands: list[Any], outputs: list[Tensor]) -> None:
        """Note parameters that an operation outside of layers uses, such as the weight of a layer for another purpose.

        The law of a layer knows of the layer's own use of its weight, and of no feedback but that of layers.
        """
        names = {self._parameters[leaf] for leaf in operands if isinstance(leaf, Tensor) and leaf in self._parameters}
        if names and operation in VIEWS:
            self._parameters.update((output, min(names)) for output in outputs)
            return
        for name in names:
            owner = name.rpartition(".")[0]
            for one in self._structures.get(owner, (owner,) if owner in self._layers else ()):
                self._faults.setdefault(one, "has a parameter that is used outside of it")
        for name in names & self._fed:
            for source in {source for operand in operands for source in self._of(operand)}:
                self._complain(source, f"it is multiplied by parameter {name!r}, which has feedback of its own")

    def _multiply(self, name: str, args: tuple, result: Tensor, product: "_Product") -> None:
        """Note which neurons an operation multiplies with which, if it is a product of two activations."""
        if (found := factors(name, args)) is None:
            return
        trained = any(self._parameters.get(factor) for factor in (found.first, found.second))
        sides = [
            {source: summed_labels(labels.labels, axis) for source, labels in self._of(factor).items()}
            for factor, axis in zip((found.first, found.second), found.axes, strict=True)
        ]
        for source, features in sides[0].items():
            if source in self._groups:
                self._weigh(source, found, product)
                continue
            for partner, others in sides[1].items():
                pairs = None if features is None or others is None else paired(features, others)
                if pairs is not None and not _constant(features, others) and _disjoint(source, partner, pairs):
                    self._note_pairs(source, partner, pairs)
                    product.paired.update((source, partner))
        if name in ("mm", "bmm") and not trained:
            factor = next((side for side in sides if len(side) == 1 and not _constant(*side.values())), {})
            for source, features in factor.items():
                self._score(source, features, product)
        for source, operand in self._of(args[2]).items() if not found.scores else ():
            labels = attended_values(operand.labels, result.shape) if source in product.paired else None
            if labels is not None:
                product.carried[source] = labels

    def _note_pairs(self, source: str, partner: str, pairs: Tensor) -> None:
        known = [self._pairs[source, partner]] if (source, partner) in self._pairs else []
        self._pairs[source, partner] = torch.cat([*known, pairs]).unique(dim=0)

    def _score(self, source: str, features: Tensor | None, product: "_Product") -> None:
        """Follow scores, which are homogeneous in all neurons that are summed to one."""
        sets = None if features is None or source in self._groups else grouped(features, self.neurons[source])
        if sets is None:
            return
        groups, numbers = sets
        if source + _HEADS not in self._groups:
            self._groups[source + _HEADS] = groups
        elif not torch.equal(groups, self._groups[source + _HEADS]):
            self._complain(source + _HEADS, "its neurons are summed in several ways")
        product.scores[source + _HEADS] = numbers[..., None, None]

    def _weigh(self, scores: str, found: Factors, product: "_Product") -> None:
        """Note which neurons, the values, a group of scores weighs."""
        group, same = common_label(self._of(found.first)[scores].labels, [-2, -1], True)
        values = self._of(found.second)
        if not (found.scores and same and len(values) == 1 and bool((group >= 0).all())):
            return
        ((partner, labels),) = values.items()
        members = torch.stack([group.expand(labels.labels.shape).flatten(), labels.labels.flatten()], 1).unique(dim=0)
        whose = self._groups[scores] if partner == scores.removesuffix(_HEADS) else None
        own = whose is not None and bool((whose[members[:, 1].clamp_min(0)] >= 0).any())
        if partner in self._groups or own or bool((members < 0).any()):
            return
        self._note_pairs(scores, partner, members)
        product.paired.add(scores)
        product.values.add(partner)

    def _varies(self, leaf: Tensor) -> bool:
        """True if training changes it: if it is zero now, as a new bias is, it will not stay so."""
        return leaf.requires_grad or leaf in self._trained or bool(self._of(leaf))

    def _labels(self, source: str, leaf: Any) -> Tensor | None:
        labels = self._of(leaf).get(source)
        return None if labels is None else labels.labels


def _is_direct(part: Feedback) -> bool:
    """Test whether feedback is of a direct rule."""
    return part.wiring.rule.wiring == "direct"


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
