"""A layer kind of a user's own, outside the package: a linear map of blocks, as a convolution's groups are."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from falign.layers import KINDS, Kind


class GroupedLinear(nn.Module):
    """y = x Wᵀ + b in ``groups`` blocks: outputs of a group read the inputs of that group. W (out, in / groups)."""

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        bound = math.sqrt(groups / in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups).uniform_(-bound, bound))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.weight.unflatten(0, (self.groups, -1))  # (groups, out of a group, in of a group)
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (self.groups, -1)), blocks).flatten(-2)
        return y if self.bias is None else y + self.bias


class Groups(NamedTuple):
    """Numbers that the maps below need beside their tensors."""

    groups: int


def carried(error: Tensor, B: Tensor, x: Tensor, spec: Groups) -> Tensor:
    """The error at the input: the layer's own map, transposed, with B for W."""
    blocks = B.unflatten(0, (spec.groups, -1))
    return torch.einsum("...go,goi->...gi", error.unflatten(-1, (spec.groups, -1)), blocks).flatten(-2)


def gradient(error: Tensor, B: Tensor, x: Tensor, spec: Groups) -> Tensor:
    """The gradient of B as if it were the weight, for rules whose feedback learns."""
    rows = error.flatten(0, -2).unflatten(-1, (spec.groups, -1))
    inputs = x.flatten(0, -2).unflatten(-1, (spec.groups, -1)).to(error.dtype)
    return torch.einsum("ngo,ngi->goi", rows, inputs).flatten(0, 1)


KINDS["grouped"] = Kind(
    name="grouped",
    types=(GroupedLinear,),
    spec=lambda layer: Groups(layer.groups),
    error=carried,
    gradient=gradient,
    fan_in=lambda layer: layer.in_features / layer.groups,
    incoming=lambda product, layer: product.sum(1),
    outgoing=lambda product, layer: product.unflatten(0, (layer.groups, -1)).sum(1).flatten(),
    needs_input=False,
    channel_first=False,
)
