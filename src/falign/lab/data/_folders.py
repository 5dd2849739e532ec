"""A folder of images by class, split by folders or, without a split, by a fixed rule."""

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from falign.lab._progress import track
from falign.lab.data._dataset import DataError, Dataset
from falign.lab.data._download import check_memory, open_regular

_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
"""Formats that are decoded, whatever a file is called: other decoders of Pillow start programs or are hardly tested."""
_LARGEST = 1 << 28
"""Bytes that an image file may have."""


def _inspect(path: Path) -> tuple[tuple[int, int], bool]:
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
        name: Name of the image in errors.
        size: Height and width that it must have.
        grey: Whether to return one channel or three (red, green, blue).

    Returns:
        The pixels, ``(channels, height, width)``.

    Raises:
        DataError: If it is damaged, or of another size.
    """
    with _image(source, name) as image:
        if (image.height, image.width) != size:  # before memory for the pixels is allocated
            raise DataError(
                f"{name} is an image of {image.height} × {image.width}, expected {size[0]} × {size[1]}: get it anew"
            )
        image.info.pop("transparency", None)  # else converting a palette with it takes the way over four channels
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


@contextmanager
def _image(source: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """Open an image, and turn whatever Pillow raises while it is used into a ``DataError``."""
    try:
        with (
            warnings.catch_warnings(),
            open_regular(source) if isinstance(source, Path) else nullcontext(source) as stream,
        ):
            if stream.seek(0, os.SEEK_END) > _LARGEST:  # some decoders read a file whole before they look at it
                raise DataError(f"{name} has more than {_LARGEST:,} bytes, expected an image: replace or remove it")
            stream.seek(0)
            warnings.simplefilter("ignore")  # about odd metadata, which are not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=_FORMATS) as image:
                yield image
    except DataError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise errors of all kinds
        raise DataError(
            f"{name} cannot be decoded ({error}), expected an intact image: replace or remove it"
        ) from error


_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
_TEST_FOLDERS = ("test", "val", "valid")

_Listing = dict[str, list[Path]]
"""The images of every class, both in alphabetical order."""


def read_image_folder(folder: Path, *, progress: bool = False) -> Dataset:
    """Read ``train/<class>/<image>`` and ``test/<class>/<image>``, or ``<class>/<image>`` without a split.

    The test folder may be called ``val`` or ``valid`` too; the first of the three with class folders counts.
    Without ``train``, one sixth of every class is the test set, rounded, and at least one image of two: those
    whose names have the smallest SHA-256. So the split depends on the names alone and is the same everywhere.

    Images are grey if all of them are, else all have three channels; those with a palette (every GIF) count
    as coloured. Of an animation the first frame counts, transparency is dropped, and no image is turned, whatever
    its EXIF data ask for. Hidden files and files with endings other than .png, .jpg, .jpeg, .bmp, .gif and .webp are
    passed over; the notes say how many of which. The classes are the names of the training folders in alphabetical
    order.

    Args:
        folder: The folder.
        progress: Whether to show a bar while decoding.

    Returns:
        The data set, named like the folder.

    Raises:
        DataError: If there are no such folders, an image is damaged, two images differ in size, or all of them
            decoded are more than the memory.
    """
    passed = Counter()
    train, test = _split(folder, passed)
    classes = tuple(train)
    if unknown := sorted(set(test) - set(train)):
        raise DataError(
            f"{folder}: the test set has the class {unknown[0]} and the training set has not, expected the "
            "same class folders in both: rename or remove it"
        )
    files = [path for listing in (train, test) for images in listing.values() for path in images]
    if not files:
        raise DataError(
            f"{folder} holds neither the four standard IDX files nor class folders, expected either: check the path"
        )
    size, grey = _one_size(sorted(files))
    decoded = track(files, f"decoding {folder.name}", total=len(files), shown=progress)
    shape = (len(files), 1 if grey else 3, *size)
    check_memory(math.prod(shape), f"the set in {folder}")
    images = np.empty(shape, np.uint8)
    for row, path in zip(images, decoded, strict=True):
        row[...] = decode(path, name=str(path), size=size, grey=grey)
    train_labels, test_labels = _labels(train, classes), _labels(test, classes)
    train_images, test_images = torch.from_numpy(images).split([len(train_labels), len(test_labels)])
    return Dataset(
        name=folder.resolve().name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=classes,
        notes=(f"passed over: {_counted(passed)}, read are {_read()}",) if passed else (),
    )


def _split(folder: Path, passed: Counter[str]) -> tuple[_Listing, _Listing]:
    if (folder / "train").is_dir():
        for name in _TEST_FOLDERS:
            if (folder / name).is_dir() and (test := _listing(folder / name, passed)):
                return _listing(folder / "train", passed), test
        raise DataError(
            f"{folder} holds train and none of {', '.join(_TEST_FOLDERS)} with class folders in it, expected "
            "one: add it, or move the class folders of train up to have them split"
        )
    train, test = {}, {}
    for name, images in _listing(folder, passed).items():
        count = round(len(images) / 6) or int(len(images) > 1)
        held_out = set(sorted(images, key=lambda path: hashlib.sha256(os.fsencode(path.name)).digest())[:count])
        train[name] = [path for path in images if path not in held_out]
        test[name] = [path for path in images if path in held_out]
    return train, test


def _listing(folder: Path, passed: Counter[str]) -> _Listing:
    """List the images of every class; files that are no images are counted by their endings."""

    def visible(path: Path) -> list[Path]:
        # By name: paths themselves sort differently on Windows.
        return sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)

    listing = {}
    for path in visible(folder):
        if not path.is_dir():
            continue
        files = visible(path)
        listing[path.name] = [file for file in files if file.suffix.lower() in _SUFFIXES]
        other = Counter(file.suffix.lower() for file in files if file.suffix.lower() not in _SUFFIXES)
        passed.update(other)
        if not listing[path.name]:
            but = f" but {_counted(other)}" if other else ""
            raise DataError(
                f"{path} holds no images{but}, expected a folder of one class with files ending in {_read()}: add or "
                "convert images, or remove the folder"
            )
    return listing


def _counted(endings: Counter[str]) -> str:
    """Name the endings, the most frequent first, with the number of files of each."""
    return ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in endings.most_common(4))


def _read() -> str:
    return ", ".join(sorted(_SUFFIXES))


def _one_size(files: Sequence[Path]) -> tuple[tuple[int, int], bool]:
    size, grey = _inspect(files[0])
    for path in files[1:]:
        other, other_grey = _inspect(path)
        if other != size:
            raise DataError(
                f"{files[0]} is {size[0]} × {size[1]} and {path} is {other[0]} × {other[1]} (height × "
                "width), expected images of one size: resize them"
            )
        grey = grey and other_grey
    return size, grey


def _labels(listing: _Listing, classes: tuple[str, ...]) -> Int64[Tensor, " n"]:
    counts = torch.tensor([len(listing.get(name, ())) for name in classes])
    return torch.arange(len(classes)).repeat_interleave(counts)
