"""One image file as an array of bytes."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from falign.lab.data.content import raw
from falign.lab.data.dataset import DataError

_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
"""What is decoded, whatever a file is called: other decoders of Pillow start programs, or are hardly ever tried."""
_LARGEST = 1 << 28
"""Bytes that an image file may have."""


def inspect(path: Path) -> tuple[tuple[int, int], bool]:
    """Read the header of an image file.

    Args:
        path: The file.

    Returns:
        Height and width, and whether the image is grey.

    Raises:
        DataError: If it is no image, has more than 8 bits a channel, no pixel, or more than Pillow takes for a bomb.
    """
    with _image(path, str(path)) as image:
        size, mode = (image.height, image.width), image.mode
    if mode not in _GREY | _COLOUR:
        raise DataError(
            f"{path} is an image of mode {mode}, expected 8-bit grey or colour: convert it, as reading it "
            "as 8 bits would silently clip it"
        )
    if 0 in size:
        raise DataError(
            f"{path} is an image of {size[0]} × {size[1]}, expected at least one pixel: replace or remove it"
        )
    return size, mode in _GREY


def decode(source: Path | BytesIO, *, name: str, size: tuple[int, int], grey: bool) -> NDArray[np.uint8]:
    """Decode an image file: the first frame of an animation, without transparency, not turned as EXIF may ask.

    Args:
        source: The file, or its content.
        name: What an error calls it.
        size: Height and width that it must have.
        grey: Whether to return one channel or three (red, green, blue).

    Returns:
        The pixels, ``(channels, height, width)``.

    Raises:
        DataError: If it is damaged, or of another size.
    """
    with _image(source, name) as image:
        if (image.height, image.width) != size:  # before so much memory is taken
            raise DataError(
                f"{name} is an image of {image.height} × {image.width}, expected {size[0]} × {size[1]}: get it anew"
            )
        image.info.pop("transparency", None)  # else converting a palette with it takes the way over four channels
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


@contextmanager
def _image(source: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """Open an image, and have whatever Pillow raises while it is used end in one sentence."""
    try:
        with warnings.catch_warnings(), raw(source) if isinstance(source, Path) else nullcontext(source) as stream:
            if stream.seek(0, os.SEEK_END) > _LARGEST:  # some decoders read a file whole before they look at it
                raise DataError(f"{name} has more than {_LARGEST:,} bytes, expected an image: replace or remove it")
            stream.seek(0)
            warnings.simplefilter("ignore")  # of odd metadata, which are not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=_FORMATS) as image:
                yield image
    except DataError:
        raise
    except Exception as error:  # on damaged files Pillow raises whatever its decoders run into
        raise DataError(
            f"{name} cannot be decoded ({error}), expected an intact image: replace or remove it"
        ) from error
