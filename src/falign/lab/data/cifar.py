"""CIFAR-10 and CIFAR-100 in their binary format: records of label bytes, then 3 × 32 × 32 pixel bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from falign.lab.data.archive import Archive
from falign.lab.data.dataset import DataError, Dataset

_SHAPE = (3, 32, 32)
_ROOM = 1 << 20
"""So many bytes too many are counted, and said; more are refused unread."""


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """The layout of a CIFAR archive.

    Attributes:
        root: Folder inside the archive.
        train: Files of training records, in order.
        test: File of test records.
        train_records: Records in each training file.
        test_records: Records in the test file.
        label_bytes: Label bytes before the pixels of a record; the last one is the label, in CIFAR-100 the
            fine one.
        class_file: Text file of the class names, one a line.
        classes: Number of classes.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """

    root: str
    train: tuple[str, ...]
    test: str
    train_records: int
    test_records: int
    label_bytes: int
    class_file: str
    classes: int

    def read(self, name: str, paths: Sequence[Path], *, keep: Path | None = None, progress: bool = False) -> Dataset:
        """Read the archive, or the folder it unpacks to.

        Args:
            name: Name of the data set.
            paths: One path, of the archive or the folder.
            keep: Not used: there is nothing costly to keep.
            progress: Not used: it takes a few seconds.

        Returns:
            The data set, of shape 3 × 32 × 32.

        Raises:
            DataError: If the archive is damaged, incomplete or of other sizes.
        """
        (path,) = paths
        archive = Archive(path=path, root=self.root)
        at_most = max(self.train_records, self.test_records) * self._record + _ROOM
        content = dict(archive.members((*self.train, self.test, self.class_file), at_most=at_most))
        parts = [self._records(path, file, content.pop(file), self.train_records) for file in self.train]
        test_images, test_labels = self._records(path, self.test, content[self.test], self.test_records)
        return Dataset(
            name=name,
            train_images=torch.cat([images for images, _ in parts]),
            train_labels=torch.cat([labels for _, labels in parts]),
            test_images=test_images,
            test_labels=test_labels,
            classes=self._class_names(path, content[self.class_file]),
            sha256=archive.sha256,
        )

    @property
    def _record(self) -> int:
        """Bytes of a record."""
        return self.label_bytes + int(np.prod(_SHAPE))

    def _records(
        self, path: Path, file: str, content: bytes, count: int
    ) -> tuple[UInt8[Tensor, "n 3 32 32"], Int64[Tensor, " n"]]:
        size = self._record
        if len(content) != count * size:
            raise DataError(
                f"{path}: {file} has {len(content)} bytes, expected {count} records of {size} bytes, in all "
                f"{count * size}: it is truncated or altered, get it anew"
            )
        records = np.frombuffer(content, np.uint8).reshape(count, size)
        images = records[:, self.label_bytes :].reshape(count, *_SHAPE).copy()
        return torch.from_numpy(images), torch.from_numpy(records[:, self.label_bytes - 1].astype(np.int64))

    def _class_names(self, path: Path, content: bytes) -> tuple[str, ...]:
        names = tuple(content.decode(errors="replace").split())
        if len(names) != self.classes:
            raise DataError(
                f"{path}: {self.class_file} names {len(names)} classes, expected {self.classes}: get the data set anew"
            )
        return names


CIFAR10 = Cifar(
    root="cifar-10-batches-bin",
    train=tuple(f"data_batch_{batch}.bin" for batch in range(1, 6)),
    test="test_batch.bin",
    train_records=10_000,
    test_records=10_000,
    label_bytes=1,
    class_file="batches.meta.txt",
    classes=10,
)

CIFAR100 = Cifar(
    root="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    train_records=50_000,
    test_records=10_000,
    label_bytes=2,
    class_file="fine_label_names.txt",
    classes=100,
)
