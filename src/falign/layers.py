"""How an error crosses each kind of layer: one table, one entry a kind.

A layer kind maps its input linearly (bias aside) with a weight ``W``. Carrying an error from its output to its
input is that linear map, transposed, taken with the feedback ``B`` in place of ``W``. With ``B = W`` it is what
backpropagation computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
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


def _linear_spec(layer: nn.Module) -> None:
    return None


def _linear_error(error: Tensor, feedback: Tensor, x: Tensor | None, spec: None) -> Tensor:
    """``error @ B``; error (..., out), B (out, in), result (..., in)."""
    return error @ feedback


def _linear_gradient(error: Tensor, feedback: Tensor, x: Tensor, spec: None) -> Tensor:
    """``errorᵀ @ x`` summed over every leading axis; result (out, in)."""
    return error.reshape(-1, error.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).to(error.dtype)


def _conv_spec(layer: Any) -> ConvSpec:
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
    return ConvSpec(
        layer.stride, padding, layer.dilation, layer.transposed, layer.groups, pads, layer.padding_mode
    )


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


def _pad(x: Tensor, spec: ConvSpec) -> Tensor:
    """Pad the position axes of x as the layer does before it convolves."""
    for axis, (low, high) in zip(range(x.dim() - len(spec.pads), x.dim()), spec.pads, strict=True):
        if low == high == 0:
            continue
        if spec.mode == "zeros":
            x = nn.functional.pad(x, [0, 0] * (x.dim() - 1 - axis) + [low, high])
        else:
            x = x.index_select(axis, _padding_source(x.shape[axis], low, high, spec.mode, x.device))
    return x


def _unpad(error: Tensor, sizes: tuple[int, ...], spec: ConvSpec) -> Tensor:
    """Transpose of ``_pad``: add what each padded position received to the position that it copied."""
    first = error.dim() - len(spec.pads)
    for axis, (low, high), size in zip(range(first, error.dim()), spec.pads, sizes, strict=True):
        if low == high == 0:
            continue
        if spec.mode == "zeros":
            error = error.narrow(axis, low, size)
        else:
            source = _padding_source(size, low, high, spec.mode, error.device)
            shape = list(error.shape)
            shape[axis] = size
            error = error.new_zeros(shape).index_add(axis, source, error)
    return error


def _conv_backward(error: Tensor, feedback: Tensor, x: Tensor, spec: ConvSpec, which: int) -> Tensor:
    """Input gradient (which=0) or weight gradient (which=1) of the convolution, with B for its weight."""
    dims = len(spec.stride)
    unbatched = x.dim() == dims + 1
    if unbatched:
        error, x = error.unsqueeze(0), x.unsqueeze(0)
    x = x.to(error.dtype)
    padded = any(low or high for low, high in spec.pads)
    x_padded = _pad(x, spec) if padded else x
    output_padding = (0,) * dims
    if spec.transposed:
        output_padding = tuple(
            out - ((size - 1) * s - 2 * p + d * (k - 1) + 1)
            for out, size, s, p, d, k in zip(
                error.shape[2:], x.shape[2:], spec.stride, spec.padding, spec.dilation, feedback.shape[2:], strict=True
            )
        )
    result = torch.ops.aten.convolution_backward(
        error, x_padded, feedback, None, spec.stride, spec.padding, spec.dilation,
        spec.transposed, output_padding, spec.groups, (which == 0, which == 1, False),
    )[which]  # fmt: skip
    if which == 0:
        if padded:
            result = _unpad(result, tuple(x.shape[2:]), spec)
        if unbatched:
            result = result.squeeze(0)
    return result


def _conv_error(error: Tensor, feedback: Tensor, x: Tensor | None, spec: ConvSpec) -> Tensor:
    assert x is not None
    return _conv_backward(error, feedback, x, spec, 0)


def _conv_gradient(error: Tensor, feedback: Tensor, x: Tensor, spec: ConvSpec) -> Tensor:
    return _conv_backward(error, feedback, x, spec, 1)


def _linear_spread(layer: Any) -> float:
    return layer.in_features


def _conv_spread(layer: Any) -> float:
    if layer.transposed:
        return layer.in_channels / layer.groups * prod(layer.kernel_size) / prod(layer.stride)
    return layer.in_channels / layer.groups * prod(layer.kernel_size)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of layer.

    Attributes:
        name: the key in ``KINDS``.
        types: the module classes; a subclass counts as long as it keeps the class's forward.
        spec: layer -> what the two maps below need beside their tensors (a constant for ``torch.compile``).
        error: (error at the output, B, x or None, spec) -> error at the input, of x's shape.
        gradient: (error at the output, B, x, spec) -> gradient of B's shape, as if B were the weight.
        spread: layer -> to how many inputs one element of the error is carried; a feedback of entries with
            variance scale² / spread keeps the error's squared norm, up to scale², on average.
        needs_input: whether ``error`` reads x (its shape and memory format).
        channel_first: whether the feature axis is axis 1 (convolutions) and not the last.
    """

    name: str
    types: tuple[type[nn.Module], ...]
    spec: Callable[[nn.Module], Any]
    error: Callable[[Tensor, Tensor, Tensor | None, Any], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    spread: Callable[[nn.Module], float]
    needs_input: bool
    channel_first: bool


LINEAR = Kind(
    name="linear",
    types=(nn.Linear,),
    spec=_linear_spec,
    error=_linear_error,
    gradient=_linear_gradient,
    spread=_linear_spread,
    needs_input=False,
    channel_first=False,
)
CONVOLUTION = Kind(
    name="convolution",
    types=(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    spec=_conv_spec,
    error=_conv_error,
    gradient=_conv_gradient,
    spread=_conv_spread,
    needs_input=True,
    channel_first=True,
)
KINDS = {kind.name: kind for kind in (LINEAR, CONVOLUTION)}

#: Layers that look their input up: it is an index, no error returns through it, and nothing has to be cut.
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer that can take feedback, or None.

    A subclass with a forward of its own is no longer the linear map that the table transposes: None.
    """
    for kind in KINDS.values():
        for base in kind.types:
            if isinstance(layer, base) and type(layer).forward is base.forward:
                return kind
    return None
