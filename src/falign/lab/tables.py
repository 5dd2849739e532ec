"""The tables of a run: which columns they have, and how rows become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from sys import float_info
from typing import Any

import polars as pl

from falign.measure import Alignment, LayerAlignment

FIXED = ("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
"""Columns of the records before the angles."""
WHOLE = ("dominance", "descent")
"""Columns of the records after the angles, of the network as a whole; after them comes ``seconds``."""
_LARGEST = {"step": 2.0**63, "epoch": 1e9, "seconds": 1e12}
"""What no run comes to."""
_KINDS = {"layer": pl.String, "kind": pl.String, "neurons": pl.Int64}
"""Columns that hold no real number."""
_LAYERS = {"step": pl.Int64, "epoch": pl.Float64} | {
    part.name: _KINDS.get(part.name, pl.Float64) for part in fields(LayerAlignment)
}
_NEURONS = {"layer": pl.String, "neuron": pl.Int64, "alignment": pl.Float64, "cosine": pl.Float64}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """What a run has measured.

    Attributes:
        records: See ``records``.
        alignment: See ``alignments``.
        neurons: See ``neurons``.
        law: What the conservation law says of every neuron, where it was checked.
    """

    records: pl.DataFrame
    alignment: pl.DataFrame
    neurons: pl.DataFrame
    law: pl.DataFrame | None = None


def records(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """A row a measured point: step, epoch, losses, accuracies, ``angle_LAYER`` layer by layer, dominance, seconds."""
    angles = dict.fromkeys(key for row in rows for key in row if key.startswith("angle_"))
    columns = (*FIXED, *angles, *WHOLE, "seconds")
    schema = {name: pl.Int64 if name == "step" else pl.Float64 for name in columns}
    return pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], schema=schema)


def check_records(table: pl.DataFrame) -> None:
    """Make sure that a table that was read is one of records.

    Raises:
        ValueError: A column is missing or holds something else, or a number is none that a run can have measured.
    """
    columns = (*FIXED, *WHOLE, "seconds", *(name for name in table.columns if name.startswith("angle_")))
    for name in columns:
        if name not in table.columns:
            raise ValueError(f"it has no column {name}")
        expected = pl.Int64 if name == "step" else pl.Float64
        if table[name].dtype != expected:
            raise ValueError(f"column {name} holds {table[name].dtype}, expected {expected()}")
        low, high = _bounds(name)
        if not table[name].drop_nulls().is_between(low, high).all():  # nan is in no interval
            raise ValueError(f"column {name} holds a number that is not from {low:g} to {high:g}")
    if any(table[name].null_count() for name in ("step", "epoch", "seconds")):
        raise ValueError("a row has no step, no epoch or no seconds")
    if not (table["step"].diff().drop_nulls() > 0).all():
        raise ValueError("its steps do not rise")


def _bounds(name: str) -> tuple[float, float]:
    if name.startswith("angle_"):
        return 0.0, 180.0
    if name.endswith("accuracy"):
        return 0.0, 1.0
    return (-float_info.max if name in WHOLE else 0.0), _LARGEST.get(name, float_info.max)


def alignments(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """A row a measured point and layer: step, epoch, and what ``falign.measure.LayerAlignment`` has."""
    return pl.DataFrame([{name: row.get(name) for name in _LAYERS} for row in rows], schema=_LAYERS)


def layer_rows(found: Alignment, *, step: int, epoch: float) -> list[dict[str, Any]]:
    """The rows of one measured point; what is not finite is null."""
    return [
        {"step": step, "epoch": epoch, **{name: finite_or_none(value) for name, value in row.items()}}
        for row in found.rows()
    ]


def neurons(found: Alignment | None) -> pl.DataFrame:
    """A row a neuron at a layer's input: ``alignment`` ⟨B[:, k], W[:, k]⟩ and ``cosine``, the same over the norms."""
    if found is None:
        return pl.DataFrame(schema=_NEURONS)
    pieces = [
        pl.DataFrame(
            {
                "layer": [layer] * len(products),
                "neuron": range(len(products)),
                "alignment": products.tolist(),
                "cosine": found.neuron_cosines[layer].tolist(),
            },
            schema=_NEURONS,
        )
        for layer, products in found.neurons.items()
    ]
    return pl.concat(pieces) if pieces else neurons(None)


def finite_or_none(value: Any) -> Any:
    """None in place of a number that is infinite or none; the rest as it is."""
    return None if isinstance(value, float) and not isfinite(value) else value
