"""Tables of a run: the columns of records, alignment and neurons, and how rows become tables and Parquet files."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from sys import float_info
from typing import Any

import polars as pl

from falign.lab._files import BLANK, sealed
from falign.measure import Alignment, LayerAlignment

_FIXED = ("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
"""First columns of the records; the angles of the layers follow."""
TEXT_COLUMNS = ("validation_loss", "validation_accuracy", "perplexity")
"""Columns of the records of a text, before the angles."""
NETWORK_COLUMNS = ("dominance", "descent")
"""Columns of the records after the angles, of the network as a whole; the last column is ``seconds``."""
_UNREADABLE = "unreadable"
"""Layers of which an angle rests on rounding; a column before the seconds, which runs of before it came do not have."""
_LARGEST = {"step": 2.0**63, "epoch": 1e9, "seconds": 1e12}
"""Numbers that no run comes to."""
_KINDS = {"layer": pl.String, "kind": pl.String, "neurons": pl.Int64, "unreadable": pl.String}
"""Columns of the alignment that hold no real number."""
_LAYERS = {"step": pl.Int64, "epoch": pl.Float64} | {
    part.name: _KINDS.get(part.name, pl.Float64) for part in fields(LayerAlignment)
}
_PROTOCOL = ("input_norm", "growth", "error_norm", "loss_change", "unreadable")
"""Columns of the alignment that runs of before they came do not have."""
_NEURONS = {"layer": pl.String, "neuron": pl.Int64, "alignment": pl.Float64, "cosine": pl.Float64}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Everything that a run has measured.

    Attributes:
        records: One row for each measured step: see :func:`record_table`.
        alignment: One row for each measured step and layer: see :func:`alignment_table`.
        neurons: One row for each neuron: see :func:`neuron_table`.
        law: Balance of the conservation law of each neuron; None where it was not checked.
    """

    records: pl.DataFrame
    alignment: pl.DataFrame
    neurons: pl.DataFrame
    law: pl.DataFrame | None = None


def record_table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Make the table of records: step, epoch, losses, accuracies, ``angle_LAYER``, dominance, descent, …, seconds.

    Losses are mean cross-entropies in nats, accuracies shares from 0 to 1, angles in degrees. A text has its columns of
    the validation, and the perplexity, exp of the test loss, before the angles. ``unreadable`` is the number of layers
    of which an angle rests on rounding.
    """
    text = [name for name in TEXT_COLUMNS if any(name in row for row in rows)]
    angles = dict.fromkeys(key for row in rows for key in row if key.startswith("angle_"))
    counted = [_UNREADABLE] if any(_UNREADABLE in row for row in rows) else []
    columns = (*_FIXED, *text, *angles, *NETWORK_COLUMNS, *counted, "seconds")
    schema = {name: pl.Int64 if name == "step" else pl.Float64 for name in columns}
    return pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], schema=schema)


def check_records(table: pl.DataFrame) -> None:
    """Refuse a table that is none of records.

    Raises:
        ValueError: A column is missing or of another type, or a number is outside of what a run can measure.
    """
    further = (name for name in table.columns if name.startswith("angle_") or name in (*TEXT_COLUMNS, _UNREADABLE))
    columns = (*_FIXED, *NETWORK_COLUMNS, "seconds", *further)
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
    return (-float_info.max if name in NETWORK_COLUMNS else 0.0), _LARGEST.get(name, float_info.max)


def alignment_table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Make the table of the alignment: step, epoch, and the fields of ``falign.measure.LayerAlignment``.

    Rows of a run of before the protocol came have none of its columns.
    """
    if rows and not any(_UNREADABLE in row for row in rows):
        schema = {name: kind for name, kind in _LAYERS.items() if name not in _PROTOCOL}
        return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)
    return pl.DataFrame([{name: row.get(name) for name in _LAYERS} for row in rows], schema=_LAYERS)


def layer_rows(alignment: Alignment, *, step: int, epoch: float) -> list[dict[str, Any]]:
    """Return the rows of the alignment at one measured step; numbers that are not finite become None."""
    return [
        {"step": step, "epoch": epoch, **{name: finite_or_none(value) for name, value in row.items()}}
        for row in alignment.rows()
    ]


def neuron_table(alignment: Alignment | None) -> pl.DataFrame:
    """Make the table of neurons at the inputs of layers: ⟨B[:, k], W[:, k]⟩ of neuron k, and its cosine."""
    if alignment is None:
        return pl.DataFrame(schema=_NEURONS)
    tables = [
        pl.DataFrame(
            {
                "layer": [layer] * len(products),
                "neuron": range(len(products)),
                "alignment": products.tolist(),
                "cosine": alignment.neuron_cosines[layer].tolist(),
            },
            schema=_NEURONS,
        )
        for layer, products in alignment.neurons.items()
    ]
    return pl.concat(tables) if tables else neuron_table(None)


def finite_or_none(value: Any) -> Any:
    """Return None in place of a float that is infinite or not a number, and everything else as it is."""
    return None if isinstance(value, float) and not isfinite(value) else value


def parquet(table: pl.DataFrame, run: str = "") -> bytes:
    """Write a table as a sealed Parquet file.

    Args:
        table: The table.
        run: Identity of its run.

    Returns:
        The content of the file.
    """
    content = io.BytesIO()
    table.write_parquet(content, metadata={"checksum": BLANK, "run": run})
    return sealed(content.getvalue())
