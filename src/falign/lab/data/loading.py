"""From a name or a path to a data set: where it is looked for, and when it is downloaded."""

import os
from pathlib import Path

import pooch

from falign.lab.data.dataset import DataError, Dataset
from falign.lab.data.download import fetch
from falign.lab.data.folders import read_image_folder
from falign.lab.data.idx import Idx, find_idx
from falign.lab.data.registry import SOURCES, Source

NAMES: tuple[str, ...] = tuple(SOURCES)
"""The names that :func:`load` knows."""


def load(name: str, *, folder: Path | None = None, download: bool = True, progress: bool = True) -> Dataset:
    """Load a data set by name, or from the path of a folder.

    A named data set is looked for in ``folder``, or else in the folder that the environment variable
    ``FALIGN_DATA`` names, and then in the user's cache; in a folder as ``<folder>/<name>/<files>`` or
    ``<folder>/<files>``. If it is in none of them it is downloaded, always into the cache. Its checksums are
    verified wherever it is found.

    A path is any folder of four IDX files with the standard names, compressed or not, or of images by class
    (see :func:`falign.lab.data.folders.read_image_folder`). A name of the table comes first: write
    ``./mnist`` for a folder called ``mnist``.

    Args:
        name: One of ``NAMES``, or a path.
        folder: Where a named data set is looked for first.
        download: Whether a named data set that is not found may be downloaded.
        progress: Whether to show bars on standard error.

    Returns:
        The data set.

    Raises:
        DataError: If there is no such data set, or it is not found, damaged or inconsistent.
    """
    if name in SOURCES:
        named = folder or os.environ.get("FALIGN_DATA") or None
        given = None if named is None else Path(named).expanduser()
        cache = Path(pooch.os_cache("falign"))
        return load_source(SOURCES[name], given=given, cache=cache, download=download, progress=progress)
    path = Path(name).expanduser()
    if not name or not path.is_dir():
        raise DataError(
            f"'{name}' is neither a known data set nor an existing folder, expected one of "
            f"{', '.join(NAMES)} or a path: check the spelling"
        )
    if files := find_idx(path):
        return Idx().read(path.resolve().name, files)
    return read_image_folder(path, progress=progress)


def load_source(source: Source, *, given: Path | None, cache: Path, download: bool, progress: bool) -> Dataset:
    """Load one data set of the table.

    Args:
        source: The data set.
        given: A folder to look in first, never written to.
        cache: The folder to look in next, and to download into.
        download: Whether it may be downloaded.
        progress: Whether to show bars.

    Returns:
        The data set.

    Raises:
        DataError: If it is not found, damaged or inconsistent.
    """
    if source.files and given is not None and not given.is_dir():
        raise DataError(f"the data folder {given} is not a folder, expected an existing one: correct its path")
    paths = _locate(source, [place for place in (given, cache) if place is not None])
    if paths is not None:
        for file, path in zip(source.files, paths, strict=True):
            file.check(path)
    elif download and all(file.mirrors for file in source.files):
        paths = [fetch(file, cache / source.name, progress=progress) for file in source.files]
    else:
        raise _not_found(source, given, cache)
    verified = all(file.sha256 and path.is_file() for file, path in zip(source.files, paths, strict=True))
    keep = cache / source.name / f"decoded-{source.files[0].sha256}" if source.files and verified else None
    return source.read(source.name, paths, keep=keep, progress=progress)


def _locate(source: Source, places: list[Path]) -> list[Path] | None:
    """The files of a data set in the first place that holds all of them."""
    verifiable = all(file.sha256 for file in source.files)
    for place in places:
        for folder in (place / source.name, place):
            if not verifiable and folder.name != source.name:
                continue  # without a checksum only the folder's name tells one set of IDX files from another
            found = [file.find(folder) for file in source.files]
            paths = [path for path in found if path is not None]
            if len(paths) == len(source.files):
                return paths
    return None


def _not_found(source: Source, given: Path | None, cache: Path) -> DataError:
    places = " and ".join(str(place / source.name) for place in (given, cache) if place is not None)
    files = ", ".join(file.name for file in source.files)
    downloadable = all(file.mirrors for file in source.files)
    remedy = "or allow the download" if downloadable else "as they are never downloaded"
    return DataError(f"{source.name} is not in {places}, expected {files}: put them there, {remedy}")
