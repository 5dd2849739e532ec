"""What is kept in the cache between runs: decoded images, and how unpublished files were when they were first read."""

import math
import os
import warnings
from hashlib import sha256
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from falign.lab._files import Unsealed, WriteError, atomic_write, from_json, to_json
from falign.lab.data._dataset import DataError
from falign.lab.data._download import atomic, exclusive, open_regular, system_reason

_DIGITS = 64
_HEADER = 4096
"""Bytes before an array in NumPy's format, at most."""
_CHUNK = 1 << 20
_RECORD = 1 << 16
"""No record is larger."""


def load_cached_images(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Decoded images, mapped from the disk, once for all processes; not a bit of them can have changed unseen.

    Args:
        path: What :func:`keep_images` wrote.
        shape: Of the images.

    Returns:
        The images, uint8; what is written to them stays in memory. None if there are none or they are damaged.
    """
    if not path.is_file():
        return None
    try:
        with open_regular(path) as stream:
            content = os.fstat(stream.fileno()).st_size - _DIGITS
            header = content - math.prod(shape)
            if not 0 < header <= _HEADER or _checksum(path, stream, content) != stream.read(_DIGITS):
                return None
            # what is mapped is the file that was verified: it is replaced as a whole, never written to
        images = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": writes stay in memory
    except (ValueError, EOFError, OSError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def cache_images(images: np.ndarray, path: Path) -> None:
    """Keep decoded images: an array in NumPy's format, and behind it a checksum that also holds for its path.

    A full or read-only disk costs a warning, not the images.
    """
    try:
        with exclusive(path.parent), atomic(path) as partial:
            np.save(partial, images, allow_pickle=False)
            with partial.open("r+b") as stream:
                stream.write(_checksum(path, stream, os.fstat(stream.fileno()).st_size))
    except OSError as error:
        warnings.warn(
            f"the decoded images cannot be kept in {path.parent} ({system_reason(error)}): they are decoded every time",
            stacklevel=2,
        )


def check_unchanged(paths: tuple[Path, ...], digest: str, folder: Path) -> str | None:
    """Compare what nobody publishes a checksum of with what it was when it was first read here.

    Args:
        paths: What was read.
        digest: Its checksum.
        folder: Where the checksum of the first time is kept.

    Returns:
        What the user should know, if later changes cannot be noticed.

    Raises:
        DataError: It is not as it was.
    """
    places = [str(path.resolve()) for path in paths]
    record = folder / f"first-{sha256(os.fsencode(os.pathsep.join(places))).hexdigest()[:16]}.json"
    said = None
    if record.exists():
        try:
            with open_regular(record) as stream:
                first = from_json(stream.read(_RECORD)).get("sha256")
        except (Unsealed, DataError) as error:
            said = f"{record} was damaged ({error}) and is written anew: nobody knows whether {places[0]} is as before"
        else:
            if first == digest:
                return None
            raise DataError(
                f"{' and '.join(places)} has SHA-256 {digest}, expected {first} as when it was first read: it is "
                f"damaged, so get it anew; if you changed it, remove {record}"
            )
    try:
        with exclusive(folder):
            atomic_write(record, to_json({"paths": places, "sha256": digest}))
    except (OSError, WriteError) as error:
        return (
            f"later damage to {places[0]} cannot be noticed, as its checksum cannot be kept in {folder} "
            f"({system_reason(error)})"
        )
    return said


def _checksum(path: Path, stream: BufferedIOBase, size: int) -> bytes:
    """Of so many bytes, and of where they belong: neither another archive's images nor the test set's do instead."""
    found = sha256(f"{path.parent.name}/{path.name}\0".encode())
    while size > 0 and (block := stream.read(min(size, _CHUNK))):
        found.update(block)
        size -= len(block)
    return found.hexdigest().encode()
