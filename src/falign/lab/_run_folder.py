"""A run folder: what is written where, all of it whole or not at all, sealed, and bound to its run."""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from errno import EACCES
from hashlib import sha256
from math import isfinite
from pathlib import Path
from secrets import token_hex
from sys import float_info
from typing import Any, Literal, get_args, get_origin, get_type_hints

import polars as pl

from falign.lab import _files
from falign.lab._files import FolderLock, FolderLost, RunError, Unreadable, atomic_write, leftovers, read_bounded
from falign.lab.config import TrainConfig
from falign.measure import Alignment, LayerAlignment

# The tables of a run: which columns they have, and how rows become one.

FIXED = ("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
"""Columns of the records before the angles."""
NETWORK_COLUMNS = ("dominance", "descent")
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


def record_table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """A row a measured point: step, epoch, losses, accuracies, ``angle_LAYER`` layer by layer, dominance, seconds."""
    angles = dict.fromkeys(key for row in rows for key in row if key.startswith("angle_"))
    columns = (*FIXED, *angles, *NETWORK_COLUMNS, "seconds")
    schema = {name: pl.Int64 if name == "step" else pl.Float64 for name in columns}
    return pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], schema=schema)


def check_records(table: pl.DataFrame) -> None:
    """Make sure that a table that was read is one of records.

    Raises:
        ValueError: A column is missing or holds something else, or a number is none that a run can have measured.
    """
    columns = (*FIXED, *NETWORK_COLUMNS, "seconds", *(name for name in table.columns if name.startswith("angle_")))
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
    """A row a measured point and layer: step, epoch, and what ``falign.measure.LayerAlignment`` has."""
    return pl.DataFrame([{name: row.get(name) for name in _LAYERS} for row in rows], schema=_LAYERS)


def layer_rows(found: Alignment, *, step: int, epoch: float) -> list[dict[str, Any]]:
    """The rows of one measured point; what is not finite is null."""
    return [
        {"step": step, "epoch": epoch, **{name: finite_or_none(value) for name, value in row.items()}}
        for row in found.rows()
    ]


def neuron_table(found: Alignment | None) -> pl.DataFrame:
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
    return pl.concat(pieces) if pieces else neuron_table(None)


def finite_or_none(value: Any) -> Any:
    """None in place of a number that is infinite or none; the rest as it is."""
    return None if isinstance(value, float) and not isfinite(value) else value


CONFIG, STATUS, RECORDS = "config.json", "status.json", "records.parquet"
ALIGNMENT, NEURONS, LAW = "alignment.parquet", "neurons.parquet", "law.parquet"
TRACEBACK = "traceback.txt"
PICTURES = ("loss.png", "accuracy.png", "angles.png", "neurons.png", "dominance.png", "law.png")
EVENTS = "tensorboard"
_FILES = (CONFIG, STATUS, RECORDS, ALIGNMENT, NEURONS, LAW, TRACEBACK, *PICTURES)
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{8,18})\.safetensors")

_JSON, _TABLE = 64 << 20, 1 << 30
"""So many bytes of a file are read."""
_WHOLE = 2**63
"""Whole numbers stay below."""


class RunFolder:
    """One run folder.

    ``config.json``: the configuration, and where the numbers come from. ``status.json``: running, interrupted, done,
    diverged or failed. ``records.parquet``: what was measured; ``alignment.parquet``: of every layer;
    ``neurons.parquet``: of every neuron, the last time; ``law.parquet``: the conservation law, if it was checked.
    ``checkpoint-STEP.safetensors``: see :mod:`falign.lab._checkpoints`. ``traceback.txt``: of a run that failed.
    ``tensorboard``: events, if they were wanted. ``.lock``: there as long as a process is at work.

    What is read back holds a checksum of its whole file, and says of which run it is.

    Args:
        folder: Where; it need not exist.

    Attributes:
        folder: The same.
        identity: What its files say of which run they are: a token drawn when it began, and a digest of its
            configuration apart from ``epochs``. Empty as long as no configuration was written or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = ""
        self._token = ""
        self._hold: FolderLock | None = None

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return os.path.lexists(self.folder / CONFIG)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only process at work in the folder; it is made where there is none.

        Raises:
            RunError: Another one is, or there can be no folder or no lock.
        """
        self._make()
        with FolderLock(self.folder) as hold:
            self._hold = hold
            self._clean()
            try:
                yield
            finally:
                self._hold = None

    def check(self) -> None:
        """Make sure that the folder is still this run's.

        Raises:
            Lost: It was deleted, and perhaps made anew by another one.
        """
        if self._hold is not None:
            self._hold.check()

    def refuse_existing(self, *, replaces: bool) -> None:
        """Raise ``RunError`` if there is a run here already that shall not be replaced, or that is at work."""
        if self._hold is None and _files.is_in_use(self.folder):
            raise _files.folder_busy(self.folder)
        if self.exists and not replaces:
            raise RunError(
                f"{self.folder} holds a run already: continue it with --resume {self.folder}, replace it "
                "with --force, or give another folder with --out"
            )

    def require(self) -> None:
        """Raise ``RunError`` if no run was begun here."""
        if not self.exists:
            raise RunError(
                f"{self.folder} is not a run folder, it has no {CONFIG}: give a folder that falign train wrote"
            )

    def begin(self, *, replaces: bool = False) -> None:
        """Make the folder, and take away what an earlier run wrote there, and nothing else.

        Args:
            replaces: Whether an earlier run may be taken away.

        Raises:
            RunError: There is a run already, or nothing can be written here.
        """
        self.refuse_existing(replaces=replaces)
        self._make()
        self._token, self.identity = token_hex(16), ""
        try:
            for name in _FILES:
                (self.folder / name).unlink(missing_ok=True)
            for path in (*self.checkpoints(), *self.events.glob("events.out.tfevents.*")):
                path.unlink()
        except OSError as error:
            raise self._unwritable(error) from None

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(EACCES, "Permission denied")
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise self._unwritable(error) from None

    def _unwritable(self, error: Exception) -> RunError:
        why = getattr(error, "strerror", None) or str(error)
        return RunError(f"cannot write into {self.folder}: {why}; give another folder with --out")

    def _clean(self) -> None:
        """Take away what killed processes left half-written: nobody else is writing these files now."""
        for path in leftovers(self.folder):
            name = path.name[1:].rpartition(".partial-")[0]
            if name in _FILES or _CHECKPOINT.fullmatch(name):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    @property
    def events(self) -> Path:
        """The folder of the events for TensorBoard."""
        return self.folder / EVENTS

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        steps = {
            int(match[1]): path
            for path in self.folder.glob("checkpoint-*.safetensors")
            if (match := _CHECKPOINT.fullmatch(path.name)) and path.name == checkpoint_name(int(match[1]))
        }
        return [steps[step] for step in sorted(steps)]

    @property
    def saved(self) -> int:
        """The step of the last checkpoint, 0 where there is none."""
        found = self.checkpoints()
        return int(found[-1].name.removeprefix("checkpoint-").removesuffix(".safetensors")) if found else 0

    def write(self, name: str, content: bytes) -> Path:
        """Write one file of the run.

        Args:
            name: Its name in the folder.
            content: What it shall hold.

        Returns:
            The file.

        Raises:
            WriteError: It cannot be written, or the folder is no longer this run's.
        """
        self.check()
        path = self.folder / name
        atomic_write(path, content)
        try:
            self.check()
        except FolderLost:  # since the check before: a file alone must not say that all is there
            with suppress(OSError):
                path.unlink()
            raise
        return path

    def write_config(self, config: TrainConfig, provenance: Mapping[str, Any]) -> None:
        """Write what was asked for and where it runs."""
        self._identify(self._token or token_hex(16), config)
        content = {"run": self._token, "config": config.to_json(), "provenance": dict(provenance)}
        self.write(CONFIG, _files.to_json(content))

    def read_config(self) -> tuple[TrainConfig, dict[str, Any]]:
        """The configuration and the provenance.

        Raises:
            RunError: This is no run, or its configuration is damaged.
        """
        self.require()
        content = self._read_json(CONFIG)
        kinds = get_type_hints(TrainConfig)
        stored, token, provenance = (content.get(name) for name in ("config", "run", "provenance"))
        if not isinstance(stored, dict) or not isinstance(token, str) or not isinstance(provenance, dict):
            raise self._damaged(CONFIG, "it holds no configuration of this version of falign")
        stored = {"rule_option": [], **stored}  # left out where there is none
        if stored.keys() != kinds.keys():
            raise self._damaged(CONFIG, "it holds no configuration of this version of falign")
        for name, value in stored.items():
            if not _fits(value, kinds[name]):
                raise self._damaged(CONFIG, f"{name} is {_shown(value)}")
        try:
            _files.to_json(provenance)  # a resumed run writes it again, with more
        except (ValueError, RecursionError):
            raise self._damaged(CONFIG, "its provenance is not what falign writes") from None
        config = TrainConfig(**{**stored, "rule_option": tuple(stored["rule_option"])})
        self._identify(token, config)
        return config, provenance

    def _identify(self, token: str, config: TrainConfig) -> None:
        self._token, self.identity = token, f"{token}-{digest(config)}"

    def write_status(self, status: str, **details: Any) -> None:
        """Say how the run stands; ``saved`` becomes the step of the last checkpoint."""
        content = {"run": self.identity, "status": status, **details, "saved": self.saved}
        self.write(STATUS, _files.to_json(content))

    def read_status(self) -> dict[str, Any]:
        """How the run stands; "unknown" if nothing was written yet, "killed" if it neither goes on nor has ended.

        Raises:
            RunError: The file is damaged.
        """
        if not os.path.lexists(self.folder / STATUS):
            return {"status": "unknown"}
        content = self._read_json(STATUS)
        for name, kind in _STATUS.items():
            if not _fits(content.get(name), kind):
                raise self._damaged(STATUS, f"{name} is {_shown(content.get(name))}")
        self._check_identity(STATUS, content["run"])
        if content["status"] == "running" and self._hold is None and not _files.is_in_use(self.folder):
            content["status"] = "killed"
        return content

    def write_tables(self, tables: Tables) -> None:
        """Write what was measured; the records come last."""
        named = {ALIGNMENT: tables.alignment, NEURONS: tables.neurons, LAW: tables.law, RECORDS: tables.records}
        for name, table in named.items():
            if table is not None:
                self.write(name, parquet(table, self.identity))

    def read_records(self) -> pl.DataFrame:
        """The records, oldest first.

        Raises:
            RunError: They are missing, damaged or of another run.
        """
        path = self.folder / RECORDS
        if not os.path.lexists(path):
            raise RunError(f"{self.folder} has no {RECORDS} yet: train it first")
        try:
            content = read_bounded(path, _TABLE)
            _files.verify_seal(content)
            self._check_identity(RECORDS, pl.read_parquet_metadata(io.BytesIO(content)).get("run"))
            records = pl.read_parquet(io.BytesIO(content))
            check_records(records)
        except (ValueError, OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise self._damaged(RECORDS, (str(error).splitlines() or [type(error).__name__])[0]) from None
        return records

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            return _files.from_json(read_bounded(self.folder / name, _JSON))
        except (Unreadable, _files.Unsealed) as error:
            raise self._damaged(name, str(error)) from None

    def _check_identity(self, name: str, identity: object) -> None:
        if self.identity and identity != self.identity:
            raise RunError(
                f"{self.folder / name} is of another run, or of another configuration, than {self.folder / CONFIG}: "
                f"{self._remedy(name)}"
            )

    def _damaged(self, name: str, why: str) -> RunError:
        return RunError(f"{self.folder / name} cannot be read ({why}): the file is damaged, {self._remedy(name)}")

    def _remedy(self, name: str) -> str:
        """How the content comes back: of all but the configuration, from the last checkpoint."""
        if name == CONFIG:
            return "restore it, or begin the run again with --force"
        again = f"falign train --resume {self.folder} writes it again from the last checkpoint"
        return f"delete it, then {again}" if name == STATUS else again


def checkpoint_name(step: int) -> str:
    """The file name of a checkpoint."""
    return f"checkpoint-{step:08d}.safetensors"


def digest(config: TrainConfig) -> str:
    """A digest of a configuration apart from ``epochs``, which may change while a run goes on."""
    values = {name: value for name, value in config.to_json().items() if name != "epochs"}
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_STATUS: dict[str, Any] = {
    "run": str,
    "status": str,
    "saved": int,
    "step": int | None,
    "epoch": int | None,
    "message": str | None,
    "law": str | None,
}
"""What a status holds that somebody reads; there may be more."""


def _fits(value: object, kind: Any) -> bool:
    """Whether a value that JSON held is of a field's type, and of a size that numbers and file names can have."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(part, get_args(kind)[0]) for part in value)
    if get_args(kind):
        return any(_fits(value, part) for part in get_args(kind))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, str):
        return kind is str and "\0" not in value and _encodable(value)
    if isinstance(value, int):
        return kind in (int, float) and abs(value) < _WHOLE
    if isinstance(value, float):
        return kind is float and isfinite(value)
    return isinstance(value, kind)


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeError:
        return False
    return True


def _shown(value: object) -> str:
    """A value in a sentence, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in a list in a list
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def parquet(table: pl.DataFrame, run: str = "") -> bytes:
    """A table as the content of a sealed Parquet file.

    Args:
        table: The table.
        run: Of which run it is.
    """
    content = io.BytesIO()
    table.write_parquet(content, metadata={"checksum": _files.BLANK, "run": run})
    return _files.sealed(content.getvalue())
