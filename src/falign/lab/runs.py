"""A run folder: what is written where, all of it whole or not at all."""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from errno import EACCES
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import polars as pl

from falign.lab.config import TrainConfig
from falign.lab.tables import FIXED, WHOLE, Tables
from falign.lab.writing import RunError, leftovers, write

CONFIG, STATUS, RECORDS = "config.json", "status.json", "records.parquet"
ALIGNMENT, NEURONS, LAW = "alignment.parquet", "neurons.parquet", "law.parquet"
PICTURES = ("loss.png", "accuracy.png", "angles.png", "neurons.png", "dominance.png", "law.png")
EVENTS = "tensorboard"


@dataclass(frozen=True)
class Run:
    """One run folder.

    ``config.json``: the configuration, and where the numbers come from. ``status.json``: running,
    interrupted, done or diverged. ``records.parquet``: what was measured; ``alignment.parquet``: of every layer;
    ``neurons.parquet``: of every neuron, the last time; ``law.parquet``: the conservation law, if it was checked.
    ``checkpoint-STEP.safetensors``: see :mod:`falign.lab.checkpoints`. ``tensorboard``: events, if they were wanted.
    """

    folder: Path

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.folder / CONFIG).exists()

    def refuse_existing(self, *, replaces: bool) -> None:
        """Raise ``RunError`` if there is a run here already that shall not be replaced."""
        if self.exists and not replaces:
            raise RunError(
                f"{self.folder} holds a run already: continue it with --resume {self.folder}, replace it "
                "with --force, or give another folder with --out"
            )

    def begin(self, *, replaces: bool = False) -> None:
        """Make the folder, and take away what an earlier run wrote there, and nothing else.

        Args:
            replaces: Whether an earlier run may be taken away.

        Raises:
            RunError: There is a run already, or nothing can be written here.
        """
        self.refuse_existing(replaces=replaces)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(EACCES, "Permission denied")
            for name in (CONFIG, STATUS, RECORDS, ALIGNMENT, NEURONS, LAW, *PICTURES):
                (self.folder / name).unlink(missing_ok=True)
            for path in (*self.checkpoints(), *leftovers(self.folder), *self.events.glob("events.out.tfevents.*")):
                path.unlink()
        except OSError as error:
            raise RunError(
                f"cannot write into {self.folder}: {error.strerror or error}; give another folder with --out"
            ) from None

    @property
    def events(self) -> Path:
        """The folder of the events for TensorBoard."""
        return self.folder / EVENTS

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        steps = {
            int(match[1]): path
            for path in self.folder.glob("checkpoint-*.safetensors")
            if (match := re.fullmatch(r"checkpoint-(\d+)\.safetensors", path.name))
        }
        return [steps[step] for step in sorted(steps)]

    def write_config(self, config: TrainConfig, provenance: Mapping[str, Any]) -> None:
        """Write what was asked for and where it runs."""
        self._write_json(CONFIG, {"config": asdict(config), "provenance": dict(provenance)})

    def read_config(self) -> tuple[TrainConfig, dict[str, Any]]:
        """The configuration and the provenance.

        Raises:
            RunError: This is no run, or its configuration is damaged.
        """
        if not self.exists:
            raise RunError(
                f"{self.folder} is not a run folder, it has no {CONFIG}: give a folder that falign train wrote"
            )
        content = self._read_json(CONFIG)
        kinds = get_type_hints(TrainConfig)
        stored = content.get("config")
        if not isinstance(stored, dict) or not {"dataset", "model"} <= stored.keys() <= kinds.keys():
            raise self._damaged(CONFIG, "it holds no configuration of this version of falign")
        for name, value in stored.items():
            if not _fits(value, kinds[name]):
                raise self._damaged(CONFIG, f"{name} is {value!r}")
        return TrainConfig(**stored), dict(content.get("provenance", {}))

    def write_status(self, status: str, **details: Any) -> None:
        """Say how the run stands."""
        self._write_json(STATUS, {"status": status, **details})

    def read_status(self) -> dict[str, Any]:
        """How the run stands; "unknown" if nothing was written yet.

        Raises:
            RunError: The file is damaged.
        """
        if not (self.folder / STATUS).exists():
            return {"status": "unknown"}
        content = self._read_json(STATUS)
        if not isinstance(content.get("status"), str):
            raise self._damaged(STATUS, "it says no status")
        return content

    def write_tables(self, tables: Tables) -> None:
        """Write what was measured; the records come last."""
        named = {ALIGNMENT: tables.alignment, NEURONS: tables.neurons, LAW: tables.law, RECORDS: tables.records}
        for name, table in named.items():
            if table is not None:
                write(self.folder / name, parquet(table))

    def read_records(self) -> pl.DataFrame:
        """The records, oldest first.

        Raises:
            RunError: They are missing or damaged.
        """
        path = self.folder / RECORDS
        if not path.exists():
            raise RunError(f"{self.folder} has no {RECORDS} yet: train it first")
        try:
            records = pl.read_parquet(io.BytesIO(path.read_bytes()))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise self._damaged(RECORDS, str(error).splitlines()[0]) from None
        missing = [name for name in (*FIXED, "seconds") if name not in records.columns]
        if missing:
            raise self._damaged(RECORDS, f"it has no column {missing[0]}")
        later = [pl.lit(None, pl.Float64).alias(name) for name in WHOLE if name not in records.columns]
        return records.with_columns(later)  # of a run of falign 0.1, which did not measure them

    def write_picture(self, name: str, content: bytes) -> None:
        """Write one picture."""
        write(self.folder / name, content)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write(self.folder / name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(name, str(error)) from None
        if not isinstance(content, dict):
            raise self._damaged(name, f"it holds a {type(content).__name__}, expected an object")
        return content

    def _damaged(self, name: str, why: str) -> RunError:
        return RunError(f"{self.folder / name} cannot be read ({why}): the file is damaged, restore it or run again")


def _fits(value: object, kind: Any) -> bool:
    """Whether a value that JSON held is of a field's type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_fits(value, part) for part in get_args(kind))
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def parquet(table: pl.DataFrame) -> bytes:
    """A table as the content of a Parquet file."""
    content = io.BytesIO()
    table.write_parquet(content)
    return content.getvalue()
