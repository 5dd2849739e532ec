"""The marker of a store, ``OUT/falign.json``: what makes a folder one, and of which format it is."""

import os
from pathlib import Path

from falign.lab.experiment.entries import FORMAT
from falign.lab.reading import Unreadable, read
from falign.lab.seal import Unsealed, from_json, to_json
from falign.lab.writing import RunError, leftovers, write

NAME = "falign.json"
MOST = 2**26
"""Bytes of a marker, or of a list of runs: a file that is larger is something else."""


def version(folder: Path) -> int:
    """The format of a store; 0 if there is none yet. Nothing is written.

    Args:
        folder: The store's folder, there or not.

    Raises:
        RunError: The folder is not a store and cannot become one, or is one of a newer falign.
    """
    marker = folder / NAME
    try:
        if os.path.lexists(marker):
            return _read(marker)
        if folder.exists() and not _empty(folder):
            # Another process may have made the store since: its marker is there before anything else is.
            if os.path.lexists(marker):
                return _read(marker)
            raise RunError(
                f"{folder} is an output folder that is not ours, it has no {NAME}: "
                "give a new or an empty folder with --out"
            )
    except OSError as error:
        raise _unusable(folder, error) from None
    return 0


def make(folder: Path) -> None:
    """Make a folder a store of the format that is written now.

    Args:
        folder: Its folder; made if there is none.

    Raises:
        RunError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None
    write(folder / NAME, to_json({"format": FORMAT}))


def there(folder: Path) -> bool:
    """Whether a folder has a marker, be it a damaged one: without it a store was deleted, and is no longer ours."""
    return os.path.lexists(folder / NAME)


def _empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or just the marker that another process is writing."""
    return folder.is_dir() and all(path.name == NAME or path in leftovers(folder) for path in folder.iterdir())


def _read(marker: Path) -> int:
    try:
        found = from_json(read(marker, MOST)).get("format")
    except (Unsealed, Unreadable) as error:
        raise _unreadable(marker, str(error)) from None
    if type(found) is not int or found < 1:
        raise _unreadable(marker, "it tells no format")
    if found > FORMAT:
        raise RunError(
            f"{marker.parent} was written by a newer falign (format {found}, this one knows {FORMAT}): "
            "update falign, or give another folder with --out"
        )
    return found


def _unreadable(marker: Path, why: str) -> RunError:
    return RunError(f"{marker} cannot be read ({why}): restore it, or give another folder with --out")


def _unusable(folder: Path, error: OSError) -> RunError:
    return RunError(f"cannot use {folder}: {error.strerror or error}; give another folder with --out")
