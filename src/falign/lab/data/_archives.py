"""CIFAR and Tiny-ImageNet, read out of tar and zip archives by exact names, within bounds, never extracted to disk.

pooch's processors (``Untar``, ``Unzip``) are not used: they extract to disk whatever an archive holds, without bounds
on sizes or numbers, so that a damaged or hostile archive could fill the disk or write outside of its folder.
"""

import gzip
import io
import math
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from falign.lab._progress import track
from falign.lab.data._cache import cache_images, load_cached_images
from falign.lab.data._dataset import DataError, Dataset
from falign.lab.data._download import check_memory, open_regular
from falign.lab.data._folders import decode

_FAULTS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    struct.error,
    OSError,
    ValueError,  # also of texts: UnicodeError
    OverflowError,
    IndexError,
    NotImplementedError,
    RuntimeError,
)
"""Errors of the standard library's readers on damaged archives."""

_TAR_MEMBERS = 1000
_TAR_ROOM = 1 << 24
"""Bytes of a tar archive beside the members wanted: headers and other members."""
_TAR_BLOCK = 1 << 16
_TAR_ENDS = 64
"""Times that the end of an archive may be read: tarfile reads on where a member announces more than there is."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive, or the folder that it unpacks to.

    Attributes:
        path: A ``.zip`` or ``.tar.gz`` file, or a folder.
        root: The folder inside the archive that names are relative to.
        checksum: SHA-256 of everything that was read: names, lengths, contents.
    """

    path: Path
    root: str
    checksum: Any = field(default_factory=sha256, repr=False)  # hashlib's class has no public name

    @property
    def sha256(self) -> str:
        """Checksum of everything that was read so far, in that order."""
        return self.checksum.hexdigest()

    def members(self, names: Sequence[str], *, at_most: int) -> Iterator[tuple[str, bytes]]:
        """Read files of the archive.

        Args:
            names: The members wanted, separated by ``/``.
            at_most: Bytes that any of them may have; more is refused before it is read.

        Yields:
            Name and content of every member wanted; of a tar archive in its own order, else in the order asked.

        Raises:
            DataError: If the archive is damaged, or a member is missing, there twice, too large or no regular file.
        """
        from_archive = self._from_zip if self.path.suffix == ".zip" else self._from_tar
        for name, content in (self._from_folder if self.path.is_dir() else from_archive)(names, at_most):
            self.checksum.update(f"{name}\0{len(content)}\0".encode())
            self.checksum.update(content)
            yield name, content

    def _from_folder(self, names: Sequence[str], at_most: int) -> Iterator[tuple[str, bytes]]:
        for name in names:
            path = self.path / name
            if not path.exists():
                raise self._missing(name)
            with open_regular(path) as stream:
                content = stream.read(at_most + 1)
            self._bound(name, len(content), at_most)
            yield name, content

    def _from_zip(self, names: Sequence[str], at_most: int) -> Iterator[tuple[str, bytes]]:
        try:
            with open_regular(self.path) as stream, zipfile.ZipFile(stream) as archive:
                times = Counter(archive.namelist())
                for name in names:
                    full = f"{self.root}/{name}"
                    if not times[full]:
                        raise self._missing(name)
                    self._once(name, times[full])
                    member = archive.getinfo(full)
                    self._bound(name, member.file_size, at_most)
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        # LZMA archives say themselves how much memory they take; the published ones are deflated
                        raise NotImplementedError(f"{name} is packed in another way than by deflate")
                    with archive.open(member) as packed:
                        content = packed.read(at_most + 1)  # the directory may lie about the size; the CRC is verified
                    yield name, content
        except DataError:
            raise
        except _FAULTS as error:
            raise self._damaged(error) from error

    def _from_tar(self, names: Sequence[str], at_most: int) -> Iterator[tuple[str, bytes]]:
        wanted = {f"{self.root}/{name}": name for name in names}
        read = set()
        try:
            # One pass: going back in a compressed archive means unpacking it from the start again.
            with (
                open_regular(self.path) as stream,
                gzip.GzipFile(fileobj=stream) as unpacked,
                _Bounded(unpacked, len(names) * at_most + _TAR_ROOM) as bounded,
                tarfile.open(fileobj=bounded, mode="r|") as archive,
            ):
                for number, member in enumerate(archive):
                    if number == _TAR_MEMBERS:
                        raise tarfile.ReadError(f"it has more than {_TAR_MEMBERS} members")
                    content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                    if content is None or member.name not in wanted:
                        continue
                    name = wanted[member.name]
                    self._once(name, 1 + (name in read))
                    read.add(name)
                    self._bound(name, member.size, at_most)
                    yield name, content.read()
                while bounded.read(_TAR_BLOCK):
                    pass  # the CRC stands at the end
        except DataError:
            raise
        except _FAULTS as error:
            raise self._damaged(error) from error
        for name in names:
            if name not in read:
                raise self._missing(name)

    def _once(self, name: str, times: int) -> None:
        if times > 1:
            raise DataError(f"{self.path} has the file {name} more than once, expected it once: get it anew")

    def _bound(self, name: str, size: int, at_most: int) -> None:
        if size > at_most:
            raise DataError(
                f"{self.path}: {name} has more than {at_most:,} bytes, expected fewer in the published data set: get "
                "it anew"
            )

    def _missing(self, name: str) -> DataError:
        return DataError(f"{self.path} has no file {name}, expected the complete published data set: get it anew")

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path} cannot be read as an archive ({error}), expected the published one: get it anew")


class _Bounded(io.RawIOBase):
    """A stream that raises an error where there is more than expected: a small archive can unpack to terabytes."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        super().__init__()
        self._stream = stream
        self._limit = self._left = limit
        self._ends = 0

    def read(self, size: int = -1, /) -> bytes:
        block = self._stream.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {self._limit:,} bytes")
        self._ends += not block
        if self._ends > _TAR_ENDS:  # tarfile would go on for hours where a member announces terabytes
            raise tarfile.ReadError("it ends before its members do")
        return block


# CIFAR-10 and CIFAR-100 in their binary format: records of label bytes, then 3 × 32 × 32 pixel bytes.

_SHAPE = (3, 32, 32)
_EXCESS = 1 << 20
"""Bytes beyond the expected ones that are still counted for the message; more are refused unread."""


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
        at_most = max(self.train_records, self.test_records) * self._record + _EXCESS
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


# Tiny-ImageNet: 200 classes of 64 × 64 JPEGs, decoded once and kept.

_ROOT = "tiny-imagenet-200"
_LIST, _JPEG = 1 << 24, 1 << 20
"""Bytes that a list and an image may have."""


@dataclass(frozen=True, kw_only=True)
class TinyImageNet:
    """The layout of ``tiny-imagenet-200.zip``; its ``val`` is the test set, as its ``test`` has no labels.

    The label of a class is its place in ``wnids.txt``, its name the first of its words in ``words.txt``. Grey
    JPEGs become three equal channels.

    Attributes:
        classes: Number of classes.
        train_per_class: Training images of each.
        tests: Number of test images.
        side: Height and width of every image.
    """

    classes: int = 200
    train_per_class: int = 500
    tests: int = 10_000
    side: int = 64

    def read(self, name: str, paths: Sequence[Path], *, keep: Path | None = None, progress: bool = False) -> Dataset:
        """Read the archive, or the folder it unpacks to.

        Args:
            name: Name of the data set.
            paths: One path, of the archive or the folder.
            keep: Folder where the decoded images are kept for the next time; None to decode every time.
            progress: Whether to show a bar while decoding.

        Returns:
            The data set, of shape 3 × 64 × 64; kept images are mapped from the disk, once for all processes.

        Raises:
            DataError: If a file is damaged or missing, or the lists do not fit each other.
        """
        (path,) = paths
        archive = Archive(path=path, root=_ROOT)
        lists = ("wnids.txt", "words.txt", "val/val_annotations.txt")
        text = {file: content.decode(errors="replace") for file, content in archive.members(lists, at_most=_LIST)}
        wnids: list[str] = re.findall(r"^n[0-9]{8}$", text["wnids.txt"], re.MULTILINE)
        labels = {wnid: label for label, wnid in enumerate(wnids)}
        if not len(labels) == len(wnids) == self.classes:
            raise DataError(
                f"{path}: wnids.txt names {len(labels)} different classes, expected {self.classes}: "
                "get the data set anew"
            )
        words, annotated = _columns(text["words.txt"]), _columns(text["val/val_annotations.txt"])
        tests = [f"val_{k}.JPEG" for k in range(self.tests)]
        for test in tests:
            if annotated.get(test) not in labels:
                raise DataError(
                    f"{path}: val_annotations.txt gives {test} the class {annotated.get(test)}, expected one "
                    "of wnids.txt: get the data set anew"
                )
        train = [f"train/{wnid}/images/{wnid}_{k}.JPEG" for wnid in labels for k in range(self.train_per_class)]
        notes = []
        images = {
            kept: self._images(archive, names, keep and keep / kept, notes, progress)
            for kept, names in (("train.npy", train), ("val.npy", [f"val/images/{test}" for test in tests]))
        }
        return Dataset(
            name=name,
            train_images=images["train.npy"],
            train_labels=torch.arange(self.classes).repeat_interleave(self.train_per_class),
            test_images=images["val.npy"],
            test_labels=torch.tensor([labels[annotated[test]] for test in tests]),
            classes=tuple(words.get(wnid, wnid).partition(",")[0] for wnid in labels),
            sha256=archive.sha256,
            notes=tuple(notes),
        )

    def _images(
        self, archive: Archive, names: Sequence[str], kept: Path | None, notes: list[str], progress: bool
    ) -> UInt8[Tensor, "n 3 side side"]:
        shape = (len(names), 3, self.side, self.side)
        if kept is not None:
            if (before := load_cached_images(kept, shape)) is not None:
                return torch.from_numpy(before)
            if kept.exists():
                notes.append(f"{kept} was damaged: its images were decoded again")
        check_memory(math.prod(shape), f"the set in {archive.path}")
        images = np.empty(shape, np.uint8)
        members = archive.members(names, at_most=_JPEG)
        shown = track(members, f"decoding {archive.path.name}", total=len(names), shown=progress)
        for row, (name, content) in zip(images, shown, strict=True):
            row[...] = decode(BytesIO(content), name=f"{archive.path}: {name}", size=(self.side, self.side), grey=False)
        if kept is not None:
            cache_images(images, kept)
        return torch.from_numpy(images)


def _columns(text: str) -> dict[str, str]:
    """Return {first column: second column} of a table whose columns tabs separate."""
    rows = (line.split("\t") for line in text.splitlines())
    return {row[0]: row[1] for row in rows if len(row) > 1}
