"""Nested states and tables as what a checkpoint holds: tensors, and beside them JSON."""

import io
from typing import Any

import polars as pl
import torch
from jaxtyping import UInt8
from torch import Tensor

from falign.lab.runs import parquet

_TENSOR = "tensor:"
"""How the name of a tensor begins where it stands in place of the tensor."""


def packed(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state without its tensors.

    Args:
        state: Dicts and lists of tensors, numbers and texts.
        prefix: What the names of its tensors begin with.
        tensors: Where the tensors are put.

    Returns:
        The same as JSON can hold it, a name in place of each tensor.
    """
    if isinstance(state, Tensor):
        name = f"{prefix}.{len(tensors)}"
        tensors[name] = state
        return _TENSOR + name
    if isinstance(state, dict):
        return {key: packed(value, prefix, tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [packed(value, prefix, tensors) for value in state]
    return state


def unpacked(state: Any, tensors: dict[str, Tensor]) -> Any:
    """The nested state that ``packed`` was given."""
    if isinstance(state, str) and state.startswith(_TENSOR):
        return tensors[state.removeprefix(_TENSOR)]
    if isinstance(state, dict):
        return {key: unpacked(value, tensors) for key, value in state.items()}
    if isinstance(state, list):
        return [unpacked(value, tensors) for value in state]
    return state


def axes_by_stride(tensor: Tensor) -> list[int] | None:
    """The axes from the outermost to the innermost in memory; None where they are in order, or the memory has gaps.

    Any memory format of a dense tensor (channels_last, the transpose of a matrix) is that of a permuted one.
    """
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else None


def laid_out(tensor: Tensor, order: list[int] | None) -> Tensor:
    """A contiguous tensor in the memory format that ``axes_by_stride`` told.

    Raises:
        ValueError: The order is of another number of axes.
    """
    if order is None:
        return tensor
    if sorted(order) != list(range(tensor.dim())):
        raise ValueError(f"axes {order} of a tensor with {tensor.dim()} axes")
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def as_tensor(table: pl.DataFrame) -> UInt8[Tensor, " bytes"]:
    """A table as the bytes of a Parquet file: the JSON of a safetensors file may not be long."""
    return torch.frombuffer(bytearray(parquet(table)), dtype=torch.uint8)


def as_table(content: UInt8[Tensor, " bytes"]) -> pl.DataFrame:
    """The table that ``as_tensor`` was given."""
    return pl.read_parquet(io.BytesIO(content.numpy().tobytes()))
