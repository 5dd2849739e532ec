"""How one operation carries the labels of its operands to its result.

What matters is Euler's identity ``J(h) h = f(h)``, J as autograd has it: where it holds, the sum of error × value over
a neuron's elements is the same before and behind the operation.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Which neuron each element of an activation belongs to.
#
# A label tensor has an activation's shape; its entry is the index of the neuron whose output that element is, up to
# factors that do not depend on the neuron's size.

OTHER, ZERO = -1, -2
"""Labels of an element that is no output of the source, and of one that is zero, so that it may be anybody's."""


class NeuronLabels(NamedTuple):
    """What is known about an activation as an output of one source.

    Attributes:
        labels: The neuron of each element.
        bare: Whether it is the source's output itself, element by element in its order.
    """

    labels: Tensor
    bare: bool


def common_label(labels: Tensor, axes: list[int], keep: bool) -> tuple[Tensor, bool]:
    """The label shared along axes, zeros left out, and whether there is one."""
    highest = labels.amax(axes, keepdim=True)
    lowest = torch.where(labels == ZERO, highest, labels).amin(axes, keepdim=True)
    return highest if keep else labels.amax(axes), bool(torch.equal(lowest, highest))


def neuron_of_feature(labels: Tensor, axis: int) -> Tensor | None:
    """The neuron of every feature along an axis, OTHER where there is none; None where samples or positions differ."""
    features = labels.movedim(axis, 0).flatten(1) if labels.dim() > 1 else labels[:, None]
    found, same = common_label(features, [1], False)
    return found.masked_fill(found == ZERO, OTHER) if same else None


def labels_of_output(output: Tensor, axis: int) -> Tensor:
    """Labels of a source's own output: its features along an axis, in order."""
    shape = [1] * output.dim()
    shape[axis] = -1
    numbers = torch.arange(output.shape[axis], device=output.device).view(shape)
    return torch.empty_like(output, dtype=torch.int64).copy_(numbers)


# What the operations between two layers do to the neurons that pass, by PyTorch's names for them.

_POOLING = re.compile(
    r"_?(mkldnn_)?(adaptive_)?(max_pool|avg_pool|fractional_max_pool|upsample_\w+?|reflection_pad|replication_pad)(?P<dimensions>\d)d"
)
"""Channel by channel over the last positions."""

_SAME_ORDER = {"view", "_unsafe_view", "squeeze", "unsqueeze", "alias", "clone", "_to_copy", "lift_fresh"}
"""The result is the operand, element by element in its order."""

_CONSTANT = {
    "detach", "sign", "heaviside", "floor", "ceil", "round", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
}  # fmt: skip
"""No error returns through these."""

_MOVES = {
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "select", "slice", "unsqueeze", "squeeze", "unfold",
    "split", "split_with_sizes", "unbind", "flip", "roll", "index_select", "gather", "index", "repeat", "diagonal",
    "constant_pad_nd", "cat", "stack", "alias", "lift_fresh", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
}  # fmt: skip
"""Elements change their places."""

_CHOICES = {"where", "masked_fill"}
"""Each element is one of two."""

_SCALINGS = {
    "relu", "leaky_relu", "rrelu_with_noise", "rrelu_with_noise_functional", "abs", "neg", "_prelu_kernel",
    "native_dropout", "_fused_dropout", "mul", "div", "clone", "_to_copy", "contiguous",
}  # fmt: skip
"""Every element is multiplied by something that does not depend on its size."""

_CLIPS = {"threshold", "clamp", "clamp_min", "clamp_max"}
"""Gates, where their bounds are zero or absent."""

_JOINS = {"add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin"}
"""Homogeneous in both operands together."""

_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min"}
"""Homogeneous, where what is reduced is of one neuron."""

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "_convolution", "linear", "matmul"}
"""Products with a matrix outside the layers."""

_WORDS = {
    "elu": "elu (or selu, celu)", "hardtanh": "a clipped activation (hardtanh, relu6)", "silu": "silu (swish)",
    "clamp": "a clipped activation (clamp)", "native_layer_norm": "layer normalisation",
    "_fused_rms_norm": "rms normalisation", "native_group_norm": "group normalisation",
    "native_batch_norm": "batch normalisation outside its module", "_softmax": "softmax", "pow": "a power",
    "_log_softmax": "log-softmax", "_native_batch_norm_legit": "batch normalisation outside its module",
    "hardswish": "hard-swish", "hardsigmoid": "hard-sigmoid", "log_sigmoid_forward": "log-sigmoid",
}  # fmt: skip
"""What a user calls them."""


class Operation(NamedTuple):
    """One operation, its operands and result, the labels of one source in them, and whether training changes one."""

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
        """Whether it writes into its first operand."""
        return self.function.overloadpacket.__name__.endswith("_")

    @property
    def first(self) -> Tensor:
        """The labels of the first operand that has some."""
        return next(labels for labels in map(self.labels, tree_leaves((self.args, self.kwargs))) if labels is not None)


class Propagated(NamedTuple):
    """Labels of the result (a tensor, or a list where the result is one), and what is wrong with the operation."""

    labels: Any
    reason: str | None = None


def propagate(call: Operation) -> Propagated:
    """Carry the labels of one source through one operation."""
    outputs = [leaf for leaf in tree_leaves(call.result) if isinstance(leaf, Tensor)]
    if call.name in _CONSTANT or not any(output.is_floating_point() for output in outputs):
        return Propagated(None)  # no error returns from it
    for names, way in _WAYS:
        if call.name in names:
            return way(call)
    if call.name.startswith("_scaled_dot_product"):
        return _attended(call)
    if dimensions := _POOLING.match(call.name):
        return _pooled(call, int(dimensions["dimensions"]))
    return _other(call)


def _moved(call: Operation) -> Propagated:
    """Elements change their places: the labels do the same, and zeros that are put in belong to anybody."""

    def relabelled(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        labels = call.labels(leaf)
        if labels is None:
            return torch.full_like(leaf, OTHER if leaf.any() or call.varies(leaf) else ZERO, dtype=torch.int64)
        return labels.clone() if call.in_place else labels

    if call.name in ("view", "_unsafe_view"):
        return Propagated(call.first.reshape(call.args[1]))
    args, kwargs = tree_map(relabelled, (call.args, call.kwargs))
    if call.name == "constant_pad_nd":
        filling = args[2] if len(args) > 2 else 0
        args = (*args[:2], ZERO if filling == 0 else OTHER)
    return Propagated(call.function(*args, **kwargs))


def _chosen(call: Operation) -> Propagated:
    """``where`` and ``masked_fill``: a place where the other choice is zero stays whose it is."""
    mask, chosen, other = call.args if call.name == "where" else (call.args[1], call.args[2], call.args[0])
    mine, others = (_broadcast(choice, call) for choice in (chosen, other))
    found = torch.where(mask, mine, others)
    return Propagated(torch.where(mine == ZERO, others, torch.where(others == ZERO, mine, found)))


def _broadcast(choice: Any, call: Operation) -> Tensor:
    labels = call.labels(choice)
    if labels is None:
        zero = not (choice.any() or call.varies(choice)) if isinstance(choice, Tensor) else choice == 0
        labels = call.first.new_full((), ZERO if zero else OTHER)
    return labels.broadcast_to(_output(call.result).shape)


def _gated(call: Operation) -> Propagated:
    """Every element is multiplied by something that does not depend on its size."""
    labelled = [call.labels(leaf) is not None for leaf in tree_leaves(call.args)]
    if sum(labelled) > 1:
        return Propagated(_spread(call), "it is multiplied by an activation of its own")
    if not labelled[0] and call.name != "mul":
        return Propagated(_spread(call), f"{call.name} by it is not homogeneous")
    return Propagated(_spread(call))


def _clipped(call: Operation) -> Propagated:
    """Homogeneous where the bounds are zero or absent."""
    bounds = [bound for bound in (*call.args[1:], *call.kwargs.values()) if bound is not None]
    if any(not isinstance(bound, (int, float)) or bound != 0 for bound in bounds):
        return Propagated(_spread(call), f"{_WORDS.get(call.name, call.name)} is not homogeneous")
    return Propagated(_spread(call))


def _joined(call: Operation) -> Propagated:
    """Sums and maxima are homogeneous in all operands together: all must be of the same neuron."""
    operands = [leaf for leaf in tree_leaves(call.args[:2]) if not _is_zero(leaf, call)]
    labels = [call.labels(operand) for operand in operands]
    if all(label is call.first or (label is not None and torch.equal(label, call.first)) for label in labels):
        return Propagated(_spread(call))
    scalar = any(not isinstance(operand, Tensor) or operand.dim() == 0 for operand in operands)
    return Propagated(
        _spread(call),
        "a number is added to its output" if scalar else "its output is added to another (residual connection)",
    )


def _reduced(call: Operation) -> Propagated:
    """A mean, sum or maximum over elements of one neuron is that neuron's."""
    labels = call.first
    axes = call.args[1] if len(call.args) > 1 else None
    axes = [axes] if isinstance(axes, int) else list(axes or range(labels.dim()))
    keep = bool(call.args[2]) if len(call.args) > 2 else False
    highest, same = common_label(labels, axes, keep)
    return Propagated(highest) if same else Propagated(None, f"{call.name} mixes its neurons")


def _pooled(call: Operation, dimensions: int) -> Propagated:
    """Pooling and resizing over positions: each channel stays itself."""
    labels = call.first
    highest, same = common_label(labels, list(range(labels.dim() - dimensions, labels.dim())), True)
    if not same:
        return Propagated(None, f"{call.name} mixes its neurons")
    return Propagated(highest.expand(_output(call.result).shape).clone())


def _multiplied(call: Operation) -> Propagated:
    """A product with a matrix mixes elements along one axis: those of one neuron, if it is positions that it mixes."""
    labelled = [index for index, operand in enumerate(call.args) if call.labels(operand) is not None]
    if len(labelled) == 1 and call.name in ("mm", "bmm"):
        highest, same = common_label(call.first, [-1 - labelled[0]], True)
        if same:
            return Propagated(highest.broadcast_to(_output(call.result).shape))
    return Propagated(None, "it is multiplied by a matrix outside the layers")


def _attended(call: Operation) -> Propagated:
    """Attention is linear in its values, whose positions it mixes, and not homogeneous in queries and keys."""
    highest, same = common_label(call.first, [-2], True)
    values = [index for index, operand in enumerate(call.args) if call.labels(operand) is not None] == [2]
    labels = highest.broadcast_to(_output(call.result).shape) if same else None
    return Propagated(labels, None if values and same else "attention is not homogeneous")


def _other(call: Operation) -> Propagated:
    """Not known to be homogeneous; if it works element by element the neurons can still be told."""
    result = _output(call.result)
    if call.name == "copy":
        return Propagated(_spread(call), "it is written into another tensor")
    reason = f"{_WORDS.get(call.name, call.name)} is not homogeneous"
    return Propagated(_spread(call) if result.shape == call.first.shape else None, reason)


def keeps_order(call: Operation) -> bool:
    """Whether the result is the operand itself, element by element in its order."""
    return call.name in _SAME_ORDER


def _output(result: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _spread(call: Operation) -> Tensor:
    labels, shape = call.first, _output(call.result).shape
    return labels if labels.shape == shape else labels.broadcast_to(shape)  # the same labels for all that have the same


def _is_zero(leaf: Any, call: Operation) -> bool:
    """Whether it is the number zero; a whole activation may be zero by chance, and what is trained only at first."""
    return leaf.dim() == 0 and not (leaf.any() or call.varies(leaf)) if isinstance(leaf, Tensor) else leaf == 0


_WAYS: tuple[tuple[set[str], Callable[[Operation], Propagated]], ...] = (
    (_MOVES, _moved), (_CHOICES, _chosen), (_SCALINGS, _gated), (_CLIPS, _clipped),
    (_JOINS, _joined), (_REDUCTIONS, _reduced), (_PRODUCTS, _multiplied),
)  # fmt: skip
