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


def as_tensor(table: pl.DataFrame) -> UInt8[Tensor, " bytes"]:
    """A table as the bytes of a Parquet file: the JSON of a safetensors file may not be long."""
    return torch.frombuffer(bytearray(parquet(table)), dtype=torch.uint8)


def as_table(content: UInt8[Tensor, " bytes"]) -> pl.DataFrame:
    """The table that ``as_tensor`` was given."""
    return pl.read_parquet(io.BytesIO(content.numpy().tobytes()))
