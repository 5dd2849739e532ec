"""IDX, the format of MNIST: big-endian sizes, then unsigned bytes."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from falign.lab.data.content import GZIP_FAULTS, opened
from falign.lab.data.dataset import DataError, Dataset

IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
"""The four standard names, in the order that :class:`Idx` reads them; each may end in ``.gz``."""

_UNSIGNED_BYTE = 8


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
        train_images, train_labels, test_images, test_labels = (
            read_idx(path, dimensions) for path, dimensions in zip(paths, (3, 1, 3, 1), strict=True)
        )
        return Dataset(
            name=name,
            train_images=train_images[:, None],
            train_labels=train_labels.long(),
            test_images=test_images[:, None],
            test_labels=test_labels.long(),
            classes=self.classes or tuple(str(label) for label in range(int(train_labels.max()) + 1)),
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
    found = [
        next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None) for name in IDX_NAMES
    ]
    if not any(found):
        return None
    missing = [name for name, path in zip(IDX_NAMES, found, strict=True) if path is None]
    if missing:
        raise DataError(
            f"{folder} holds some IDX files but not {', '.join(missing)} (with or without .gz), expected all "
            f"of {', '.join(IDX_NAMES)}: add what is missing"
        )
    return [path for path in found if path is not None]


def read_idx(path: Path, dimensions: int) -> UInt8[Tensor, "..."]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file, gzip-compressed if its name ends in ``.gz``.
        dimensions: Number of dimensions it must have: 3 for images, 1 for labels.

    Returns:
        The array.

    Raises:
        DataError: If the magic number, the sizes or the length are not those of such a file.
    """
    try:
        with opened(path) as stream:
            content = stream.read()
    except GZIP_FAULTS as error:
        raise DataError(f"{path} is no intact gzip file ({error}), expected one: get the file anew") from error
    magic, header = bytes((0, 0, _UNSIGNED_BYTE, dimensions)), 4 + 4 * dimensions
    if len(content) < header or content[:4] != magic:
        raise DataError(
            f"{path} begins with {content[:4].hex() or 'nothing'} and has {len(content)} bytes, expected the "
            f"magic number {magic.hex()} in a header of {header} bytes: check that it is the right IDX file"
        )
    sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    if 0 in sizes:
        raise DataError(
            f"{path} announces {_by(sizes)} elements, expected none of the sizes to be 0: get the file anew"
        )
    if len(content) - header != math.prod(sizes):
        raise DataError(
            f"{path} has {len(content) - header} bytes after its header, expected {_by(sizes)} = "
            f"{math.prod(sizes)}: it is truncated or altered, get it anew"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())


def _by(sizes: Sequence[int]) -> str:
    return " × ".join(str(size) for size in sizes)
