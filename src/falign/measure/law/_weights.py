"""Weights as the law sees them: a matrix with its rows, one a neuron, whether a layer owns it or a fused parameter.

The weight of an ``nn.Linear`` is a matrix with rows; so are the three thirds of the ``in_proj_weight`` of an
``nn.MultiheadAttention``, whose rows are the queries, keys and values. ``Rows`` are some rows of a parameter,
``LinearMap`` is the rows of a weight with the biases beside them, and ``Neurons`` are all maps whose sum is what the
neurons are given.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from falign.layers import LINEAR, Kind, kind_of

# Sums of products over the weights into and out of each neuron, in float64: the terms of C.

_PIECE = 1 << 16
"""Elements at a time: their float64 products stay in the processor's cache."""

_SUMS: ContextVar[dict[Hashable, Tensor] | None] = ContextVar("sums", default=None)
"""Sums made so far within ``sums_cached``; None outside."""


@contextmanager
def sums_cached() -> Iterator[None]:
    """Let ``cached`` reuse sums: within it no weight and no gradient may change.

    A layer of a residual network is fed by every layer before it: its sums are made once and not for each of them.
    """
    token = _SUMS.set({}) if _SUMS.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _SUMS.reset(token)


def cached(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Call ``make``, or within ``sums_cached`` return what it gave for that key before; do not write to the result."""
    sums = _SUMS.get()
    if sums is None:
        return make()
    if key not in sums:
        sums[key] = make()
    return sums[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Some rows of a parameter, one a neuron: a weight (out, in), or a vector of one number a neuron.

    Attributes:
        parameter: The whole parameter.
        text: Its term of C.
        what: The word for it in a sentence: "weight" or "bias".
        rows: Of the parameter.
        layer: The module whose kind says how a weight is arranged; None for a matrix (out, in).
        vector: Whether it is one number a neuron: a bias, or the scale of a normalisation.
    """

    parameter: Tensor
    text: str
    what: str = "weight"
    rows: slice = field(default_factory=lambda: slice(None))
    layer: nn.Module | None = None
    vector: bool = False

    @property
    def count(self) -> int:
        """Number of rows."""
        return len((self.parameter.flatten() if self.vector else self.parameter)[self.rows])

    def incoming(self, one: Tensor, other: Tensor) -> Float[Tensor, " out"]:
        """``Σ_j one[k, j] · other[k, j]`` over the weights into each neuron k; of a vector the products themselves.

        Args:
            one: Of the parameter's shape.
            other: Of the same.
        """
        if self.vector:
            return (one.detach().double() * other.detach().double()).flatten()[self.rows]
        return torch.cat([self._kind.incoming(piece, self.layer) for piece in self._products(one, other)])

    def outgoing(self, one: Tensor, other: Tensor) -> Float[Tensor, " in"]:
        """``Σ_i one[i, k] · other[i, k]`` over the weights out of each input k; of a vector the products."""
        if self.vector:
            return self.incoming(one, other)
        first, *rest = (self._kind.outgoing(piece, self.layer) for piece in self._products(one, other))
        for more in rest:
            first += more
        return first

    def spread_out(self, values: Float[Tensor, " out"]) -> Tensor:
        """Give every weight into a neuron the neuron's value: the transpose of the sum over them. Others get 1."""
        factors = torch.ones_like(self.parameter, dtype=values.dtype)
        if self.vector:
            factors.view(-1)[self.rows] = values
            return factors
        place = torch.zeros_like(self.parameter[self.rows], dtype=values.dtype).requires_grad_()
        with torch.enable_grad():
            (spread,) = torch.autograd.grad(self._kind.incoming(place, self.layer), place, values)
        factors[self.rows] = spread
        return factors

    @cached_property
    def _kind(self) -> Kind:
        kind = None if self.layer is None else kind_of(self.layer)
        return LINEAR if kind is None else kind

    def _products(self, one: Tensor, other: Tensor) -> Iterator[Tensor]:
        return _pieces(self._kind is LINEAR, one[self.rows], other[self.rows])


def _pieces(by_rows: bool, one: Tensor, other: Tensor) -> Iterator[Tensor]:
    """Multiply some rows of a linear map at a time; a convolution's ``incoming`` and ``outgoing`` want it whole."""
    rows = max(1, _PIECE // max(1, one.shape[1:].numel())) if by_rows else len(one)
    for some, same in zip(one.detach().split(rows), other.detach().split(rows), strict=True):
        yield some.double() * same.double()


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearMap:
    """A linear map: the rows of a weight, and the biases that are added to what it gives.

    Attributes:
        name: A layer's name; of a fused parameter its name and which of its rows: "attention.in_proj_weight[q]".
        keys: Names by which its feedback is known where it is not a layer's: of the whole parameter, and of what runs
            its product under a direct rule.
        through_time: Whether it takes neurons to themselves one step later.
        weight: The rows of the weight.
        biases: Of one number a row each.
    """

    name: str
    keys: tuple[str, ...]
    weight: Rows
    biases: tuple[Rows, ...] = ()
    through_time: bool = False


def map_of_layer(name: str, layer: nn.Module) -> LinearMap:
    """Make the map of a linear layer, a convolution or a batch normalisation that has a weight of its own."""
    parameters, normalisation = layer._parameters, kind_of(layer) is None
    weight = parameters["weight"]
    assert weight is not None
    bias = parameters.get("bias")
    texts = ("½γ²", "½β²") if normalisation else ("½|w|²", "½b²")
    biases = () if bias is None else (Rows(parameter=bias, text=texts[1], what="bias", vector=True),)
    rows = Rows(parameter=weight, text=texts[0], layer=layer, vector=normalisation)
    return LinearMap(name=name, keys=(f"{name}.weight" if name else "weight",), weight=rows, biases=biases)


@dataclass(frozen=True, kw_only=True, eq=False)
class Neurons:
    """Neurons and all the weights into them.

    Attributes:
        name: The source in the law.
        maps: What is added to give the neurons their input; the rates of all are relative to the first one's weight.
        groups: The group of every row, -1 for none, where the law is of groups of neurons (heads); None where every
            neuron is its own.
        count: Number of neurons, or of groups.
    """

    name: str
    maps: tuple[LinearMap, ...]
    count: int
    groups: Int64[Tensor, " rows"] | None = None

    @cached_property
    def parts(self) -> tuple[Rows, ...]:
        """The rows of all weights, then of all biases."""
        return (*(one.weight for one in self.maps), *(bias for one in self.maps for bias in one.biases))

    def sums(self, part: Rows, one: Tensor, other: Tensor) -> Float[Tensor, " neurons"]:
        """``Σ one · other`` over the weights of a part into each neuron."""
        return self.grouped(part.incoming(one, other))

    def grouped(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " neurons"]:
        """Sum the rows' values over each group."""
        return values if self.groups is None else summed(values, self.groups, self.count)


def summed(values: Tensor, places: Tensor, count: int) -> Float[Tensor, " count"]:
    """Add every value at its place; -1 is none."""
    places = places.to(values.device)
    used = places >= 0
    return values.new_zeros(count).index_add(0, places[used], values[used])
