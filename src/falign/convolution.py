"""How an error crosses a convolution, of every dimension, plain or transposed, with every way of padding."""

from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Pads = tuple[tuple[int, int], ...]


class ConvSpec(NamedTuple):
    """What a convolution needs beside its tensors, read off the layer at each forward."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    groups: int
    pads: Pads
    mode: str


def spec(layer: Any) -> ConvSpec:
    """Split the layer's padding into what the convolution does itself and what is padded before it."""
    dims = len(layer.kernel_size)
    pads: Pads = ((0, 0),) * dims
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
    """Which input position each padded position copies (``size`` where it copies none: zeros)."""
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
    x = x.to(error.dtype)
    padded = any(low or high for low, high in how.pads)
    x_padded = _pad(x, how) if padded else x
    output_padding = (0,) * dims
    if how.transposed:
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


def input_error(
    error: Float[Tensor, "..."], feedback: Float[Tensor, "..."], x: Float[Tensor, "..."], how: ConvSpec
) -> Float[Tensor, "..."]:
    """The gradient with respect to the input, of x's shape, with B for the weight."""
    return _backward(error, feedback, x, how, 0)


def weight_gradient(
    error: Float[Tensor, "..."], feedback: Float[Tensor, "..."], x: Float[Tensor, "..."], how: ConvSpec
) -> Float[Tensor, "..."]:
    """The gradient with respect to the weight."""
    return _backward(error, feedback, x, how, 1)


def spread(layer: Any) -> float:
    """To how many inputs an element of the error is carried (on average, where a transposed one strides)."""
    if layer.transposed:
        return layer.in_channels / layer.groups * prod(layer.kernel_size) / prod(layer.stride)
    return layer.in_channels / layer.groups * prod(layer.kernel_size)


def incoming(product: Float[Tensor, "..."], layer: Any) -> Float[Tensor, " out"]:
    """Sum over the weights into each output channel, of a tensor of the weight's shape."""
    if not layer.transposed:  # (out, in / groups, ...)
        return product.flatten(1).sum(1)
    return product.reshape(layer.groups, -1, *product.shape[1:]).flatten(3).sum((1, 3)).flatten()


def outgoing(product: Float[Tensor, "..."], layer: Any) -> Float[Tensor, " in"]:
    """Sum over the weights out of each input channel, of a tensor of the weight's shape."""
    if layer.transposed:  # (in, out / groups, ...)
        return product.flatten(1).sum(1)
    return product.reshape(layer.groups, -1, *product.shape[1:]).flatten(3).sum((1, 3)).flatten()
