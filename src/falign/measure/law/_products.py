"""Products of two activations, such as queries with keys: which neurons of one layer are multiplied with which others.

A product summed over features is linear in both factors, so that ``Σ error × value`` of a neuron is that of the neurons
it is multiplied with: ``Σ δq q = Σ δs s = Σ δk k`` for a score ``s = Σ_k q_k k_k``, in every batch and by whatever way
the error has come. From scores on, all neurons of a head are followed as one group, for they are homogeneous together.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from falign.measure.law._propagate import OTHER, ZERO, common_label


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """The neurons of one layer that are multiplied with those of another.

    Attributes:
        source: Name of the layer whose neurons are the first factor.
        partner: Name of the other layer.
        pairs: (neuron, or group, of the source; neuron of the partner), each pair once.
        groups: The group (head) of each neuron of the source, -1 for none, where the factor is a score and not the
            neurons themselves; else None.
        alone: Whether these neurons of the source do nothing else, as those of the partner.
    """

    source: str
    partner: str
    pairs: Int64[Tensor, "pairs 2"]
    groups: Int64[Tensor, " neurons"] | None = None
    alone: bool = True


class Factors(NamedTuple):
    """Two operands of a product that is summed over an axis of each.

    Attributes:
        first: The first operand.
        second: The second operand.
        axes: The axis of each that is summed over.
        scores: Whether the result is the product; attention in one operation gives something else.
    """

    first: Any
    second: Any
    axes: tuple[int, int]
    scores: bool


_PRODUCTS = {"mm": 0, "bmm": 0, "baddbmm": 1, "addmm": 1}
"""Matrix products, by the place of their first factor."""


def factors(name: str, args: tuple) -> Factors | None:
    """Find the two factors of an operation; None of one that is no product of matrices."""
    if name in _PRODUCTS:
        first = _PRODUCTS[name]
        return Factors(args[first], args[first + 1], (-1, -2), True)
    if name.startswith("_scaled_dot_product"):
        return Factors(args[0], args[1], (-1, -1), False)
    return None


def summed_labels(labels: Tensor, axis: int) -> Tensor | None:
    """Labels along the axis that is summed over (..., features); None if the other axis of the matrix has several."""
    common, same = common_label(labels, [-3 - axis], False)
    return common if same else None


def paired(first: Tensor, second: Tensor) -> Tensor | None:
    """Find the pairs (neuron, neuron) that two factors sum over; None if a neuron of one meets none of the other.

    Args:
        first: Labels of the first factor (..., features).
        second: Of the second; heads of keys that several heads of queries share are fewer.
    """
    if first.dim() > 1 and first.shape[-2] != second.shape[-2] and first.shape[-2] % max(1, second.shape[-2]) == 0:
        second = second.repeat_interleave(first.shape[-2] // second.shape[-2], -2)
    if first.shape != second.shape:
        return None
    pairs = torch.stack([first.flatten(), second.flatten()], 1).unique(dim=0)
    pairs = pairs[(pairs != ZERO).all(1)]
    whole = (pairs != OTHER).all(1)
    alone = (pairs == OTHER).any(1) & (pairs != OTHER).any(1)
    return pairs[whole] if bool(whole.any()) and not bool(alone.any()) else None


def grouped(features: Tensor, neurons: int) -> tuple[Tensor, Tensor] | None:
    """Number the sets of neurons that are summed to one score: (group of every neuron, group of every score's matrix).

    Args:
        features: Labels (..., features) along the axis that is summed over.
        neurons: Number of the source's neurons.

    Returns:
        None if a neuron is in two sets that differ, or some set has none.
    """
    rows = features.flatten(0, -2) if features.dim() > 1 else features[None]
    rows = rows.sort(1).values
    kinds, numbers = rows.unique(dim=0, return_inverse=True)
    groups = torch.full((neurons,), -1, device=features.device)
    for number, kind in enumerate(kinds):
        members = kind[kind >= 0].unique()
        if not len(members) or bool((groups[members] >= 0).any()):
            return None
        groups[members] = number
    return groups, numbers.view(features.shape[:-1])


def components(pairs: Tensor, neurons: int, partners: int) -> tuple[Tensor, Tensor, int]:
    """Number the sets of neurons that are multiplied with each other: one pair each, or a head of keys of many queries.

    Args:
        pairs: (neuron, neuron of the partner).
        neurons: Number of the source's neurons.
        partners: Number of the partner's.

    Returns:
        (set of each neuron, set of each of the partner's, -1 for none, number of sets).
    """
    sets = torch.arange(neurons + partners)
    one, other = pairs[:, 0].cpu(), pairs[:, 1].cpu() + neurons
    while True:  # the least index reachable over pairs, a pair further each time
        least = torch.minimum(sets[one], sets[other])
        spread = sets.scatter_reduce(0, one, least, "amin").scatter_reduce(0, other, least, "amin")
        if torch.equal(spread, sets):
            break
        sets = spread
    used = torch.zeros(len(sets), dtype=torch.bool)
    used[one] = used[other] = True
    _, numbers = sets[used].unique(return_inverse=True)
    result = torch.full_like(sets, -1)
    result[used] = numbers
    return result[:neurons], result[neurons:], int(numbers.max()) + 1
