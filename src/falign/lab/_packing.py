"""Nested states and tables in the form of a checkpoint: tensors, and JSON beside them."""

import io
from collections import OrderedDict
from typing import Any

import polars as pl
import torch
from jaxtyping import UInt8
from torch import Tensor

from falign.lab._tables import parquet

JSON_LIMIT = 100_000_000
"""Letters of JSON that safetensors reads, names of tensors included."""
_PLAIN = (type(None), bool, int, float, str)
"""Types that JSON holds as they are."""


def pack(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a nested state to JSON, in which everything but plain values names its type; tensors are taken out.

    Args:
        state: Dicts, lists and tuples of tensors, numbers, texts and bytes.
        prefix: Beginning of the names of its tensors.
        tensors: Dict that receives the tensors.

    Raises:
        TypeError: It holds a value of another type.
    """
    if isinstance(state, Tensor):
        name = f"{prefix}.{len(tensors)}"
        tensors[name] = state
        return {"tensor": name}
    if type(state) in (dict, OrderedDict):
        pairs = [[pack(key, prefix, tensors), pack(value, prefix, tensors)] for key, value in state.items()]
        return {"dict" if type(state) is dict else "ordered": pairs}
    if type(state) in (list, tuple):
        return {type(state).__name__: [pack(value, prefix, tensors) for value in state]}
    if type(state) is bytes:
        return {"bytes": state.hex()}
    if type(state) in _PLAIN:
        return state
    raise TypeError(f"a {type(state).__name__}")


def unpack(state: Any, tensors: dict[str, Tensor]) -> Any:
    """Restore the nested state that ``pack`` converted.

    Raises:
        ValueError: ``pack`` gave no such JSON.
    """
    if type(state) in _PLAIN:
        return state
    ((kind, value),) = state.items() if isinstance(state, dict) and len(state) == 1 else ((None, None),)
    if kind == "tensor" and value in tensors:
        return tensors[value]
    if kind in ("dict", "ordered") and isinstance(value, list):
        pairs = [(unpack(key, tensors), unpack(each, tensors)) for key, each in value]
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind in ("list", "tuple") and isinstance(value, list):
        parts = [unpack(each, tensors) for each in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "bytes" and isinstance(value, str):
        return bytes.fromhex(value)
    raise ValueError(f"its state holds {str(state)[:60]}")


def axes_by_stride(tensor: Tensor) -> list[int] | None:
    """Return the axes from the outermost to the innermost in memory; None if in order or with gaps.

    Any memory format of a dense tensor (channels_last, the transpose of a matrix) is that of a permuted one.
    """
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else None


def with_layout(tensor: Tensor, order: list[int] | None) -> Tensor:
    """Copy a contiguous tensor into the memory format that ``axes_by_stride`` returned.

    Raises:
        ValueError: The order is of another number of axes.
    """
    if order is None:
        return tensor
    if sorted(order) != list(range(tensor.dim())):
        raise ValueError(f"axes {order} of a tensor with {tensor.dim()} axes")
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def table_to_tensor(table: pl.DataFrame) -> UInt8[Tensor, " bytes"]:
    """Write a table as the bytes of a Parquet file: as JSON it might exceed the bound of safetensors."""
    return torch.frombuffer(bytearray(parquet(table)), dtype=torch.uint8)


def tensor_to_table(content: UInt8[Tensor, " bytes"]) -> pl.DataFrame:
    """Read the table that ``table_to_tensor`` wrote."""
    return pl.read_parquet(io.BytesIO(content.numpy().tobytes()))
