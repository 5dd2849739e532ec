"""The values that loaders return: images, valid by construction, and texts."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from jaxtyping import Float64
from torch import Tensor

_NAMED = 5
"""Classes that a sentence names."""
_COMPARED = 1_000_000
"""Images that the smaller set may have for the two to be compared: that takes some 100 bytes for each."""


class DataError(ValueError):
    """Data that are missing, damaged or inconsistent; the message says what came, what was expected, what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A training and a test set of labelled images.

    Attributes:
        name: The name it was loaded by; for a path, the name of the folder.
        train_images: Pixels as stored, uint8, ``(train, channels, height, width)``; from 0 to 255,
            in ``digits`` to 16.
        train_labels: Positions in ``classes``, int64, ``(train,)``.
        test_images: As ``train_images``, of the same channels, height and width.
        test_labels: As ``train_labels``.
        classes: The name of every class, in the order of the labels.
        sha256: Checksum of what was read, whatever it was packed in; None where it has none.
        notes: What is odd about the data, though no reason to refuse them: sentences for the user.

    Raises:
        DataError: If the parts do not fit each other.
    """

    name: str
    # types and shapes are checked below, always and with a sentence, so the annotations do not repeat them
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    sha256: str | None = field(default=None, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self._check("training", self.train_images, self.train_labels)
        self._check("test", self.test_images, self.test_labels)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"{self.name}: training images are {_by(self.train_images)} and test images "
                f"{_by(self.test_images)} (channels × height × width), expected the same: give both sets "
                "images of one kind and size"
            )

    def _check(self, split: str, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.dtype != torch.int64 or labels.ndim != 1:
            raise DataError(
                f"{self.name}: the {split} set came as {images.dtype} images of {images.ndim} dimensions and "
                f"{labels.dtype} labels of {labels.ndim}, expected uint8 of 4 (N, C, H, W) and int64 of 1: "
                "convert them"
            )
        if images.numel() == 0:
            raise DataError(
                f"{self.name}: the {split} set has shape {tuple(images.shape)}, expected at least one image "
                "of at least one pixel: check that its files are the right ones"
            )
        if len(labels) != len(images):
            raise DataError(
                f"{self.name}: the {split} set has {len(labels)} labels for {len(images)} images, expected "
                "one for each: check that both files belong to the same set"
            )
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= len(self.classes):
            raise DataError(
                f"{self.name}: the {split} labels run from {lowest} to {highest}, expected 0 to "
                f"{len(self.classes) - 1} for {len(self.classes)} classes: correct the labels"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def mean_and_std(self) -> tuple[Float64[Tensor, " channels"], Float64[Tensor, " channels"]]:
        """Mean and population standard deviation of every channel of the training images.

        Computed exactly from the histogram of the 256 pixel values, so no float copy of the images is made.

        Returns:
            Mean and standard deviation in pixel units, as stored (not divided by 255), ``(channels,)`` each.
        """
        histograms = [channel.flatten().bincount(minlength=256) for channel in self.train_images.unbind(1)]
        share = torch.stack(histograms).double() / (self.train_images.numel() / self.shape[0])
        values = torch.arange(256, dtype=torch.float64, device=share.device)
        mean = share @ values
        variance = (share * (values - mean[:, None]).square()).sum(1)
        return mean, variance.sqrt()


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """A text, split by position: first eight tenths for training, then one for validation and one for the test.

    Attributes:
        name: The name it was loaded by; of a file, its name.
        vocabulary: All characters of the text, each once, by their code points.
        train: Positions in the vocabulary, uint8, or int32 where there are more than 256 characters, ``(train,)``.
        validation: Likewise.
        test: Likewise.
        sha256: Checksum of the text in UTF-8; of a file, of its bytes.
        notes: Oddities that are no reason to refuse it: sentences for the user.
    """

    name: str
    vocabulary: str
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    sha256: str = field(repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def unigram_perplexity(self) -> float:
        """Perplexity of the test by the frequencies of the training characters, one added to each count."""
        counts = self.train.bincount(minlength=len(self.vocabulary)).double() + 1
        return float((counts / counts.sum()).log()[self.test.long()].mean().neg().exp())


def remarks(data: Dataset) -> tuple[str, ...]:
    """Describe oddities of somebody's own data that are no reason to refuse them.

    Args:
        data: The data.

    Returns:
        Sentences: of classes without images, sets that may be swapped, test images that are training images too.
    """
    sentences = []
    if len(data.classes) == 1:
        sentences.append(f"{data.name} has one class only: there is nothing to tell apart")
    for split, labels in (("training", data.train_labels), ("test", data.test_labels)):
        counts = labels.bincount(minlength=len(data.classes)).tolist()
        empty = [name for name, count in zip(data.classes, counts, strict=True) if not count]
        if empty:
            more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
            sentences.append(f"{data.name} has no {split} image of class {', '.join(empty[:_NAMED])}{more}")
    train, test = len(data.train_labels), len(data.test_labels)
    if train < test:
        sentences.append(
            f"{data.name} has {train:,} training and {test:,} test images: check that they are not swapped"
        )
    if min(train, test) <= _COMPARED and (twice := _twice(data.train_images, data.test_images)):
        sentences.append(f"{data.name}: {twice:,} of {test:,} test images are training images too")
    return tuple(sentences)


def _twice(train: Tensor, test: Tensor) -> int:
    """Count the test images that are training images too, keeping digests of the smaller set only."""
    if len(train) <= len(test):
        known = set(_digests(train))
        return sum(digest in known for digest in _digests(test))
    counts = Counter(_digests(test))
    return sum(counts.pop(digest, 0) for digest in _digests(train))


def _digests(images: Tensor) -> Iterator[bytes]:
    """Yield a digest of each image; of NumPy arrays, as iterating over a tensor makes views of all images first."""
    return (blake2b(image.data, digest_size=16).digest() for image in images.contiguous().numpy())


def _by(images: Tensor) -> str:
    return "×".join(str(size) for size in images.shape[1:])
