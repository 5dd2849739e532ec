"""Damage as disks, transfers and people do it, byte by byte: the same for every reader."""

import random
from collections.abc import Iterator

KINDS = ("bit", "byte", "cut", "begin", "insert", "remove", "zeros", "double", "swap", "text", "number", "empty")


def mutated(content: bytes, kind: str, draw: random.Random) -> bytes:
    """A damaged copy; it may be equal to the content where that is of one kind of bytes only."""
    if kind == "empty" or not content:
        return b"" if content else b"\0"
    data, size = bytearray(content), len(content)
    at, length = draw.randrange(size), min(draw.choice((1, 2, 8, 64, 1000)), size)
    other = draw.randrange(size)
    if kind == "bit":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[at] = draw.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "begin":
        del data[:at]
    elif kind == "insert":
        data[at:at] = draw.randbytes(length)
    elif kind == "remove":
        del data[at : at + length]
    elif kind == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "double":
        data[at:at] = data[at : at + length]
    elif kind == "swap":
        data[at], data[other] = data[other], data[at]
    elif kind == "text":  # what editors and transfers do: line ends, encodings, a mark at the beginning
        data = bytearray(draw.choice((content.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + content, content + b"\n\n")))
    elif kind == "number":  # sizes and lengths: huge, negative, none
        value = draw.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0xFFFFFFFFFFFFFFFF))
        width = draw.choice((4, 8))
        data[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, draw.choice(("big", "little")))
    return bytes(data)


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged copies of all kinds in turn, each with the words that say how it came about; never an equal."""
    number = 0
    while count:
        kind = KINDS[number % len(KINDS)]
        damaged = mutated(content, kind, random.Random(f"{seed} {number}"))
        if damaged != content:
            count -= 1
            yield f"{kind}, seed {seed}, number {number}", damaged
        number += 1
