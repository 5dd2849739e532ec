"""Kinds of layers, and the way in which an error crosses each: one table, one entry a kind.

A layer kind maps its input linearly (bias aside) with a weight ``W``. Carrying an error from its output to its
input is that linear map, transposed, taken with the feedback ``B`` in place of ``W``. With ``B = W`` it is what
backpropagation computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = [
    "CONVOLUTION",
    "KINDS",
    "LINEAR",
    "LOOKUPS",
    "ConvSpec",
    "Kind",
    "Layer",
    "features_out",
    "kind_of",
    "layer_types",
    "replaced_method",
    "weight_of",
]

# The convolution, of every dimension, plain or transposed, with every way of padding.

_Pads = tuple[tuple[int, int], ...]


class ConvSpec(NamedTuple):
    """Options of a convolution, read off the layer at each forward."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    groups: int
    pads: _Pads
    mode: str


def _conv_spec(layer: Any) -> ConvSpec:
    """Split the layer's padding into what the convolution does itself and what is padded before it."""
    dims = len(layer.kernel_size)
    pads: _Pads = ((0, 0),) * dims
    padding = layer.padding
    if isinstance(padding, str):
        totals = [
            d * (k - 1) if padding == "same" else 0 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = tuple((p, p) for p in padding)
    symmetric = all(low == high for low, high in sides)
    if layer.padding_mode == "zeros" and symmetric:
        padding = tuple(low for low, _ in sides)
    else:
        padding, pads = (0,) * dims, sides
    return ConvSpec(layer.stride, padding, layer.dilation, layer.transposed, layer.groups, pads, layer.padding_mode)


def _padding_source(size: int, low: int, high: int, mode: str, device: torch.device) -> Tensor:
    """Give, for each padded position, the input position that it copies; ``size`` where it copies none (zeros)."""
    position = torch.arange(-low, size + high, device=device)
    if mode == "circular":
        return position % size
    if mode == "replicate":
        return position.clamp(0, size - 1)
    if mode == "reflect":
        return (size - 1) - (size - 1 - position.abs()).abs()
    raise AssertionError(mode)


def _pad(x: Tensor, how: ConvSpec) -> Tensor:
    """Pad the position axes of x as the layer does before it convolves."""
    for axis, (low, high) in zip(range(x.dim() - len(how.pads), x.dim()), how.pads, strict=True):
        if low == high == 0:
            continue
        if how.mode == "zeros":
            x = nn.functional.pad(x, [0, 0] * (x.dim() - 1 - axis) + [low, high])
        else:
            x = x.index_select(axis, _padding_source(x.shape[axis], low, high, how.mode, x.device))
    return x


def _unpad(error: Tensor, sizes: tuple[int, ...], how: ConvSpec) -> Tensor:
    """Transpose of ``_pad``: add what each padded position received to the position that it copied."""
    first = error.dim() - len(how.pads)
    for axis, (low, high), size in zip(range(first, error.dim()), how.pads, sizes, strict=True):
        if low == high == 0:
            continue
        if how.mode == "zeros":
            error = error.narrow(axis, low, size)
        else:
            source = _padding_source(size, low, high, how.mode, error.device)
            shape = list(error.shape)
            shape[axis] = size
            error = error.new_zeros(shape).index_add(axis, source, error)
    return error


def _backward(error: Tensor, feedback: Tensor, x: Tensor, how: ConvSpec, which: int) -> Tensor:
    """Input gradient (which=0) or weight gradient (which=1) of the convolution, with B for its weight."""
    dims = len(how.stride)
    unbatched = x.dim() == dims + 1
    if unbatched:
        error, x = error.unsqueeze(0), x.unsqueeze(0)
    x = x.to(error.dtype)  # under autocast the error may be of a shorter type
    padded = any(low or high for low, high in how.pads)
    x_padded = _pad(x, how) if padded else x
    output_padding = (0,) * dims
    if how.transposed:  # read off the error: output_size may have been given to the layer's call
        output_padding = tuple(
            out - ((size - 1) * s - 2 * p + d * (k - 1) + 1)
            for out, size, s, p, d, k in zip(
                error.shape[2:], x.shape[2:], how.stride, how.padding, how.dilation, feedback.shape[2:], strict=True
            )
        )
    result = torch.ops.aten.convolution_backward(
        error, x_padded, feedback, None, how.stride, how.padding, how.dilation,
        how.transposed, output_padding, how.groups, (which == 0, which == 1, False),
    )[which]  # fmt: skip
    if which == 0:
        if padded:
            result = _unpad(result, tuple(x.shape[2:]), how)
        if unbatched:
            result = result.squeeze(0)
    return result


def _conv_error(
    error: Float[Tensor, "..."], feedback: Float[Tensor, "..."], x: Float[Tensor, "..."], how: ConvSpec
) -> Float[Tensor, "..."]:
    """Compute the gradient with respect to the input, of x's shape, with B for the weight."""
    return _backward(error, feedback, x, how, 0)


def _conv_gradient(
    error: Float[Tensor, "..."], feedback: Float[Tensor, "..."], x: Float[Tensor, "..."], how: ConvSpec
) -> Float[Tensor, "..."]:
    """Compute the gradient with respect to the weight."""
    return _backward(error, feedback, x, how, 1)


def _conv_fan_in(layer: Any) -> float:
    """Count the inputs to which an element of the error is carried (on average, where a transposed one strides)."""
    if layer.transposed:
        return layer.in_channels / layer.groups * prod(layer.kernel_size) / prod(layer.stride)
    return layer.in_channels / layer.groups * prod(layer.kernel_size)


def _conv_incoming(product: Float[Tensor, "..."], layer: Any) -> Float[Tensor, " out"]:
    """Sum over the weights into each output channel, of a tensor of the weight's shape."""
    if not layer.transposed:  # (out, in / groups, ...)
        return product.flatten(1).sum(1)
    return product.reshape(layer.groups, -1, *product.shape[1:]).flatten(3).sum((1, 3)).flatten()


def _conv_outgoing(product: Float[Tensor, "..."], layer: Any) -> Float[Tensor, " in"]:
    """Sum over the weights out of each input channel, of a tensor of the weight's shape."""
    if layer.transposed:  # (in, out / groups, ...)
        return product.flatten(1).sum(1)
    return product.reshape(layer.groups, -1, *product.shape[1:]).flatten(3).sum((1, 3)).flatten()


#: A layer of one of the kinds; its attributes are PyTorch's own and checked by ``kind_of``, not by its type.
Layer = Any


def _linear_spec(layer: Layer) -> None:
    return None


def _linear_error(
    error: Float[Tensor, "*batch out"], feedback: Float[Tensor, "out in"], x: Tensor, spec: None
) -> Float[Tensor, "*batch in"]:
    """``error @ B``."""
    return error @ feedback


def _linear_gradient(
    error: Float[Tensor, "*batch out"], feedback: Float[Tensor, "out in"], x: Float[Tensor, "*batch in"], spec: None
) -> Float[Tensor, "out in"]:
    """``errorᵀ @ x``, summed over every leading axis."""
    if error.is_nested:  # jagged sequences, one behind the other
        error, x = error.values(), x.values()
    count = error.shape[:-1].numel()  # not -1, which says nothing of a layer without inputs or outputs
    return error.reshape(count, error.shape[-1]).mT @ x.reshape(count, x.shape[-1]).to(error.dtype)


def _linear_fan_in(layer: Layer) -> float:
    return float(layer.in_features)


def _linear_incoming(product: Float[Tensor, "out in"], layer: Layer) -> Float[Tensor, " out"]:
    return product.sum(1)


def _linear_outgoing(product: Float[Tensor, "out in"], layer: Layer) -> Float[Tensor, " in"]:
    return product.sum(0)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of layer: its map as autograd has it, transposed and differentiated.

    Attributes:
        name: the key in ``KINDS``.
        types: the module classes; a subclass counts as long as it keeps the class's forward.
        spec: layer -> what the two maps below need beside their tensors (a constant for ``torch.compile``).
        error: (error at the output, B, x, spec) -> error at the input, of x's shape.
        gradient: (error at the output, B, x, spec) -> gradient of B's shape, as if B were the weight.
        fan_in: layer -> the number of inputs to which one element of the error is carried; a feedback of entries with
            variance scale² / fan_in keeps the error's squared norm, up to scale², on average.
        incoming: (tensor of the weight's shape, layer) -> its sum over the weights into each neuron (channel) of the
            output: ``Σ_j T[k, j]``.
        outgoing: (tensor of the weight's shape, layer) -> its sum over the weights out of each neuron (channel) of
            the input: ``Σ_i T[i, k]``.
        needs_input: whether ``error`` reads x (its shape and memory format); else anything may stand for it.
        channel_first: whether the feature axis is axis 1 (convolutions) and not the last.
    """

    name: str
    types: tuple[type[nn.Module], ...]
    spec: Callable[[Layer], Any]
    error: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    fan_in: Callable[[Layer], float]
    incoming: Callable[[Tensor, Layer], Tensor]
    outgoing: Callable[[Tensor, Layer], Tensor]
    needs_input: bool
    channel_first: bool

    def feature_axis(self, spec: Any) -> int:
        """Give the axis of the features of an output, counted from the last."""
        return -1 - len(spec.stride) if self.channel_first else -1


LINEAR = Kind(
    name="linear",
    types=(nn.Linear,),
    spec=_linear_spec,
    error=_linear_error,
    gradient=_linear_gradient,
    fan_in=_linear_fan_in,
    incoming=_linear_incoming,
    outgoing=_linear_outgoing,
    needs_input=False,
    channel_first=False,
)
CONVOLUTION = Kind(
    name="convolution",
    types=(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    spec=_conv_spec,
    error=_conv_error,
    gradient=_conv_gradient,
    fan_in=_conv_fan_in,
    incoming=_conv_incoming,
    outgoing=_conv_outgoing,
    needs_input=True,
    channel_first=True,
)
#: By name. A kind from outside the package is put here before ``convert`` meets a layer of it.
KINDS = {kind.name: kind for kind in (LINEAR, CONVOLUTION)}

#: Layers that look their input up: it is an index, no error returns through it, and nothing has to be cut.
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


#: Methods that make the map of a layer: where one is replaced, in the class or on the instance, it is another map.
_MAPS = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl")


def layer_types() -> tuple[type[nn.Module], ...]:
    """List the module classes of all kinds, those that were put into ``KINDS`` meanwhile among them."""
    return tuple(base for kind in KINDS.values() for base in kind.types)


def kind_of(layer: nn.Module) -> Kind | None:
    """Give the kind of a layer that can take feedback, or None.

    A layer with a forward of its own, by subclass or on the instance, is not the linear map that the table transposes.
    """
    for kind in KINDS.values():
        if isinstance(layer, kind.types) and replaced_method(layer) is None:
            return kind
    return None


def replaced_method(layer: nn.Module) -> str | None:
    """Name the method of a layer of a known kind that is not its class's own: another map; None where there is none."""
    for kind in KINDS.values():
        for base in kind.types:
            if isinstance(layer, base):
                return next((name for name in _MAPS if _replaced(layer, base, name)), None)
    return None


def _replaced(layer: nn.Module, base: type[nn.Module], name: str) -> bool:
    return name in layer.__dict__ or getattr(type(layer), name, None) is not getattr(base, name, None)


def features_out(layer: Layer) -> int:
    """Count the features (channels) of a layer's output."""
    return int(getattr(layer, "out_channels" if isinstance(layer, CONVOLUTION.types) else "out_features"))


def weight_of(layer: Layer) -> Tensor:
    """Read the weight in evaluation mode: in training a parametrization may change its state when it is read."""
    modes = [(module, module.training) for module in layer.modules()]
    try:
        return layer.eval().weight.detach()
    finally:
        for module, training in modes:
            module.training = training
