"""IDX, the format of MNIST: big-endian sizes, then unsigned bytes."""

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from falign.lab.data._dataset import DataError, Dataset
from falign.lab.data._download import DEFLATED, GZIP_FAULTS, check_memory, is_gzip, open_regular, open_unpacked

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""The four standard names, in the order that :class:`Idx` reads them; each may end in ``.gz``."""

_UNSIGNED_BYTE = 8
_IDX = re.compile(r"idx[13][-.]ubyte")
_EXCESS = 1 << 16
"""Bytes beyond the expected ones that are still counted for the message."""


def spellings(name: str) -> tuple[str, ...]:
    """List the names under which the file with a standard name is looked for, packed or not, in this order.

    Kaggle writes a dot for the hyphen before ``idx``; 7-Zip unpacks ``x.gz`` into a folder ``x``.
    """
    dotted = name.replace("-idx", ".idx")
    files = (f"{name}.gz", name, f"{dotted}.gz", dotted)
    return (*files, *(f"{folder}/{file}" for folder in (name, dotted) for file in files))


@dataclass(frozen=True, kw_only=True)
class Idx:
    """Four IDX files as one data set of grey images.

    Attributes:
        classes: Names of the classes; without them, the numbers from 0 to the largest training label.
    """

    classes: tuple[str, ...] | None = None

    def read(self, name: str, paths: Sequence[Path], *, keep: Path | None = None, progress: bool = False) -> Dataset:
        """Read training images, training labels, test images and test labels.

        Args:
            name: Name of the data set.
            paths: The four files, in the order of ``IDX_NAMES``.
            keep: Not used: there is nothing costly to keep.
            progress: Not used: it takes a second.

        Returns:
            The data set, of one channel.

        Raises:
            DataError: If a file is damaged, or the files do not fit each other.
        """
        parts = list(zip(paths, (3, 1, 3, 1), strict=True))
        check_memory(sum(_needed(*part) for part in parts), f"the set in {paths[0].parent}")
        train_images, train_labels, test_images, test_labels = (read_idx(*part) for part in parts)
        checksum = sha256()
        for part in (train_images, train_labels, test_images, test_labels):
            checksum.update(f"{tuple(part.shape)}".encode())
            checksum.update(part.numpy().data)
        return Dataset(
            name=name,
            train_images=train_images[:, None],
            train_labels=train_labels.long(),
            test_images=test_images[:, None],
            test_labels=test_labels.long(),
            classes=self.classes or tuple(str(label) for label in range(int(train_labels.max()) + 1)),
            sha256=checksum.hexdigest(),
        )


def find_idx(folder: Path) -> list[Path] | None:
    """Look for the four standard files in a folder, compressed or not.

    Args:
        folder: An existing folder.

    Returns:
        The four paths in the order of ``IDX_NAMES``, or None if the folder holds none of them.

    Raises:
        DataError: If it holds some of them only.
    """
    paths = [_first(folder, name) for name in IDX_NAMES]
    missing = [name for name, path in zip(IDX_NAMES, paths, strict=True) if path is None]
    if missing and (other := _nonstandard_names(folder)):
        raise DataError(
            f"{folder} holds {', '.join(other[:4])} and not {', '.join(missing)}, expected the four standard names of "
            "one set: rename them; the images of EMNIST are transposed, and the labels of its letters begin with 1"
        )
    if not any(paths):
        return None
    if missing:
        raise DataError(
            f"{folder} holds some IDX files but not {', '.join(missing)} (with or without .gz), expected all "
            f"of {', '.join(IDX_NAMES)}: add what is missing"
        )
    return [path for path in paths if path is not None]


def _nonstandard_names(folder: Path) -> list[str]:
    """List the names in a folder that are those of IDX files, but not standard."""
    known = {spelling for name in IDX_NAMES for spelling in spellings(name)}
    return sorted(name for name in os.listdir(folder) if _IDX.search(name) and name not in known)


def read_idx(path: Path, dimensions: int) -> UInt8[Tensor, "..."]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file, gzip-compressed or not, whatever its name.
        dimensions: Number of dimensions it must have: 3 for images, 1 for labels.

    Returns:
        The array.

    Raises:
        DataError: If the magic number, the sizes or the length are not those of such a file. So much memory as the
            header announces is taken only if the file can hold it, and there is as much.
    """
    try:
        with open_unpacked(path) as stream:
            sizes = _sizes(path, stream, dimensions)
            expected, (possible, packed) = math.prod(sizes), _possible(path, dimensions)
            if expected > possible or not (packed or expected == possible):  # nothing of it is kept
                raise _length(path, sizes, possible if not packed else len(stream.read(_EXCESS)), packed)
            check_memory(expected, str(path))
            array = np.empty(sizes, np.uint8)
            got = _fill(stream, array)
            more = len(stream.read(_EXCESS))  # at its end the CRC of a gzip file is verified
            if got + more != expected:
                raise _length(path, sizes, got + more, more == _EXCESS)
    except GZIP_FAULTS as error:
        raise DataError(f"{path} is no intact gzip file ({error}), expected one: get the file anew") from error
    return torch.from_numpy(array)


def _first(folder: Path, name: str) -> Path | None:
    paths = (folder / spelling for spelling in spellings(name))
    return next((path for path in paths if path.exists() and not path.is_dir()), None)


def _needed(path: Path, dimensions: int) -> int:
    """Return the bytes of memory that a file needs by its header, labels as int64; 0 for no IDX file, refused later."""
    try:
        with open_unpacked(path) as stream:
            return math.prod(_sizes(path, stream, dimensions)) * (1 if dimensions > 1 else 9)
    except (DataError, *GZIP_FAULTS):
        return 0


def _possible(path: Path, dimensions: int) -> tuple[int, bool]:
    """Return the bytes that a file can hold after its header, at most if it is packed, and whether it is packed."""
    with open_regular(path) as stream:
        size, packed = os.fstat(stream.fileno()).st_size, is_gzip(stream)
    return (size * DEFLATED if packed else size - _header(dimensions)), packed


def _header(dimensions: int) -> int:
    return 4 + 4 * dimensions


def _sizes(path: Path, stream: BufferedIOBase, dimensions: int) -> tuple[int, ...]:
    magic, header = bytes((0, 0, _UNSIGNED_BYTE, dimensions)), _header(dimensions)
    content = stream.read(header)
    if len(content) < header or content[:4] != magic:
        more = "at least " if len(content) == header else ""
        raise DataError(
            f"{path} begins with {content[:4].hex() or 'nothing'} and has {more}{len(content)} bytes, expected the "
            f"magic number {magic.hex()} in a header of {header} bytes: check that it is the right IDX file"
        )
    sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    if 0 in sizes:
        raise DataError(
            f"{path} announces {_by(sizes)} elements, expected none of the sizes to be 0: get the file anew"
        )
    return sizes


def _fill(stream: BufferedIOBase, array: np.ndarray) -> int:
    """Read until an array is full or the stream ends, and return the number of bytes."""
    view, got = array.reshape(-1).data, 0
    while got < len(view) and (count := stream.readinto(view[got : got + _EXCESS])):
        got += count
    return got


def _length(path: Path, sizes: Sequence[int], got: int, at_least: bool) -> DataError:
    return DataError(
        f"{path} has {'at least ' if at_least and got >= _EXCESS else ''}{got} bytes after its header, expected "
        f"{_by(sizes)} = {math.prod(sizes)}: it is truncated or altered, get it anew"
    )


def _by(sizes: Sequence[int]) -> str:
    return " × ".join(str(size) for size in sizes)
