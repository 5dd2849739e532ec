"""Tiny-ImageNet: 200 classes of 64 × 64 JPEGs, decoded once and kept."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from falign.lab.data.archive import Archive
from falign.lab.data.content import fits
from falign.lab.data.dataset import DataError, Dataset
from falign.lab.data.images import decode
from falign.lab.data.kept import keep_images, kept_images
from falign.lab.data.progress import track

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
            if (before := kept_images(kept, shape)) is not None:
                return torch.from_numpy(before)
            if kept.exists():
                notes.append(f"{kept} was damaged: its images were decoded again")
        fits(math.prod(shape), f"the set in {archive.path}")
        images = np.empty(shape, np.uint8)
        members = archive.members(names, at_most=_JPEG)
        found = track(members, f"decoding {archive.path.name}", total=len(names), shown=progress)
        for row, (name, content) in zip(images, found, strict=True):
            row[...] = decode(BytesIO(content), name=f"{archive.path}: {name}", size=(self.side, self.side), grey=False)
        if kept is not None:
            keep_images(images, kept)
        return torch.from_numpy(images)


def _columns(text: str) -> dict[str, str]:
    """The second column of a table by the first; tabs separate them."""
    rows = (line.split("\t") for line in text.splitlines())
    return {row[0]: row[1] for row in rows if len(row) > 1}
