"""Loading of a data set by name or path: the folders in which it is looked for, the download, the checks; of texts."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pooch
import torch

from falign.lab._files import TooLarge, Unreadable, read_bounded
from falign.lab._memory import available
from falign.lab._streams import suggestion
from falign.lab.config import TEXTS, is_text
from falign.lab.data._cache import check_unchanged
from falign.lab.data._dataset import DataError, Dataset, Text, remarks
from falign.lab.data._download import fetch, system_reason
from falign.lab.data._folders import read_image_folder
from falign.lab.data._idx import Idx, find_idx
from falign.lab.data._registry import SOURCES, Source

NAMES: tuple[str, ...] = tuple(SOURCES)
"""The names that :func:`load` knows."""


def load(name: str, *, folder: Path | None = None, download: bool = True, progress: bool = True) -> Dataset:
    """Load a data set by name, or from the path of a folder.

    A named data set is looked for in ``folder``, or else in the folder that the environment variable
    ``FALIGN_DATA`` names, and then in the user's cache; in a folder as ``<folder>/<name>/<files>`` or
    ``<folder>/<files>``. If it is in none of them it is downloaded, always into the cache. Published archives and
    files are verified by their checksums wherever they are found. Nobody publishes checksums of the folders that
    the archives of CIFAR and Tiny-ImageNet unpack to, nor of ``mnist-10k``: the first time they are read their
    checksum is kept in the cache, and later differences are refused.

    A path is any folder of four IDX files with the standard names (or as Kaggle and 7-Zip write them), compressed
    or not, or of images by class (see :func:`falign.lab.data._folders.read_image_folder`). A name of the table
    comes first: write ``./mnist`` for a folder called ``mnist``. What is odd about such data, though no reason to
    refuse them, is in the notes of the data set.

    So much memory is needed: twice the decoded images, and 256 MiB. More is refused before it is taken.

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
    with _system_errors(name):
        if name in SOURCES:
            given, cache = _places(folder)
            return load_source(SOURCES[name], given=given, cache=cache, download=download, progress=progress)
        if is_text(name):
            raise DataError(f"'{name}' is a text, expected images: load it by load_text")
        path = _expanded(name)
        if not name or not path.is_dir():
            raise DataError(
                f"'{name}' is neither a known data set nor an existing folder, expected one of "
                f"{', '.join((*NAMES, *TEXTS))}, a path, of a file as text:FILE, or package.module:factory"
                f"{suggestion(name, (*NAMES, *TEXTS))}: check the spelling"
            )
        if hint := _misplaced(path):
            raise DataError(hint)
        files = find_idx(path)
        dataset = Idx().read(path.resolve().name, files) if files else read_image_folder(path, progress=progress)
        return replace(dataset, notes=(*dataset.notes, *remarks(dataset)))


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
    with _system_errors(source.name):
        if source.files and given is not None and not given.is_dir():
            raise DataError(f"the data folder {given} is not a folder, expected an existing one: correct its path")
        paths = _locate(source, [place for place in (given, cache) if place is not None])
        if paths is not None:
            for file, path in zip(source.files, paths, strict=True):
                file.check(path)
        else:
            try:
                if not (download and _downloadable(source)):
                    raise _not_found(source, given, cache)
                paths = [fetch(file, cache / source.name, progress=progress) for file in source.files]
            except DataError as error:
                hints = [_pickled(source, folder) for folder in (given, given / source.name)] if given else []
                raise DataError("; ".join([str(error), *filter(None, hints)])) from error
        verified = all(file.sha256 and not path.is_dir() for file, path in zip(source.files, paths, strict=True))
        keep = cache / source.name / f"decoded-{source.files[0].sha256}" if source.files and verified else None
        data = source.read(source.name, paths, keep=keep, progress=progress)
        if verified or data.sha256 is None:
            return data
        note = check_unchanged(tuple(paths), data.sha256, cache / source.name)
        return replace(data, notes=(*data.notes, note)) if note else data


@dataclass(frozen=True, kw_only=True)
class Location:
    """Place of a data set of the table on this machine.

    Attributes:
        name: Its name.
        paths: Its files, or the folder that they unpack to; none if it is not here.
        bytes: Size on the disk; if it is not here, size of the download.
        remedy: How to get it, if it is not here; empty if it is.
    """

    name: str
    paths: tuple[Path, ...]
    bytes: int
    remedy: str


def locate(name: str, folder: Path | None = None) -> Location:
    """Look for a data set where :func:`load` would, and verify nothing.

    Args:
        name: One of ``NAMES``, or of the texts.
        folder: Where it is looked for first; None is what ``FALIGN_DATA`` names.

    Returns:
        Its place, or how to get it. Folders that cannot be read count as empty.
    """
    if name in TEXTS:
        return _in_python(name)
    source, (given, cache) = SOURCES[name], _places(folder)
    if not source.files:
        return _in_scikit_learn(name)
    paths: list[Path] | None = None
    for place in (given, cache):
        try:
            paths = paths or (_locate(source, [place]) if place is not None else None)
        except OSError:
            continue
    if paths is not None:
        return Location(name=name, paths=tuple(paths), bytes=sum(map(_size, paths)), remedy="")
    total = sum(file.size for file in source.files)
    files = ", ".join(file.name for file in source.files)
    if _downloadable(source):
        remedy = f"downloads {total / 1e6:.0f} MB to {cache / name} on first use, or put there: {files}"
    else:
        total, remedy = 0, f"never downloaded; put these files into {(given or cache) / name}: {files}"
    return Location(name=name, paths=(), bytes=total, remedy=remedy)


def _in_scikit_learn(name: str) -> Location:
    package = find_spec("sklearn")
    for root in package.submodule_search_locations or () if package else ():
        path = Path(root) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return Location(name=name, paths=(path,), bytes=path.stat().st_size, remedy="")
    return Location(name=name, paths=(), bytes=0, remedy="part of scikit-learn: pip install scikit-learn")


def _in_python(name: str) -> Location:
    package = find_spec("pydoc_data")
    for root in package.submodule_search_locations or () if package else ():
        path = Path(root) / "topics.py"
        if path.is_file():
            return Location(name=name, paths=(path,), bytes=path.stat().st_size, remedy="")
    return Location(name=name, paths=(), bytes=0, remedy="part of Python's standard library: install all of it")


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; files that cannot be read do not count."""
    files = (Path(root, name) for root, _, names in os.walk(path) for name in names) if path.is_dir() else (path,)
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _places(folder: Path | None) -> tuple[Path | None, Path]:
    """Return the user's folder of data sets, if any, and the cache."""
    named = folder or os.environ.get("FALIGN_DATA") or None
    return None if named is None else _expanded(named), Path(pooch.os_cache("falign"))


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise DataError(
            f"{path} is no path ({error}), expected one of an existing user's home: write it out"
        ) from error


@contextmanager
def _system_errors(what: str) -> Iterator[None]:
    """Turn errors of the system while a data set is looked for and read into a ``DataError``."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or what} cannot be read ({system_reason(error)}), expected files and folders that are "
            "there and yours to read: check the path and its permissions"
        ) from error
    except MemoryError as error:
        raise DataError(f"{what} does not fit into the memory: take a smaller set, or a machine with more") from error


def _downloadable(source: Source) -> bool:
    return all(file.mirrors for file in source.files)


def _locate(source: Source, places: list[Path]) -> list[Path] | None:
    """Return the files of a data set in the first place that holds all of them."""
    verifiable = all(file.sha256 for file in source.files)
    for place in places:
        for folder in (place / source.name, place):
            if not verifiable and folder.name != source.name:
                continue  # without a checksum only the folder's name tells one set of IDX files from another
            paths = [path for file in source.files if (path := file.find(folder)) is not None]
            if len(paths) == len(source.files):
                return paths
    return None


def _not_found(source: Source, given: Path | None, cache: Path) -> DataError:
    places = [str(place / source.name) for place in (given, cache) if place is not None]
    files = ", ".join(file.name for file in source.files)
    remedy = "or allow the download" if _downloadable(source) else "as they are never downloaded"
    return DataError(f"{source.name} is not in {' and '.join(places)}, expected {files}: put them there, {remedy}")


def _misplaced(folder: Path) -> str | None:
    """Describe the folder of a data set of the table that was given by its path; None for other folders."""
    for source in SOURCES.values():
        if not source.marks:
            continue
        (file,) = source.files
        if all((folder / mark).exists() for mark in source.marks):
            renamed = "" if folder.resolve().name == file.unpacked else f", called {file.unpacked}"
            return (
                f"{folder} is what {file.name} unpacks to, expected images by class: load it by the name "
                f"{source.name}, from the folder that it is in{renamed} (--data {folder.resolve().parent})"
            )
        for name in (file.name, file.unpacked):
            if (folder / name).exists():
                return (
                    f"{folder} holds {name}, expected images by class: load it by the name {source.name}, from this "
                    f"folder (--data {folder})"
                )
        if hint := _pickled(source, folder):
            return hint
    return None


def _pickled(source: Source, folder: Path) -> str | None:
    if folder.name in source.pickled:
        folder = folder.parent
    for name in source.pickled:
        if (folder / name).exists():
            return (
                f"{folder / name} holds {source.name} as Python pickles, which can run any code and are never read: "
                f"get {source.files[0].name}"
            )
    return None


# Texts.

_ROOM = 16
"""Bytes that reading takes for every byte of a file, at most."""
_SEPARATOR = "\n\n\n"
"""What stands between two topics of Python's reference."""
_SHARE = 10
"""One part in so many is for validation, and as much for the test."""


def load_text(name: str) -> Text:
    """Load a text by name, or from a file.

    ``pydoc`` is what Python's ``help()`` shows of the language: the chapters of the language reference that every
    Python brings along (``pydoc_data.topics``), in the order of their names, some 450,000 characters. It differs
    between versions of Python.

    Args:
        name: ``pydoc``, or ``text:FILE``, the path of a file in UTF-8. A mark at its beginning (U+FEFF) is dropped.

    Returns:
        The text.

    Raises:
        DataError: There is no such text, or it is empty, too large, not UTF-8, or of one character only.
    """
    if not is_text(name):
        raise DataError(f"'{name}' is no text, expected {', '.join(TEXTS)} or text:FILE: check the spelling")
    if name in TEXTS:
        return _encoded(name, text := _python_reference(), text.encode())
    path = Path(name.removeprefix("text:"))
    try:
        path = path.expanduser()
        content = read_bounded(path, available() // _ROOM)
    except TooLarge as error:
        raise DataError(f"{path} cannot be read ({error}, by the memory that there is): use a part of it") from None
    except (Unreadable, RuntimeError, ValueError) as error:  # no path at all, or the home of a user who is none
        raise DataError(f"{path} cannot be read ({error}), expected a text file in UTF-8: check the path") from None
    try:
        return _encoded(path.name, content.decode("utf-8-sig"), content)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no text in UTF-8 (byte {error.start:,} is 0x{content[error.start]:02x}): convert it, by iconv"
        ) from None


def _python_reference() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "pydoc is not part of this Python (its module pydoc_data.topics is missing), expected that of the standard "
            "library: install all of Python, or use text:FILE"
        ) from None
    return _SEPARATOR.join(topics[name].strip("\n") for name in sorted(topics))


def _encoded(name: str, text: str, content: bytes) -> Text:
    vocabulary = "".join(sorted(set(text)))
    if len(vocabulary) < 2:
        what = f"of the one character {vocabulary!r}" if text else "empty"
        raise DataError(f"{name} is {what}, expected a text to learn from: use another one")
    kind = np.uint8 if len(vocabulary) <= 256 else np.int32
    known, codes = (np.frombuffer(each.encode("utf-32-le"), dtype=np.uint32) for each in (vocabulary, text))
    places = np.empty(len(codes), dtype=kind)
    piece = 1 << 20
    for start in range(0, len(codes), piece):  # at once, it would take 8 bytes for each
        places[start : start + piece] = np.searchsorted(known, codes[start : start + piece])
    share = len(text) // _SHARE
    train, validation, test = torch.from_numpy(places).split([len(text) - 2 * share, share, share])
    unseen = len(vocabulary) - len(train.unique())
    note = f"{name}: {unseen} of its {len(vocabulary)} characters are not in its training part"
    return Text(
        name=name,
        vocabulary=vocabulary,
        train=train,
        validation=validation,
        test=test,
        sha256=hashlib.sha256(content).hexdigest(),
        notes=(note,) if unseen else (),
    )
