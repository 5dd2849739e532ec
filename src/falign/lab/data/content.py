"""The content of one file: unpacked, summed up in a checksum, written all or not at all."""

import gzip
import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GZIP_FAULTS = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a truncated or altered gzip file raises."""


def opened(path: Path) -> io.BufferedIOBase:
    """Open a file for reading; a lone gzip file (``.gz``, not ``.tar.gz``) is unpacked on the way.

    Args:
        path: The file.

    Returns:
        The stream of its content. Reading a gzip file to its end verifies its CRC.
    """
    lone = path.suffix == ".gz" and not path.name.endswith(".tar.gz")
    return gzip.open(path) if lone else path.open("rb")


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Of a lone gzip file it is that of the unpacked content: packing the same data again gives other bytes, and
    good copies differ in them.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    with opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Write a file so that it appears under its name only when complete.

    Args:
        target: The file to appear; its folder is created if needed.

    Yields:
        The path to write to, in a temporary folder beside the target, removed if the writing fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        partial = Path(scratch) / target.name
        yield partial
        os.replace(partial, target)
