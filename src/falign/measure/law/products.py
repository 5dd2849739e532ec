"""Sums of products over the weights into and out of each neuron, in float64."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.layers import LINEAR, kind_of

_PIECE = 1 << 16
"""Elements at a time: their products stay in the cache."""
_MADE: ContextVar[dict[Hashable, Tensor] | None] = ContextVar("made", default=None)


@contextmanager
def looking() -> Iterator[None]:
    """Within, no weight and no gradient changes, so that ``once`` can give what it gave before.

    A layer of a residual network is fed by every layer before it: its sums are made once and not for each of them.
    """
    token = _MADE.set({}) if _MADE.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _MADE.reset(token)


def once(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` gives, made once for each key within ``looking``; not to be written to."""
    made = _MADE.get()
    if made is None:
        return make()
    if key not in made:
        made[key] = make()
    return made[key]


def into(layer: nn.Module, one: Tensor, other: Tensor) -> Float[Tensor, " out"]:
    """``Σ_j one[k, j] · other[k, j]``; vectors are a number a neuron already.

    Args:
        layer: The layer.
        one: Of its weight's shape, or of its bias's.
        other: Of the same.
    """
    kind = kind_of(layer)
    if kind is None or one.dim() == 1:
        return one.detach().double() * other.detach().double()
    return torch.cat([kind.incoming(piece, layer) for piece in _pieces(layer, one, other)])


def out_of(layer: nn.Module, one: Tensor, other: Tensor) -> Float[Tensor, " in"]:
    """``Σ_i one[i, k] · other[i, k]``; vectors are a number a channel already."""
    kind = kind_of(layer)
    if kind is None:
        return one.detach().double() * other.detach().double()
    first, *rest = (kind.outgoing(piece, layer) for piece in _pieces(layer, one, other))
    for more in rest:
        first += more
    return first


def _pieces(layer: nn.Module, one: Tensor, other: Tensor) -> Iterator[Tensor]:
    """The products of some rows of a linear map at a time; a convolution's channels belong together."""
    rows = max(1, _PIECE // max(1, one.shape[1:].numel())) if kind_of(layer) is LINEAR else len(one)
    for some, same in zip(one.detach().split(rows), other.detach().split(rows), strict=True):
        yield some.double() * same.double()
