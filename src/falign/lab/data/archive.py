"""Members of a tar or zip archive, read by exact name, within bounds, and never extracted to disk."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from falign.lab.data.content import raw
from falign.lab.data.dataset import DataError

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
"""What the readers of the standard library raise on damaged archives."""

_TAR_MEMBERS = 1000
_TAR_ROOM = 1 << 24
"""Bytes of a tar archive that are not wanted: headers, and what else it holds."""
_TAR_BLOCK = 1 << 16
_TAR_ENDS = 64
"""So often the end of a whole archive may be read again."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive, or the folder that it unpacks to.

    Attributes:
        path: A ``.zip`` or ``.tar.gz`` file, or a folder.
        root: The folder inside the archive that names are relative to.
        seen: The SHA-256 of all that was read: names, lengths, contents.
    """

    path: Path
    root: str
    seen: Any = field(default_factory=sha256, repr=False)  # hashlib's class has no public name

    @property
    def sha256(self) -> str:
        """Checksum of all that was read so far, in its order."""
        return self.seen.hexdigest()

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
        packed = self._from_zip if self.path.suffix == ".zip" else self._from_tar
        for name, content in (self._from_folder if self.path.is_dir() else packed)(names, at_most):
            self.seen.update(f"{name}\0{len(content)}\0".encode())
            self.seen.update(content)
            yield name, content

    def _from_folder(self, names: Sequence[str], at_most: int) -> Iterator[tuple[str, bytes]]:
        for name in names:
            path = self.path / name
            if not path.exists():
                raise self._missing(name)
            with raw(path) as stream:
                content = stream.read(at_most + 1)
            self._bound(name, len(content), at_most)
            yield name, content

    def _from_zip(self, names: Sequence[str], at_most: int) -> Iterator[tuple[str, bytes]]:
        try:
            with raw(self.path) as stream, zipfile.ZipFile(stream) as archive:
                times = Counter(archive.namelist())
                for name in names:
                    full = f"{self.root}/{name}"
                    if not times[full]:
                        raise self._missing(name)
                    self._once(name, times[full])
                    member = archive.getinfo(full)
                    self._bound(name, member.file_size, at_most)
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        # the published ones have no other, and those ask for memory as they like
                        raise NotImplementedError(f"{name} is packed in another way than by deflate")
                    with archive.open(member) as packed:
                        content = packed.read(at_most + 1)  # whatever the directory says; its CRC is verified
                    yield name, content
        except DataError:
            raise
        except _FAULTS as error:
            raise self._damaged(error) from error

    def _from_tar(self, names: Sequence[str], at_most: int) -> Iterator[tuple[str, bytes]]:
        wanted = {f"{self.root}/{name}": name for name in names}
        found = set()
        try:
            # one pass: going back in a compressed archive means unpacking it from the start again
            with (
                raw(self.path) as stream,
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
                    self._once(name, 1 + (name in found))
                    found.add(name)
                    self._bound(name, member.size, at_most)
                    yield name, content.read()
                while bounded.read(_TAR_BLOCK):
                    pass  # to the end, where the CRC is verified
        except DataError:
            raise
        except _FAULTS as error:
            raise self._damaged(error) from error
        for name in names:
            if name not in found:
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
    """A stream that ends with an error where there is more than expected: a small archive can unpack to anything."""

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
        if self._ends > _TAR_ENDS:  # it would go on for hours where a member announces terabytes
            raise tarfile.ReadError("it ends before its members do")
        return block
