"""From the runs of a store to the tables that figures and claims read."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from falign.lab.experiment.catalogue import Catalogue
from falign.lab.experiment.records import series
from falign.lab.experiment.results import Results
from falign.lab.experiment.specification import Experiment, Task


def results(
    experiment: Experiment,
    preset: str,
    tasks: Sequence[Task],
    found: Catalogue,
    places: np.ndarray,
    others: int = 0,
) -> Results:
    """Put together what is there of an experiment.

    Args:
        experiment: The experiment.
        preset: The preset.
        tasks: All its runs.
        found: Those that are there, in the order of ``tasks``.
        places: Which task each of them is.
        others: Number of runs of other revisions.

    Returns:
        The results, both tables in the order of the tasks.
    """
    points = pl.DataFrame([*_points(tasks), series("seed", [task.seed for task in tasks])])
    there = np.full(len(tasks), found.runs.height)  # of those that are not, a row of nulls
    there[places] = np.arange(len(places))
    told = found.runs.select("status", "message", "seconds")
    kept = pl.concat([told, told.clear(1)])[pl.Series(there, dtype=pl.UInt32)]
    runs = pl.DataFrame(
        [
            pl.Series("key", [task.key for task in tasks], dtype=pl.String),
            *points.get_columns(),
            kept["status"].fill_null("missing"),
            kept["message"],
            kept["seconds"],
        ]
    )
    return Results(
        experiment=experiment,
        preset=preset,
        table=_records(points, found, places.astype(np.uint32)),
        runs=runs,
        provenance=tuple(origin for text in _origins(found) if (origin := json.loads(text))),
        others=others,
    )


def _records(points: pl.DataFrame, found: Catalogue, places: np.ndarray) -> pl.DataFrame:
    """The records of all runs beside their points and seeds.

    Args:
        points: The point and seed of each task.
        found: The runs that are there.
        places: Which task each of them is.
    """
    kinds = found.runs["kind"].drop_nulls().unique(maintain_order=True)
    owners = found.spread(places)
    frames = [found.records[kind] for kind in kinds]
    if not any(frame.height for frame in frames):
        return points.clear()
    owner = np.concatenate([owners[kind] for kind in kinds])
    records = frames[0] if len(frames) == 1 else _united(frames)
    if (owner[1:] < owner[:-1]).any():  # runs of several kinds take turns
        order = np.argsort(owner, kind="stable")
        owner, records = owner[order], records[pl.Series(order, dtype=pl.UInt32)]
    same = [axis for axis in points.columns if points[axis].n_unique() == 1]
    # A table may be large: what is the same in all rows is kept once, and the pieces that the records are in are not
    # copied into one.
    parts, at = [], 0
    for length in records.to_series(0).chunk_lengths():
        beside = points.drop(same)[pl.Series(owner[at : at + length])]
        parts.append(pl.concat([beside, records.slice(at, length)], how="horizontal"))
        at += length
    whole = pl.concat(parts).with_columns(pl.lit(points[axis][0], points[axis].dtype).alias(axis) for axis in same)
    return whole.select(*points.columns, *records.columns)


def _united(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Tables one below the other, each column of a type that holds what all of them have.

    Whole numbers beside others become such if each is equal to one; else, and where numbers are beside texts or truth
    values, all become texts, which no claim takes for numbers.
    """
    kinds: dict[str, set[Any]] = {}
    for frame in frames:
        for name, kind in frame.schema.items():
            kinds.setdefault(name, set()).add(kind)
    for name, found in kinds.items():
        if {pl.Int64(), pl.Float64()} <= found and not all(_survives(frame[name]) for frame in frames if name in frame):
            found.add(pl.String())
    common = {name: _common(found - {pl.Null()}) for name, found in kinds.items()}
    return pl.concat([frame.cast({name: common[name] for name in frame.columns}) for frame in frames], how="diagonal")


def _common(kinds: set[Any]) -> Any:  # of types of polars, which cannot be checked as annotations
    if len(kinds) < 2:
        return next(iter(kinds), pl.Null())
    return pl.Float64() if kinds == {pl.Int64(), pl.Float64()} else pl.String()


def _survives(column: pl.Series) -> bool:
    """Whether each number of a column, if it is one of whole numbers, is equal to a float."""
    if column.dtype != pl.Int64:
        return True
    return column.cast(pl.Float64).cast(pl.Int64, strict=False).equals(column, null_equal=True)


def _points(tasks: Sequence[Task]) -> list[pl.Series]:
    """One column an axis; null where a point lacks the axis."""
    axes = dict.fromkeys(axis for task in tasks for axis in task.point)
    return [series(axis, [task.point.get(axis) for task in tasks]) for axis in axes]


def _origins(found: Catalogue) -> list[str]:
    """The distinct provenances, in the order of the runs."""
    return [found.origins[number] for number in found.runs["origin"].unique(maintain_order=True)]
