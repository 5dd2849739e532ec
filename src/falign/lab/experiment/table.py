"""From the entries and records of single runs to the tables that figures and claims read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl

from falign.lab.experiment.entries import Entry
from falign.lab.experiment.records import series
from falign.lab.experiment.results import Results
from falign.lab.experiment.specification import Experiment, Task
from falign.lab.writing import RunError

INDEX = "__run__"
"""The column of records that says which run each is of."""
_FILE = "__file__"


def results(
    experiment: Experiment, preset: str, tasks: Sequence[Task], entries: Mapping[str, Entry], records: pl.DataFrame
) -> Results:
    """Put together what is there of an experiment.

    Args:
        experiment: The experiment.
        preset: The preset.
        tasks: All its runs.
        entries: {key: entry} of those that are kept.
        records: Records of those that are done, with ``INDEX``, the place of the run in ``tasks``; may be empty.

    Returns:
        The results, both tables in the order of the tasks.
    """
    points = pl.DataFrame([*_points(tasks), series("seed", [task.seed for task in tasks])])
    found = [entries.get(task.key) for task in tasks]
    runs = pl.DataFrame(
        [
            pl.Series("key", [task.key for task in tasks], dtype=pl.String),
            *points.get_columns(),
            pl.Series("status", [entry.status if entry else "missing" for entry in found], dtype=pl.String),
            pl.Series("message", [entry.message if entry else None for entry in found], dtype=pl.String),
            pl.Series("seconds", [entry.seconds if entry else None for entry in found], dtype=pl.Float64),
        ]
    )
    if records.is_empty():
        joined = points.clear()
    else:
        ordered = records.sort(INDEX, maintain_order=True)
        joined = pl.concat([points[ordered[INDEX]], ordered.drop(INDEX)], how="horizontal")
    return Results(
        experiment=experiment,
        preset=preset,
        table=joined,
        runs=runs,
        provenance=_origins(entry for entry in found if entry),
    )


def records(alike: Iterable[Mapping[Path, int]]) -> pl.DataFrame:
    """Read the records of runs whose files were found whole.

    Args:
        alike: {file: index of its run}, one for each kind of columns: the files of a kind are read by one scan.

    Returns:
        All records, with ``INDEX``; empty if there are no files.

    Raises:
        RunError: A file cannot be read.
    """
    frames = [_scan({str(path): index for path, index in paths.items()}) for paths in alike]
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def _scan(paths: Mapping[str, int]) -> pl.DataFrame:
    try:
        found = pl.scan_parquet(list(paths), include_file_paths=_FILE, glob=False).collect()
    except OSError as error:  # the files were whole a moment ago, so it is the reading that fails
        folder = Path(next(iter(paths))).parent
        raise RunError(f"cannot read the runs in {folder}: {error.strerror or error}") from None
    order = pl.DataFrame({_FILE: list(paths), INDEX: list(paths.values())})
    return found.join(order, on=_FILE, how="left", maintain_order="left").drop(_FILE)


def _points(tasks: Sequence[Task]) -> list[pl.Series]:
    """One column an axis; null where a point lacks the axis."""
    axes = dict.fromkeys(axis for task in tasks for axis in task.point)
    return [series(axis, [task.point.get(axis) for task in tasks]) for axis in axes]


def _origins(entries) -> tuple[dict, ...]:
    """The distinct provenances, leaving out when each run was started."""
    found = {}
    for entry in entries:
        origin = {name: value for name, value in entry.provenance.items() if name != "started"}
        if origin:
            found.setdefault(json.dumps(origin, sort_keys=True), origin)
    return tuple(found.values())
