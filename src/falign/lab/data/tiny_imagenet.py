"""Tiny-ImageNet: 200 classes of 64 × 64 JPEGs, decoded once and kept."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from falign.lab.data.archive import members
from falign.lab.data.content import atomic
from falign.lab.data.dataset import DataError, Dataset
from falign.lab.data.images import decode
from falign.lab.data.progress import track

_ROOT = "tiny-imagenet-200"


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
        lists = ("wnids.txt", "words.txt", "val/val_annotations.txt")
        text = {file: content.decode(errors="replace") for file, content in members(path, _ROOT, lists)}
        wnids: list[str] = re.findall(r"^n\d{8}$", text["wnids.txt"], re.MULTILINE)
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
        return Dataset(
            name=name,
            train_images=self._images(path, train, keep and keep / "train.npy", progress),
            train_labels=torch.arange(self.classes).repeat_interleave(self.train_per_class),
            test_images=self._images(
                path, [f"val/images/{test}" for test in tests], keep and keep / "val.npy", progress
            ),
            test_labels=torch.tensor([labels[annotated[test]] for test in tests]),
            classes=tuple(words.get(wnid, wnid).partition(",")[0] for wnid in labels),
        )

    def _images(
        self, path: Path, names: Sequence[str], kept: Path | None, progress: bool
    ) -> UInt8[Tensor, "n 3 side side"]:
        shape = (len(names), 3, self.side, self.side)
        if kept is not None and kept.is_file():
            return torch.from_numpy(_load_kept(kept, shape))
        images = np.empty(shape, np.uint8)
        found = track(members(path, _ROOT, names), f"decoding {path.name}", total=len(names), shown=progress)
        for row, (name, content) in zip(images, found, strict=True):
            image = decode(BytesIO(content), name=f"{path}: {name}", grey=False)
            if image.shape != row.shape:
                raise DataError(
                    f"{path}: {name} is an image of {image.shape[1]} × {image.shape[2]}, expected "
                    f"{self.side} × {self.side}: get the data set anew"
                )
            row[...] = image
        if kept is not None:
            _keep(images, kept)
        return torch.from_numpy(images)


def _columns(text: str) -> dict[str, str]:
    """The second column of a table by the first; tabs separate them."""
    rows = (line.split("\t") for line in text.splitlines())
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _load_kept(kept: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        images = np.load(kept, mmap_mode="c", allow_pickle=False)  # "c": writes stay in memory
    except (ValueError, EOFError) as error:
        raise DataError(f"{kept} is damaged ({error}), expected decoded images: delete it to decode again") from error
    if images.shape != shape or images.dtype != np.uint8:
        raise DataError(
            f"{kept} holds {images.dtype} of {images.shape}, expected uint8 of {shape}: delete it to decode again"
        )
    return images


def _keep(images: np.ndarray, kept: Path) -> None:
    try:
        with atomic(kept) as partial:
            np.save(partial, images, allow_pickle=False)
    except OSError as error:  # a full or read-only disk must not cost the result
        warnings.warn(
            f"the decoded images cannot be kept in {kept.parent} ({error}): they are decoded every time",
            stacklevel=2,
        )
