"""How an error crosses each kind of layer: one table, one entry a kind.

A layer kind maps its input linearly (bias aside) with a weight ``W``. Carrying an error from its output to its
input is that linear map, transposed, taken with the feedback ``B`` in place of ``W``. With ``B = W`` it is what
backpropagation computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from falign import convolution

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


def _linear_spread(layer: Layer) -> float:
    return float(layer.in_features)


def _linear_incoming(product: Float[Tensor, "out in"], layer: Layer) -> Float[Tensor, " out"]:
    return product.sum(1)


def _linear_outgoing(product: Float[Tensor, "out in"], layer: Layer) -> Float[Tensor, " in"]:
    return product.sum(0)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of layer.

    Attributes:
        name: the key in ``KINDS``.
        types: the module classes; a subclass counts as long as it keeps the class's forward.
        spec: layer -> what the two maps below need beside their tensors (a constant for ``torch.compile``).
        error: (error at the output, B, x, spec) -> error at the input, of x's shape.
        gradient: (error at the output, B, x, spec) -> gradient of B's shape, as if B were the weight.
        spread: layer -> to how many inputs one element of the error is carried; a feedback of entries with
            variance scale² / spread keeps the error's squared norm, up to scale², on average.
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
    spread: Callable[[Layer], float]
    incoming: Callable[[Tensor, Layer], Tensor]
    outgoing: Callable[[Tensor, Layer], Tensor]
    needs_input: bool
    channel_first: bool


LINEAR = Kind(
    name="linear",
    types=(nn.Linear,),
    spec=_linear_spec,
    error=_linear_error,
    gradient=_linear_gradient,
    spread=_linear_spread,
    incoming=_linear_incoming,
    outgoing=_linear_outgoing,
    needs_input=False,
    channel_first=False,
)
CONVOLUTION = Kind(
    name="convolution",
    types=(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    spec=convolution.spec,
    error=convolution.input_error,
    gradient=convolution.weight_gradient,
    spread=convolution.spread,
    incoming=convolution.incoming,
    outgoing=convolution.outgoing,
    needs_input=True,
    channel_first=True,
)
KINDS = {kind.name: kind for kind in (LINEAR, CONVOLUTION)}

#: Layers that look their input up: it is an index, no error returns through it, and nothing has to be cut.
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


#: Methods that make the map of a layer: where one is replaced, in the class or on the instance, it is another map.
_MAPS = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl")


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer that can take feedback, or None.

    A layer with a forward of its own, by subclass or on the instance, is not the linear map that the table transposes.
    """
    for kind in KINDS.values():
        if isinstance(layer, kind.types) and altered(layer) is None:
            return kind
    return None


def altered(layer: nn.Module) -> str | None:
    """The method of a layer of a known kind that is not its class's own: another map; None where there is none."""
    for kind in KINDS.values():
        for base in kind.types:
            if isinstance(layer, base):
                return next((name for name in _MAPS if _replaced(layer, base, name)), None)
    return None


def _replaced(layer: nn.Module, base: type[nn.Module], name: str) -> bool:
    return name in layer.__dict__ or getattr(type(layer), name, None) is not getattr(base, name, None)


def weight_of(layer: Layer) -> Tensor:
    """The weight, read in evaluation mode: in training a parametrization may change its state when it is read."""
    modes = [(module, module.training) for module in layer.modules()]
    try:
        return layer.eval().weight.detach()
    finally:
        for module, training in modes:
            module.training = training
