"""One image file as an array of bytes."""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from falign.lab.data.dataset import DataError

_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)  # what Pillow raises on damaged files


def inspect(path: Path) -> tuple[tuple[int, int], bool]:
    """Read the header of an image file.

    Args:
        path: The file.

    Returns:
        Height and width, and whether the image is grey.

    Raises:
        DataError: If it is no image, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            size, mode = (image.height, image.width), image.mode
    except _FAULTS as error:
        raise _unreadable(str(path), error) from error
    if mode not in _GREY | _COLOUR:
        raise DataError(
            f"{path} is an image of mode {mode}, expected 8-bit grey or colour: convert it, as reading it "
            "as 8 bits would silently clip it"
        )
    return size, mode in _GREY


def decode(source: Path | BytesIO, *, name: str, grey: bool) -> NDArray[np.uint8]:
    """Decode an image file; of an animation its first frame, and transparency is dropped.

    Args:
        source: The file, or its content.
        name: What an error calls it.
        grey: Whether to return one channel or three (red, green, blue).

    Returns:
        The pixels, ``(channels, height, width)``.

    Raises:
        DataError: If it is damaged.
    """
    try:
        with Image.open(source) as image:
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except _FAULTS as error:
        raise _unreadable(name, error) from error
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _unreadable(name: str, error: BaseException) -> DataError:
    return DataError(f"{name} cannot be decoded ({error}), expected an intact image: replace or remove it")
