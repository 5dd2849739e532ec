"""The file of one run: its records as Parquet, and everything else about it in the file's metadata."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from falign.lab.experiment.specification import Point, Task

FORMAT = 1
"""Version of a store and of its files; raised when an older falign could no longer read them."""
Status = Literal["done", "diverged", "failed", "no data"]
RETRIED = ("failed", "no data")
"""What is tried once more when an experiment is reproduced again: the cause may be gone."""
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
"""What reading a damaged Parquet file raises; some damage makes the reader panic."""


class Corrupt(ValueError):  # noqa: N818  # an answer of the reader; the store sets the file aside
    """A file that is no run, or not the one that its name says: why."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Everything about a run but its records.

    Args:
        key: The run's key.
        experiment: Full name of its experiment.
        revision: The experiment's revision.
        point: The run's point.
        seed: Its seed.
        status: What became of it.
        message: How it diverged or failed; None if done.
        seconds: Its share of the time that its block took.
        provenance: Where it was computed: see :func:`falign.lab.provenance.place`; and ``started``.
    """

    key: str
    experiment: str
    revision: int
    point: Point
    seed: int
    status: Status
    message: str | None = None
    seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, status: Status, **details: Any) -> "Entry":
        """The entry of a run.

        Args:
            task: The run.
            status: What became of it.
            **details: ``message``, ``seconds``, ``provenance``.
        """
        return cls(
            key=task.key,
            experiment=task.experiment,
            revision=task.revision,
            point=dict(task.point),
            seed=task.seed,
            status=status,
            **details,
        )


_FIELDS = tuple(Entry.__dataclass_fields__)


def encode(entry: Entry, records: pl.DataFrame) -> bytes:
    """The content of a run's file."""
    values = {"format": FORMAT, **{name: getattr(entry, name) for name in _FIELDS}}
    content = io.BytesIO()
    records.write_parquet(content, metadata={name: json.dumps(value) for name, value in values.items()})
    return content.getvalue()


def read(path: Path) -> tuple[Entry, str]:
    """Read a run's entry; its records are left unread.

    Args:
        path: The file.

    Returns:
        The entry, and a text that is the same for files whose records have the same columns and types.

    Raises:
        Corrupt: The file is damaged, or was not written by a store.
        FileNotFoundError: There is none.
    """
    try:
        metadata = pl.read_parquet_metadata(path)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise Corrupt(_short(error)) from None
    try:
        values = {name: json.loads(metadata[name]) for name in _FIELDS}
    except KeyError as error:
        raise Corrupt(f"its metadata has no {error.args[0]}") from None
    except ValueError as error:
        raise Corrupt(f"its metadata is no JSON: {error}") from None
    if values["status"] not in get_args(Status):
        raise Corrupt(f"its status is {values['status']!r}")
    return Entry(**values), metadata.get("ARROW:schema", "")


def read_records(path: Path) -> pl.DataFrame:
    """Read a run's records.

    Raises:
        Corrupt: The file is damaged.
    """
    try:
        return pl.read_parquet(io.BytesIO(path.read_bytes()))
    except UNREADABLE as error:
        raise Corrupt(_short(error)) from None


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
