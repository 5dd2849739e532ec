"""A checksum inside the very file that it is of: not a bit of a sealed file can change unseen.

The file holds the mark ``falign-sha256:`` and 64 digits, somewhere its format has room for a text: in the metadata of
a Parquet or safetensors file, in a field of a JSON object. The digits are the SHA-256 of the file with zeros in their
place. So one scheme serves all formats, and a checksum cannot be parted from what it vouches for.
"""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from io import BufferedIOBase
from typing import Any

_MARK, _DIGITS = b"falign-sha256:", 64
BLANK = _MARK.decode() + "0" * _DIGITS
"""What a file holds where ``sealed`` puts its checksum."""
_FIELD = "checksum"
"""Of a JSON object: where its checksum stands."""
_TRIED = 16
"""So many marks of a file are tried: what it holds may contain some, and a hostile file a million."""
_PART = 2**20
"""Bytes of a large file that are read at once."""


class Unsealed(ValueError):  # noqa: N818  # an answer of the reader, who names the file
    """Content whose checksum is wrong or missing: which of the two."""


def sealed(content: bytes) -> bytes:
    """Put the checksum of a file into it.

    Args:
        content: The file, with ``BLANK`` where the checksum belongs; of several the first counts.

    Returns:
        The same, of the same length, with its checksum.

    Raises:
        ValueError: There is no ``BLANK``.
    """
    at = content.find(BLANK.encode())
    if at < 0:
        raise ValueError(f"the content has no place for its checksum: it needs {BLANK!r}")
    at += len(_MARK)
    return b"".join((content[:at], sha256(content).hexdigest().encode(), content[at + _DIGITS :]))


def seal(stream: BufferedIOBase, at: int) -> None:
    """Put the checksum of a file into it that is too large to be held.

    Args:
        stream: The file, open for reading and writing.
        at: Where the digits of its ``BLANK`` begin.
    """
    digest, _ = _digest(stream, at)
    stream.seek(at)
    stream.write(digest.encode())


def last(content: bytes) -> int:
    """Where the digits after the last mark of a file begin, for formats that end with it; -1 if there is none."""
    at = content.rfind(_MARK)
    return at if at < 0 else at + len(_MARK)


def verify(content: bytes, at: int | None = None) -> None:
    """Make sure that not a bit of a sealed file has changed.

    Args:
        content: The file.
        at: Where its digits begin, if that is known.

    Raises:
        Unsealed: Its checksum is wrong, or it has none.
    """
    places = list(_marks(content)) if at is None else [at]
    if not places:
        raise Unsealed("it has no checksum")
    if not any(_holds(content, at) for at in places):
        raise Unsealed("its checksum is wrong")


def verify_stream(stream: BufferedIOBase, at: int) -> None:
    """Make sure of the same of a file that is too large to be held.

    Args:
        stream: The open file; it is left at its end.
        at: Where its digits begin.

    Raises:
        Unsealed: Its checksum is wrong.
    """
    found, written = _digest(stream, at)
    if found.encode() != written:
        raise Unsealed("its checksum is wrong")


def _digest(stream: BufferedIOBase, at: int) -> tuple[str, bytes]:
    """The checksum that a file should have, and the digits that it has."""
    digest, left = sha256(), at
    stream.seek(0)
    while left and (part := stream.read(min(left, _PART))):
        digest.update(part)
        left -= len(part)
    written = stream.read(_DIGITS)
    digest.update(b"0" * _DIGITS)
    while part := stream.read(_PART):
        digest.update(part)
    return digest.hexdigest(), written


def to_json(content: Mapping[str, Any]) -> bytes:
    """A sealed JSON object, readable by people.

    Args:
        content: What JSON can hold; numbers that are not finite are refused.
    """
    return sealed((json.dumps({_FIELD: BLANK, **content}, indent=2, allow_nan=False) + "\n").encode())


def from_json(content: bytes) -> dict[str, Any]:
    """The object that ``to_json`` was given.

    Raises:
        Unsealed: A bit of it has changed, or it is not one.
    """
    verify(content)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # a seal says that nothing changed, not that it was JSON
        raise Unsealed(str(error)) from None
    if not isinstance(found, dict):
        raise Unsealed(f"it holds a {type(found).__name__}, expected an object")
    found.pop(_FIELD, None)
    return found


def _marks(content: bytes) -> Iterator[int]:
    """Where the digits after the first marks begin."""
    at = -1
    for _ in range(_TRIED):
        at = content.find(_MARK, at + 1)
        if at < 0:
            return
        yield at + len(_MARK)


def _holds(content: bytes, at: int) -> bool:
    whole = memoryview(content)  # slices of it are no copies: checkpoints are large
    digest = sha256(whole[:at])
    digest.update(b"0" * _DIGITS)
    digest.update(whole[at + _DIGITS :])
    return digest.hexdigest().encode() == content[at : at + _DIGITS]
