"""Run folders: which file holds what, written whole or not at all, sealed, and bound to their run."""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES
from hashlib import sha256
from math import isfinite
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from falign.lab import _files
from falign.lab._files import FolderLock, FolderLost, RunError, Unreadable, atomic_write, leftovers, read_bounded
from falign.lab.config import ADDED, TrainConfig

if TYPE_CHECKING:
    import polars as pl

    from falign.lab._tables import Tables

# What needs polars and PyTorch is imported in the methods: that a folder holds no run is said at once.

CONFIG, _STATUS, _RECORDS = "config.json", "status.json", "records.parquet"
_ALIGNMENT, _NEURONS, _LAW = "alignment.parquet", "neurons.parquet", "law.parquet"
TRACEBACK = "traceback.txt"
PICTURES = ("loss.png", "accuracy.png", "perplexity.png", "angles.png", "neurons.png", "dominance.png", "law.png")
_EVENTS = "tensorboard"
_FILES = (CONFIG, _STATUS, _RECORDS, _ALIGNMENT, _NEURONS, _LAW, TRACEBACK, *PICTURES)
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{8,18})\.safetensors")

_DIGITS = re.compile(r"([0-9]+)")

_JSON, _TABLE = 64 << 20, 1 << 30
"""Bytes that a JSON file and a table may have; more is refused unread."""
_WHOLE = 2**63
"""Bound of whole numbers in JSON: what is stored as 64 bits stays below."""


class RunFolder:
    """Folder of one run.

    ===============================  ===================================================================
    ``config.json``                  the configuration, and the provenance of the numbers
    ``status.json``                  running, interrupted, done, diverged or failed
    ``records.parquet``              losses, accuracies and angles, one row for each measured step
    ``alignment.parquet``            the alignment of every layer, one row for each measured step and layer
    ``neurons.parquet``              the alignment of every neuron at the last measured step
    ``law.parquet``                  balance of the conservation law of every neuron, if it was checked
    ``checkpoint-STEP.safetensors``  the last two checkpoints: see :mod:`falign.lab._checkpoints`
    ``traceback.txt``                of a run that failed
    ``tensorboard``                 events, if they were wanted
    ``.lock``                        exists as long as a process is at work
    ===============================  ===================================================================

    Each file that is read back holds a checksum of itself, and the identity of its run.

    Args:
        folder: The folder; it need not exist.

    Attributes:
        folder: The folder.
        identity: A token drawn when the run began, and a digest of its configuration apart from ``epochs``; every file
            holds it, so that no file of another run passes for one of this. Empty as long as no configuration was
            written or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = ""
        self._token = ""
        self._lock: FolderLock | None = None

    @property
    def exists(self) -> bool:
        """Tell whether a run was begun here."""
        return os.path.lexists(self.folder / CONFIG)

    @property
    def has_records(self) -> bool:
        """Tell whether records were written here."""
        return os.path.lexists(self.folder / _RECORDS)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process at work in the folder, which is made if need be; a context manager.

        Raises:
            RunError: Another process is at work in it, or folder or lock cannot be made.
        """
        self._make()
        with FolderLock(self.folder) as lock:
            self._lock = lock
            self._clean()
            try:
                yield
            finally:
                self._lock = None

    def check_lock(self) -> None:
        """Make sure that the folder is still this run's.

        Raises:
            FolderLost: It was deleted, and perhaps made anew by another run.
        """
        if self._lock is not None:
            self._lock.check()

    def refuse_existing(self, *, replaces: bool) -> None:
        """Raise ``RunError`` if there is a run here already that shall not be replaced, or that is at work."""
        if self._lock is None and _files.is_in_use(self.folder):
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
        """Make the folder, and delete the files of an earlier run there, and nothing else.

        Args:
            replaces: Whether an earlier run may be deleted.

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
        """Delete half-written files of killed processes: nobody else writes here while the folder is locked."""
        for path in leftovers(self.folder):
            name = path.name[1:].rpartition(".partial-")[0]
            if name in _FILES or _CHECKPOINT.fullmatch(name):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    @property
    def events(self) -> Path:
        """Folder of the events for TensorBoard."""
        return self.folder / _EVENTS

    def checkpoints(self) -> list[Path]:
        """List the checkpoints, oldest first."""
        steps = {
            int(match[1]): path
            for path in self.folder.glob("checkpoint-*.safetensors")
            if (match := _CHECKPOINT.fullmatch(path.name)) and path.name == checkpoint_name(int(match[1]))
        }
        return [steps[step] for step in sorted(steps)]

    @property
    def saved(self) -> int:
        """Step of the last checkpoint; 0 if there is none."""
        checkpoints = self.checkpoints()
        if not checkpoints:
            return 0
        return int(checkpoints[-1].name.removeprefix("checkpoint-").removesuffix(".safetensors"))

    def write(self, name: str, content: bytes) -> Path:
        """Write one file of the run.

        Args:
            name: Its name in the folder.
            content: The content of the file.

        Returns:
            The file.

        Raises:
            WriteError: It cannot be written, or the folder is no longer this run's.
        """
        self.check_lock()
        path = self.folder / name
        atomic_write(path, content)
        try:
            self.check_lock()
        except FolderLost:  # between check and write: a lone file in a new folder must not claim a finished run
            with suppress(OSError):
                path.unlink()
            raise
        return path

    def write_config(self, config: TrainConfig, provenance: Mapping[str, Any]) -> None:
        """Write configuration and provenance."""
        self._identify(self._token or token_hex(16), config)
        content = {"run": self._token, "config": config.to_json(), "provenance": dict(provenance)}
        self.write(CONFIG, _files.to_json(content))

    def read_config(self) -> tuple[TrainConfig, dict[str, Any]]:
        """Read the configuration and the provenance.

        Raises:
            RunError: This is no run, or its configuration is damaged.
        """
        self.require()
        content = self._read_json(CONFIG)
        kinds = get_type_hints(TrainConfig)
        stored, token, provenance = (content.get(name) for name in ("config", "run", "provenance"))
        if not isinstance(stored, dict) or not isinstance(token, str) or not isinstance(provenance, dict):
            raise self._damaged(CONFIG, "it holds no configuration of this version of falign")
        stored = {**ADDED, "rule_option": [], **stored}  # to_json() leaves them out where they say nothing
        if stored.keys() != kinds.keys():
            raise self._damaged(CONFIG, "it holds no configuration of this version of falign")
        for name, value in stored.items():
            if not _is_of_type(value, kinds[name]):
                raise self._damaged(CONFIG, f"{name} is {_shown(value)}")
        try:
            _files.to_json(provenance)  # a resumed run adds to it and writes it again
        except (ValueError, RecursionError):
            raise self._damaged(CONFIG, "its provenance is not what falign writes") from None
        config = TrainConfig(**{**stored, "rule_option": tuple(stored["rule_option"])})
        self._identify(token, config)
        return config, provenance

    def _identify(self, token: str, config: TrainConfig) -> None:
        self._token, self.identity = token, f"{token}-{_config_digest(config)}"

    def write_status(self, status: str, **details: Any) -> None:
        """Write the status; ``saved`` becomes the step of the last checkpoint."""
        content = {"run": self.identity, "status": status, **details, "saved": self.saved}
        self.write(_STATUS, _files.to_json(content))

    def read_status(self) -> dict[str, Any]:
        """Read the status; it is "unknown" before the first one, and "killed" if the run neither goes on nor has ended.

        Raises:
            RunError: The file is damaged.
        """
        if not os.path.lexists(self.folder / _STATUS):
            return {"status": "unknown"}
        content = self._read_json(_STATUS)
        for name, kind in _STATUS_FIELDS.items():
            if not _is_of_type(content.get(name), kind):
                raise self._damaged(_STATUS, f"{name} is {_shown(content.get(name))}")
        self._check_identity(_STATUS, content["run"])
        if content["status"] == "running" and self._lock is None and not _files.is_in_use(self.folder):
            content["status"] = "killed"
        return content

    def write_tables(self, tables: "Tables") -> None:
        """Write what was measured; the records come last, so that where they are the other tables are, too."""
        from falign.lab._tables import parquet

        named = {_ALIGNMENT: tables.alignment, _NEURONS: tables.neurons, _LAW: tables.law, _RECORDS: tables.records}
        for name, table in named.items():
            if table is not None:
                self.write(name, parquet(table, self.identity))

    def read_records(self) -> "pl.DataFrame":
        """Read the records, oldest first.

        Raises:
            RunError: They are missing, damaged or of another run.
        """
        import polars as pl

        from falign.lab._tables import check_records

        path = self.folder / _RECORDS
        if not os.path.lexists(path):
            raise RunError(f"{self.folder} has no {_RECORDS} yet: train it first")
        try:
            content = read_bounded(path, _TABLE)
            _files.verify_seal(content)
            self._check_identity(_RECORDS, pl.read_parquet_metadata(io.BytesIO(content)).get("run"))
            records = pl.read_parquet(io.BytesIO(content))
            check_records(records)
        except (ValueError, OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise self._damaged(_RECORDS, (str(error).splitlines() or [type(error).__name__])[0]) from None
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
        """Say how to get a file back: all but the configuration are written again from the last checkpoint."""
        if name == CONFIG:
            return "restore it, or begin the run again with --force"
        again = f"falign train --resume {self.folder} writes it again from the last checkpoint"
        return f"delete it, then {again}" if name == _STATUS else again


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Find the runs that paths stand for: run folders, folders that hold some, at any depth, and Parquet files.

    Args:
        paths: The paths.

    Returns:
        Run folders and files, each once, in the order of the paths, those of one folder by their names; and the paths
        that stand for none.

    Raises:
        RunError: None of the paths stands for a run, or one of them does not exist.
    """
    found: dict[Path, None] = {}
    others = []
    for path in paths:
        if not os.path.lexists(path):
            RunFolder(path).require()
        here = [path] if RunFolder(path).exists or path.suffix == ".parquet" else _below(path)
        if not here:
            others.append(path)
        found.update(dict.fromkeys(here))
    if not found:
        RunFolder(others[0]).require()
    return list(found), others


def _below(folder: Path) -> list[Path]:
    """List the run folders below a folder, sorted as a person counts; links are not followed."""
    found = [Path(parent) for parent, _, names in os.walk(folder) if CONFIG in names]
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in _DIGITS.split(str(path))])


def checkpoint_name(step: int) -> str:
    """Return the file name of a checkpoint; its digits sort by step."""
    return f"checkpoint-{step:08d}.safetensors"


def _config_digest(config: TrainConfig) -> str:
    """Compute a digest of a configuration apart from ``epochs``, which --resume may raise."""
    values = {name: value for name, value in config.to_json().items() if name != "epochs"}
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_STATUS_FIELDS: dict[str, Any] = {
    "run": str,
    "status": str,
    "saved": int,
    "step": int | None,
    "epoch": int | None,
    "message": str | None,
    "law": str | None,
}
"""{field: type} of a status, as far as it is read; there may be more."""


def _is_of_type(value: object, kind: Any) -> bool:
    """Tell whether a value from JSON is of a field's type, and can be a number of 64 bits or part of a file name."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_of_type(part, get_args(kind)[0]) for part in value)
    if get_args(kind):
        return any(_is_of_type(value, part) for part in get_args(kind))
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
    """Return a value for a sentence, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in a list in a list
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
