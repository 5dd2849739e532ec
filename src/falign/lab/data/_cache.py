"""Cache of data between runs: decoded images, and checksums of files that nobody publishes a checksum of."""

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
"""Bound on the size of a record of a checksum."""


def load_cached_images(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Map decoded images from the disk, once for all processes; a change of any bit is noticed.

    Args:
        path: A file that :func:`cache_images` wrote.
        shape: Shape of the images.

    Returns:
        The images, uint8; writing to them changes the memory only. None if there are none or they are damaged.
    """
    if not path.is_file():
        return None
    try:
        with open_regular(path) as stream:
            content = os.fstat(stream.fileno()).st_size - _DIGITS
            header = content - math.prod(shape)
            if not 0 < header <= _HEADER or _checksum(path, stream, content) != stream.read(_DIGITS):
                return None
            # The file that was verified is the one that is mapped: it is replaced as a whole, never written to.
        images = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": writes stay in memory
    except (ValueError, EOFError, OSError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def cache_images(images: np.ndarray, path: Path) -> None:
    """Write decoded images: an array in NumPy's format, followed by a checksum of the array and of its path.

    On a full or read-only disk a warning is given, and the images are decoded again the next time.
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
    """Compare files that nobody publishes a checksum of with what they were when they were first read here.

    Args:
        paths: The files.
        digest: Their checksum.
        folder: Folder of the checksum of the first time; it is written if there is none.

    Returns:
        A sentence for the user if later changes cannot be noticed, else None.

    Raises:
        DataError: They have changed.
    """
    resolved = [str(path.resolve()) for path in paths]
    record = folder / f"first-{sha256(os.fsencode(os.pathsep.join(resolved))).hexdigest()[:16]}.json"
    note = None
    if record.exists():
        try:
            with open_regular(record) as stream:
                first = from_json(stream.read(_RECORD)).get("sha256")
        except (Unsealed, DataError) as error:
            note = (
                f"{record} was damaged ({error}) and is written anew: nobody knows whether {resolved[0]} is as before"
            )
        else:
            if first == digest:
                return None
            raise DataError(
                f"{' and '.join(resolved)} has SHA-256 {digest}, expected {first} as when it was first read: it is "
                f"damaged, so get it anew; if you changed it, remove {record}"
            )
    try:
        with exclusive(folder):
            atomic_write(record, to_json({"paths": resolved, "sha256": digest}))
    except (OSError, WriteError) as error:
        return (
            f"later damage to {resolved[0]} cannot be noticed, as its checksum cannot be kept in {folder} "
            f"({system_reason(error)})"
        )
    return note


def _checksum(path: Path, stream: BufferedIOBase, size: int) -> bytes:
    """Compute the checksum of ``size`` bytes and of the path, so that no other set's images pass for these."""
    checksum = sha256(f"{path.parent.name}/{path.name}\0".encode())
    while size > 0 and (block := stream.read(min(size, _CHUNK))):
        checksum.update(block)
        size -= len(block)
    return checksum.hexdigest().encode()
