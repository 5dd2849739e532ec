"""Positions that an output and a cut input share, found by the sizes that their axes have in several runs."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from falign._delivery import Route

Shape = tuple[int, ...]

_NAMES = "ntsuvwxyabdefghijlmop"


def features(x: Shape, route: Route) -> int:
    """Count the features of an input."""
    if not route.x:
        return x[-1]
    place = route.x.index("c")
    return torch.Size(x[place:] if place == len(route.x) - 1 else x[place : place + 1]).numel()


def find_route(
    outputs: list[Shape],
    inputs: list[Shape],
    calls: list[int],
    *,
    channels_first: bool,
    output_channels_first: bool,
    doubled: bool,
    each: bool,
) -> tuple[tuple[int, int], Route] | None:
    """Find which positions an output and a cut input share, from the sizes of their axes in several runs.

    Two axes are the same positions where they have the same sizes in all runs; where no run changes them, if they have
    the same size at the same place.

    Args:
        outputs: shapes of the output, one a run; the first is that on the example.
        inputs: shapes of the input in its first call.
        calls: number of calls.
        channels_first: whether the input's features are axis 1.
        output_channels_first: whether those of the output are.
        doubled: whether the second run has every sample twice.
        each: whether positions that are not shared get the same error each, or all of them one vector.

    Returns:
        (shape of B, route), or None where the samples of one are not those of the other.
    """
    out, x = outputs[0], inputs[0]
    if not out or not x:
        return None
    whole = (torch.Size(out[1:]).numel(), torch.Size(x[1:]).numel()), Route(("n", "k"), ("n", "c"))
    if len(x) == len(out) == 1:
        return (out[0], x[0]), Route(("k",), ("c",))
    out_signs, x_signs = list(zip(*outputs, strict=True)), list(zip(*inputs, strict=True))
    features = _feature_axis(out_signs, output_channels_first)
    steps = _steps(out_signs, tuple(calls), features, fewer=len(x) < len(out))
    if (channels_first or output_channels_first) and steps is None and x[0] == out[0]:
        if channels_first and len(x) == len(out) > 2 and x[2:] == out[2:]:
            space = tuple(_NAMES[1 : len(x) - 1])
            return (out[1], x[1]), Route(("n", "k", *space), ("n", "c", *space))
        return whole
    at_x = [0] if channels_first else list(range(max(len(x) - 1, 1)))
    at_out = [axis for axis in range(len(out)) if axis != features]
    names = iter(_NAMES)
    out_letters: dict[int, str] = {} if steps is None or steps < 0 else {steps: "q"}
    x_letters: dict[int, str] = {}
    for axis in at_x:
        same = [other for other in at_out if other not in out_letters and out_signs[other] == x_signs[axis]]
        if _still(x_signs[axis]):
            same = [other for other in same if other == axis]
        if same:
            x_letters[axis] = out_letters[axis if axis in same else same[0]] = next(names)
    matched = bool(x_letters)
    _unfold(x_letters, at_x, x_signs, out_letters, at_out, out_signs, names)
    _unfold(out_letters, at_out, out_signs, x_letters, at_x, x_signs, names)
    if doubled and 0 in at_out and 0 not in out_letters and out_signs[0][1] == 2 * out[0]:
        _find_samples(x_letters, at_x, x_signs, out_letters, out_signs[0], names)
    matched = matched or bool(x_letters)
    own, rest = [a for a in at_x if a not in x_letters], [a for a in at_out if a not in out_letters]
    if doubled and out_signs[0][:2] == (out[0], 2 * out[0]):
        # Axes that grow with the samples, and yet never without the output, are samples that cannot be told.
        if any(x_signs[a][1] != x[a] and not _alone(x_signs[a], out_signs) for a in own):
            return None
    elif not matched:
        return None
    if not each and steps is None and (own or rest) and x[0] == out[0]:
        return whole
    rows = 1 if features is None else out[features]
    columns = torch.Size(x[1:]).numel() if channels_first or len(x) == 1 else x[-1]
    shared = [x_letters.get(axis) for axis in at_x]
    leading = rest and not own and steps is None and shared == [out_letters.get(axis) for axis in range(len(at_x))]
    if leading and all(_still(out_signs[axis]) for axis in rest):  # a fixed number of outputs, of several axes
        rows = torch.Size(out[len(at_x) :]).numel()
        return (rows, columns), Route((*(out_letters[a] for a in at_x), "k"), (*(x_letters[a] for a in at_x), "c"))
    out_letters |= {axis: next(names) for axis in rest}
    x_letters |= {axis: next(names) for axis in own}
    letters = [out_letters.get(axis, "k") for axis in range(len(out))]
    letters = [*letters, "k"] if features is None else letters
    return (rows, columns), Route(tuple(letters), (*(x_letters[a] for a in at_x), "c"), steps == -1)


def _still(sizes: Shape) -> bool:
    """Tell whether no run changes an axis."""
    return len({*sizes}) == 1


def _alone(sizes: Shape, outputs: list[Shape]) -> bool:
    """Tell whether some run changes an axis of the input and none of the output."""
    return any(size != sizes[0] and all(out[run] == out[0] for out in outputs) for run, size in enumerate(sizes))


def _steps(outputs: list[Shape], calls: Shape, features: int | None, *, fewer: bool) -> int | None:
    """Give the axis of the output whose positions are the calls; -1: they are positions that it lacks; None: none."""
    if max(calls) == 1:
        return None
    same = [axis for axis, sizes in enumerate(outputs) if sizes == calls and axis != features]
    if _still(calls):
        same = [axis for axis in same if axis > 0]
        return same[0] if same and fewer else None  # an input with as many axes as the output has its positions
    return next((axis for axis in same if axis > 0), same[0] if same else -1)


def _feature_axis(signs: list[Shape], channels_first: bool) -> int | None:
    """Find the axis of the output's features; None if it has none (one output a sample)."""
    if len(signs) == 1:
        return None
    if channels_first and len(signs) > 2:
        return 1
    still = [axis for axis in range(1, len(signs)) if _still(signs[axis])]
    return len(signs) - 1 if len(signs) - 1 in still or not still else still[-1]


def _unfold(
    letters: dict[int, str],
    axes: list[int],
    signs: list[Shape],
    others: dict[int, str],
    other_axes: list[int],
    other_signs: list[Shape],
    names: Iterator[str],
) -> None:
    """Give letters to axes that are several of the other's in one: (samples x positions), (samples x windows)."""
    for axis in axes:
        if axis in letters or _still(signs[axis]):
            continue
        free = [other for other in other_axes if other not in others and not _still(other_signs[other])]
        for count in range(len(free), 0, -1):
            chosen = free[:count]
            products = [torch.Size(sizes).numel() for sizes in zip(*(other_signs[a] for a in chosen), strict=True)]
            factors = {size / max(product, 1) for size, product in zip(signs[axis], products, strict=True)}
            factor = factors.pop() if len(factors) == 1 else 0
            if factor < 1 or factor != int(factor) or (count == 1 and factor == 1):
                continue
            for other in chosen:
                others[other] = next(names)
            letters[axis] = "".join(others[other] for other in chosen) + (next(names) if factor > 1 else "")
            break


def _find_samples(
    letters: dict[int, str],
    axes: list[int],
    signs: list[Shape],
    others: dict[int, str],
    samples: Shape,
    names: Iterator[str],
) -> None:
    """Give letters to the axis that doubles with the samples: (samples x windows), of any number of windows."""
    for axis in axes:
        sizes = signs[axis]
        whole = all(size % count == 0 for size, count in zip(sizes, samples, strict=True) if count)
        if axis not in letters and sizes[1] == 2 * sizes[0] and whole:
            others[0] = next(names)
            letters[axis] = others[0] + next(names)
            return


# Examples of other sizes, for the runs that show which axes grow together.


def batch_axes(example: Any) -> frozenset[tuple[int, int]]:
    """Give (number of the tensor, 0) of all that have the size of the batch as their first axis."""
    leaves = [leaf for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor)]
    sizes = Counter(leaf.shape[0] for leaf in leaves if leaf.dim() > 0)
    if not sizes:
        return frozenset()
    ((batch, _),) = sizes.most_common(1)  # a mask may have no batch axis
    return frozenset((number, 0) for number, leaf in enumerate(leaves) if leaf.shape[:1] == (batch,))


def axes_to_change(example: Any) -> Iterator[list[frozenset[tuple[int, int]]]]:
    """List, for every axis of every tensor, what to lengthen with it: nothing, masks of its size, all of its size."""
    leaves = [leaf for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor)]
    batch = batch_axes(example)
    for number, leaf in enumerate(leaves[:8]):
        features = 1 if leaf.is_floating_point() and leaf.dim() == 2 else 0
        for axis in range(leaf.dim() - features):
            size = leaf.shape[axis]
            others = [
                (at, each)
                for at, other in enumerate(leaves)
                for each, length in enumerate(other.shape)
                if length == size and (at, each) not in batch
            ]
            masks = [
                (at, each) for at, each in others if leaves[at].dtype == torch.bool or len({*leaves[at].shape}) == 1
            ]
            single = (number, axis)
            yield [frozenset((single,)), frozenset((single, *masks)), frozenset((single, *others))]


def changed(example: Any, axes: frozenset[tuple[int, int]], by: int | None) -> Any:
    """Change an example: twice as long along axes of its tensors, one longer (None), or one shorter (-1)."""
    leaves, spec = tree_flatten(example)
    tensors = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    leaves = list(leaves)
    for number, axis in sorted(axes):
        leaf = leaves[tensors[number]]
        if by == -1:
            leaf = leaf.narrow(axis, 0, max(leaf.shape[axis] - 1, 1))
        else:
            more = leaf if by == 2 else leaf.narrow(axis, max(leaf.shape[axis] - 1, 0), min(1, leaf.shape[axis]))
            leaf = torch.cat([leaf, more], axis)
        leaves[tensors[number]] = leaf
    return tree_unflatten(leaves, spec)


def at_least_two(example: Any) -> Any:
    """Double an example of a single sample: what is broadcast over one would look like a batch."""
    axes = batch_axes(example)
    leaves = [leaf for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor)]
    return changed(example, axes, 2) if axes and all(leaves[at].shape[0] == 1 for at, _ in axes) else example
