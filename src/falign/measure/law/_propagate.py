"""Propagation of neuron labels through one operation of PyTorch, from its operands to its result.

The law needs Euler's identity ``J(h) h = f(h)``, J the Jacobian that autograd uses: f is then homogeneous of degree
one, and the sum of error × value over a neuron's elements is the same before and after the operation. Each operation
either keeps this, and its labels move as its elements do, or it becomes a reason why there is no law.
"""

import re
from collections.abc import Callable
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Labels: a tensor of an activation's shape. An entry is the index of the neuron whose output that element is, up to
# factors that do not depend on the neuron's size.

OTHER, ZERO = -1, -2
"""Labels of an element that is not the source's, and of one that is always zero, such as padding.

A zero adds nothing to the sum of error × value of any neuron, so it may be counted as any neuron's.
"""


class NeuronLabels(NamedTuple):
    """Labels of an activation by the neurons of one source.

    Attributes:
        labels: The neuron of each element, OTHER or ZERO.
        is_output: Whether the activation is the source's output itself, element by element in its order.
        direct: Whether no product with another activation is on the way from the source.
    """

    labels: Tensor
    is_output: bool
    direct: bool = True


def common_label(labels: Tensor, axes: list[int], keep: bool) -> tuple[Tensor, bool]:
    """Find the label shared by all elements along axes, those with ZERO aside, and whether there is one."""
    highest = labels.amax(axes, keepdim=True)
    lowest = torch.where(labels == ZERO, highest, labels).amin(axes, keepdim=True)
    return highest if keep else labels.amax(axes), bool(torch.equal(lowest, highest))


def neuron_of_feature(labels: Tensor, axis: int) -> Tensor | None:
    """Find the neuron of every feature along an axis, OTHER for none; None if samples or positions differ."""
    features = labels.movedim(axis, 0).flatten(1) if labels.dim() > 1 else labels[:, None]
    neurons, same = common_label(features, [1], False)
    return neurons.masked_fill(neurons == ZERO, OTHER) if same else None


def labels_of_output(output: Tensor, axis: int) -> Tensor:
    """Label a source's output: its features along an axis, in order."""
    shape = [1] * output.dim()
    shape[axis] = -1
    numbers = torch.arange(output.shape[axis], device=output.device).view(shape)
    return torch.empty_like(output, dtype=torch.int64).copy_(numbers)


# Operations between two layers by what they do to a neuron's output, under the names that ``__torch_dispatch__`` sees.

_POOLING = re.compile(
    r"_?(mkldnn_)?(adaptive_)?(max_pool|avg_pool|fractional_max_pool|upsample_\w+?|reflection_pad|replication_pad)(?P<dimensions>\d)d"
)
"""Mix positions within each channel."""

_SAME_ORDER = {"view", "_unsafe_view", "squeeze", "unsqueeze", "alias", "clone", "_to_copy", "lift_fresh"}
"""The result is the operand, element by element in its order."""

_CONSTANT = {
    "detach", "sign", "heaviside", "floor", "ceil", "round", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
}  # fmt: skip
"""Return no error to their operands, so their results are not the source's."""

_MOVES = {
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "select", "slice", "unsqueeze", "squeeze", "unfold",
    "split", "split_with_sizes", "unbind", "flip", "roll", "index_select", "gather", "index", "repeat", "diagonal",
    "constant_pad_nd", "cat", "stack", "alias", "lift_fresh", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
}  # fmt: skip
"""Move elements to other places, without changing them."""

VIEWS = _MOVES | {"detach", "clone", "_to_copy"}
"""The result is the operand's elements or some of them, unchanged."""

_PARTS = {"select", "slice", "split", "split_with_sizes", "unbind"}
"""Take parts of the elements."""

_PACKINGS = {"_pack_padded_sequence", "_pad_packed_sequence"}
"""Move the positions of sequences of several lengths together, or apart."""

_CHOICES = {"where", "masked_fill"}
"""Take each element from one of two operands."""

_SCALINGS = {
    "relu", "leaky_relu", "rrelu_with_noise", "rrelu_with_noise_functional", "abs", "neg", "_prelu_kernel",
    "native_dropout", "_fused_dropout", "mul", "div", "clone", "_to_copy", "contiguous",
}  # fmt: skip
"""Multiply every element by a factor that does not depend on its size: for relu, 0 or 1."""

_CLIPS = {"threshold", "clamp", "clamp_min", "clamp_max"}
"""Scale elements likewise if their bounds are zero or absent, as relu does."""

_JOINS = {"add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin"}
"""Are homogeneous in both operands together, if both are of the same neurons."""

_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min"}
"""Are homogeneous, if the elements that are reduced are of one neuron."""

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "_convolution", "linear", "matmul"}
"""Multiply with a matrix outside of layers."""

_WORDS = {
    "elu": "elu (or selu, celu)", "hardtanh": "a clipped activation (hardtanh, relu6)", "silu": "silu (swish)",
    "clamp": "a clipped activation (clamp)", "native_layer_norm": "layer normalisation",
    "_fused_rms_norm": "rms normalisation", "native_group_norm": "group normalisation",
    "native_batch_norm": "batch normalisation outside its module", "_softmax": "softmax", "pow": "a power",
    "_log_softmax": "log-softmax", "_native_batch_norm_legit": "batch normalisation outside its module",
    "hardswish": "hard-swish", "hardsigmoid": "hard-sigmoid", "log_sigmoid_forward": "log-sigmoid",
}  # fmt: skip
"""Operations by the names that users know."""


class Operation(NamedTuple):
    """One operation with its operands and its result, as one source sees it.

    Attributes:
        function: The operation.
        args: Its positional operands.
        kwargs: Its keyword operands.
        result: Its result.
        labels: operand -> its labels by the source, None for an operand without any of its neurons.
        varies: operand -> whether training changes it, so that a zero in it is no ZERO.
    """

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    result: Any
    labels: Callable[[Any], Tensor | None]
    varies: Callable[[Tensor], bool]

    @property
    def name(self) -> str:
        """The operation's name, the same for its in-place form."""
        return self.function.overloadpacket.__name__.rstrip("_")

    @property
    def in_place(self) -> bool:
        """True if it writes into its first operand."""
        return self.function.overloadpacket.__name__.endswith("_")

    @property
    def first(self) -> Tensor:
        """Labels of the first operand that has any."""
        return next(labels for labels in map(self.labels, tree_leaves((self.args, self.kwargs))) if labels is not None)


class Propagated(NamedTuple):
    """Labels of an operation's result, and the reason why it breaks the law, if it does.

    Attributes:
        labels: A tensor, a list of them for a list of results, or None where the neurons are lost.
        reason: In words; None where the law is kept.
    """

    labels: Any
    reason: str | None = None


def propagate(operation: Operation) -> Propagated:
    """Propagate the labels of one source through one operation."""
    outputs = [leaf for leaf in tree_leaves(operation.result) if isinstance(leaf, Tensor)]
    if operation.name in _CONSTANT or not any(output.is_floating_point() for output in outputs):
        return Propagated(None)
    for names, way in _PROPAGATIONS:
        if operation.name in names:
            return way(operation)
    if operation.name.startswith("_scaled_dot_product"):
        return _attended(operation)
    if dimensions := _POOLING.match(operation.name):
        return _pooled(operation, int(dimensions["dimensions"]))
    return _other(operation)


def _moved(operation: Operation) -> Propagated:
    """Apply the operation to the labels themselves; zeros that it puts in, such as padding, are ZERO."""

    def relabelled(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        labels = operation.labels(leaf)
        if labels is None:
            return torch.full_like(leaf, OTHER if leaf.any() or operation.varies(leaf) else ZERO, dtype=torch.int64)
        return labels.clone() if operation.in_place else labels  # labels are shared, so they are not written to

    if operation.name in ("view", "_unsafe_view"):  # labels may have other strides, which view would refuse
        return Propagated(operation.first.reshape(operation.args[1]))
    args, kwargs = tree_map(relabelled, (operation.args, operation.kwargs))
    if operation.name == "constant_pad_nd":
        filling = args[2] if len(args) > 2 else 0
        args = (*args[:2], ZERO if filling == 0 else OTHER)
    labels = operation.function(*args, **kwargs)
    if operation.name in _PARTS:  # a part without any of the source's neurons is none of its business
        labels = tree_map(lambda part: part if bool((part >= 0).any()) else None, labels)
    return Propagated(labels)


def _packed(operation: Operation) -> Propagated:
    """Propagate through packing of sequences and back; positions that are padded with zero are ZERO."""
    labels, *others = operation.args
    if operation.name == "_pad_packed_sequence":
        others[2] = ZERO if others[2] == 0 else OTHER
    moved, _ = operation.function(operation.labels(labels), *others)
    return Propagated([moved, None])


def _chosen(operation: Operation) -> Propagated:
    """Propagate through ``where`` and ``masked_fill``: an element that may be zero instead stays its neuron's."""
    mask, chosen, other = (
        operation.args if operation.name == "where" else (operation.args[1], operation.args[2], operation.args[0])
    )
    mine, others = (_broadcast(choice, operation) for choice in (chosen, other))
    chosen_labels = torch.where(mask, mine, others)
    return Propagated(torch.where(mine == ZERO, others, torch.where(others == ZERO, mine, chosen_labels)))


def _broadcast(choice: Any, operation: Operation) -> Tensor:
    labels = operation.labels(choice)
    if labels is None:  # a score of -∞ is left out of attention: relu and softmax make it zero
        number = float(choice) if not isinstance(choice, Tensor) or choice.numel() == 1 else nan
        zero = number in (0.0, -inf) or (isinstance(choice, Tensor) and not choice.any())
        zero = zero and not (isinstance(choice, Tensor) and operation.varies(choice))
        labels = operation.first.new_full((), ZERO if zero else OTHER)
    return labels.broadcast_to(_output(operation.result).shape)


def _scaled(operation: Operation) -> Propagated:
    """Keep the labels, unless the factor is itself made of the source's output."""
    labelled = [operation.labels(leaf) is not None for leaf in tree_leaves(operation.args)]
    if sum(labelled) > 1:
        return Propagated(_labels_of_result(operation), "it is multiplied by an activation of its own")
    if not labelled[0] and operation.name != "mul":
        return Propagated(_labels_of_result(operation), f"{operation.name} by it is not homogeneous")
    return Propagated(_labels_of_result(operation))


def _clipped(operation: Operation) -> Propagated:
    """Keep the labels; bounds other than zero break the law."""
    bounds = [bound for bound in (*operation.args[1:], *operation.kwargs.values()) if bound is not None]
    if any(not isinstance(bound, (int, float)) or bound != 0 for bound in bounds):
        return Propagated(
            _labels_of_result(operation), f"{_WORDS.get(operation.name, operation.name)} is not homogeneous"
        )
    return Propagated(_labels_of_result(operation))


def _joined(operation: Operation) -> Propagated:
    """Keep the labels of sums and maxima if all operands are of the same neurons."""
    operands = [leaf for leaf in tree_leaves(operation.args[:2]) if not _is_zero(leaf, operation)]
    labels = [operation.labels(operand) for operand in operands]
    if all(label is operation.first or (label is not None and torch.equal(label, operation.first)) for label in labels):
        return Propagated(_labels_of_result(operation))
    scalar = any(not isinstance(operand, Tensor) or operand.dim() == 0 for operand in operands)
    return Propagated(
        _labels_of_result(operation),
        "a number is added to its output" if scalar else "its output is added to another (residual connection)",
    )


def _reduced(operation: Operation) -> Propagated:
    """Give a mean, sum or maximum over elements of one neuron to that neuron."""
    labels = operation.first
    axes = operation.args[1] if len(operation.args) > 1 else None
    axes = [axes] if isinstance(axes, int) else list(axes or range(labels.dim()))
    keep = bool(operation.args[2]) if len(operation.args) > 2 else False
    highest, same = common_label(labels, axes, keep)
    return Propagated(highest) if same else Propagated(None, f"{operation.name} mixes its neurons")


def _pooled(operation: Operation, dimensions: int) -> Propagated:
    """Propagate through pooling and resizing, which mix positions: each channel keeps its label."""
    labels = operation.first
    highest, same = common_label(labels, list(range(labels.dim() - dimensions, labels.dim())), True)
    if not same:
        return Propagated(None, f"{operation.name} mixes its neurons")
    return Propagated(highest.expand(_output(operation.result).shape).clone())


def _multiplied(operation: Operation) -> Propagated:
    """Propagate through a product that mixes positions of one neuron; one that mixes neurons is a layer of its own."""
    labelled = [index for index, operand in enumerate(operation.args) if operation.labels(operand) is not None]
    if len(labelled) == 1 and operation.name in ("mm", "bmm"):
        highest, same = common_label(operation.first, [-1 - labelled[0]], True)
        if same:
            return Propagated(highest.broadcast_to(_output(operation.result).shape))
    return Propagated(None, "it is multiplied by a matrix outside the layers")


def _attended(operation: Operation) -> Propagated:
    """Propagate through attention, which is linear in its values, and not homogeneous in queries and keys."""
    values = [index for index, operand in enumerate(operation.args) if operation.labels(operand) is not None] == [2]
    labels = attended_values(operation.first, _output(operation.result).shape)
    return Propagated(labels, None if values and labels is not None else "attention is not homogeneous")


def attended_values(labels: Tensor, shape: torch.Size) -> Tensor | None:
    """Labels of what attention makes of values (..., heads, positions, features); None if it mixes neurons."""
    common, same = common_label(labels, [-2], True)
    if common.dim() > 2 and common.shape[-3] < shape[-3] and shape[-3] % common.shape[-3] == 0:
        common = common.repeat_interleave(shape[-3] // common.shape[-3], -3)  # heads that share their values
    return common.broadcast_to(shape) if same else None


def _other(operation: Operation) -> Propagated:
    """Give a reason against the law; the neurons can still be followed if the operation keeps the shape."""
    result = _output(operation.result)
    if operation.name == "copy":
        return Propagated(_labels_of_result(operation), "it is written into another tensor")
    reason = f"{_WORDS.get(operation.name, operation.name)} is not homogeneous"
    return Propagated(_labels_of_result(operation) if result.shape == operation.first.shape else None, reason)


def keeps_order(operation: Operation) -> bool:
    """Test whether the result is the operand, element by element in its order."""
    return operation.name in _SAME_ORDER


def _output(result: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _labels_of_result(operation: Operation) -> Tensor:
    labels, shape = operation.first, _output(operation.result).shape
    return labels if labels.shape == shape else labels.broadcast_to(shape)  # the same labels for all that have the same


def _is_zero(leaf: Any, operation: Operation) -> bool:
    """Test for the number zero; an activation may be zero by chance, and a parameter only before training."""
    return leaf.dim() == 0 and not (leaf.any() or operation.varies(leaf)) if isinstance(leaf, Tensor) else leaf == 0


_PROPAGATIONS: tuple[tuple[set[str], Callable[[Operation], Propagated]], ...] = (
    (_MOVES, _moved), (_PACKINGS, _packed), (_CHOICES, _chosen), (_SCALINGS, _scaled), (_CLIPS, _clipped),
    (_JOINS, _joined), (_REDUCTIONS, _reduced), (_PRODUCTS, _multiplied),
)  # fmt: skip
