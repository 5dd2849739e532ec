"""The file of one run: its records as Parquet, and everything else about it in the file's metadata."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from falign.lab.experiment.specification import Point, Task
from falign.lab.writing import RunError

FORMAT = 2
"""Version of a store and of its files; raised when older files count no more. Files of format 1 had no checksum."""
Status = Literal["done", "diverged", "failed", "no data"]
RETRIED = ("failed", "no data")
"""What is tried once more when an experiment is reproduced again: the cause may be gone."""
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
"""What decoding bytes that are no Parquet raises; some make the reader panic."""


class Corrupt(ValueError):  # noqa: N818  # an answer of the reader; the store sets the file aside
    """A file that is no run, or not the one that its name says: why."""


class Older(ValueError):  # noqa: N818  # an answer of the reader; the run counts as missing
    """A file of an older format."""


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
_MARK, _DIGITS = b"falign-sha256:", 64
"""The file's metadata hold this mark and the file's checksum, which is taken with zeros in the place of its digits."""


def encode(entry: Entry, records: pl.DataFrame) -> bytes:
    """The content of a run's file."""
    values = {"format": FORMAT, **{name: getattr(entry, name) for name in _FIELDS}}
    unsigned = _MARK + b"0" * _DIGITS
    metadata = {name: json.dumps(value) for name, value in values.items()} | {"checksum": unsigned.decode()}
    stream = io.BytesIO()
    records.write_parquet(stream, metadata=metadata)
    content = stream.getvalue()
    head, _, tail = content.rpartition(unsigned)
    return head + _MARK + sha256(content).hexdigest().encode() + tail


def read(path: Path) -> tuple[Entry, str]:
    """Read a run's entry, and make sure that not a bit of its file has changed; its records are not decoded.

    Args:
        path: The file.

    Returns:
        The entry, and a text that is the same for files whose records have the same columns and types.

    Raises:
        Corrupt: The file is damaged, or was not written by a store.
        Older: It was written by a falign whose files had no checksum.
        FileNotFoundError: There is none.
        RunError: It cannot be read, which says nothing about what it holds.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}; nothing was done to it") from None
    metadata = _checked(content)
    try:
        values = {name: json.loads(metadata[name]) for name in _FIELDS}
        key = Task(values["experiment"], values["revision"], values["point"], values["seed"]).key
    except KeyError as error:
        raise Corrupt(f"its metadata has no {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise Corrupt(f"its metadata is no entry: {error}") from None
    if values["status"] not in get_args(Status):
        raise Corrupt(f"its status is {values['status']!r}")
    entry = Entry(**values)
    if key != entry.key:
        raise Corrupt(f"its key is {entry.key}, but its experiment, revision, point and seed have {key}")
    return entry, metadata.get("ARROW:schema", "")


def _checked(content: bytes) -> dict[str, str]:
    """The metadata of a whole file."""
    head, mark, tail = content.rpartition(_MARK)
    if not mark:
        metadata = _metadata(content)
        raise Older if metadata.get("format") == "1" else Corrupt("it has no checksum")
    written, unsigned = tail[:_DIGITS], head + mark + b"0" * _DIGITS + tail[_DIGITS:]
    if sha256(unsigned).hexdigest().encode() != written:
        raise Corrupt("its checksum is wrong")
    return _metadata(content)


def _metadata(content: bytes) -> dict[str, str]:
    try:
        return pl.read_parquet_metadata(io.BytesIO(content))
    except _UNREADABLE as error:
        raise Corrupt((str(error).splitlines() or [type(error).__name__])[0]) from None
