"""Images and pieces of text on the training's device, the order in which a training sees them, and their loss."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from falign.feedback import generator
from falign.lab.data import DataError, Dataset, Text

_ROOM = 2 << 30
"""Bytes of normalised images that are kept; larger sets are normalised batch by batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """One set of labelled images on the training's device.

    Attributes:
        pixels: ``(n, channels, height, width)``, normalised, or as stored (uint8) where that takes too much
            room.
        labels: ``(n,)``.
        mean: Mean of every channel of the training set, ``(channels, 1, 1)``.
        deviation: Standard deviation, likewise; 1 where a channel is constant.
    """

    pixels: Tensor
    labels: Int64[Tensor, " n"]
    mean: Float[Tensor, "channels 1 1"]
    deviation: Float[Tensor, "channels 1 1"]

    labels_each: ClassVar[int] = 1
    """Labels of one image."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def numbers_each(self) -> int:
        """Numbers that an image takes in a forward pass."""
        return self.pixels[0].numel()

    def take(self, index: Tensor | slice) -> tuple[Float[Tensor, "batch channels height width"], Tensor]:
        """Return images and labels at some positions; the images as ``(x - mean) / deviation``."""
        pixels = self.pixels[index] if isinstance(index, slice) else self.pixels.index_select(0, index)
        if not pixels.is_floating_point():
            pixels = _normalised(pixels, self.mean, self.deviation)
        return pixels, self.labels[index]

    def pieces(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in their order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def prepare(data: Dataset, *, device: torch.device, dtype: torch.dtype, room: int = _ROOM) -> tuple[Images, Images]:
    """Normalise training and test set by mean and standard deviation of the training images, channel by channel.

    Args:
        data: The data set.
        device: Device of the images.
        dtype: Type of the normalised images.
        room: Bytes that the normalised images of both sets may take together.

    Returns:
        The training set and the test set.
    """
    mean, deviation = data.mean_and_std()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    mean, deviation = (part.to(device, dtype)[:, None, None] for part in (mean, deviation))
    fits = (data.train_images.numel() + data.test_images.numel()) * dtype.itemsize <= room

    def images(pixels: Tensor, labels: Tensor) -> Images:
        pixels = pixels.to(device)
        if fits:
            pixels = _normalised(pixels, mean, deviation)
        return Images(pixels=pixels, labels=labels.to(device), mean=mean, deviation=deviation)

    return images(data.train_images, data.train_labels), images(data.test_images, data.test_labels)


LARGE, APART = 50_000, 5_000
"""Training images from which on a set is large, and the validation images of such a one; else a tenth."""


def keep_apart(data: Dataset, images: int = 0) -> tuple[Dataset, Dataset]:
    """Keep validation images apart from the training images, the same ones in every call.

    Args:
        data: The data set.
        images: Training images that are used, the validation images among them; 0 is all.

    Returns:
        The data set without them, and the same one with them as its test set.

    Raises:
        DataError: There are fewer training images, or too few to keep some apart.
    """
    there = len(data.train_labels)
    if images > there:
        raise DataError(f"{data.name} has {there} training images, expected at least {images}: ask for fewer")
    used = torch.randperm(there, generator=generator(0, data.name, "validation"))[: images or None]
    apart = APART if len(used) >= LARGE else len(used) // 10
    if not apart:
        raise DataError(f"{data.name} has {there} training images, expected ten, to keep one for validation: use more")
    images_of, labels_of = data.train_images, data.train_labels
    kept = replace(data, train_images=images_of[used[apart:]], train_labels=labels_of[used[apart:]])
    return kept, replace(kept, test_images=images_of[used[:apart]], test_labels=labels_of[used[:apart]])


def _normalised(pixels: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return pixels.to(mean.dtype).sub_(mean).div_(deviation)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """One part of a text on the training's device, cut into pieces that follow each other.

    The labels of a piece are its characters moved by one: at every position the next character. What is left behind the
    last whole piece is not used.

    Attributes:
        characters: Positions in the vocabulary, of a type as small as that allows, ``(n · context + 1,)``.
        context: Characters of a piece.
        vocabulary: Number of characters of the vocabulary.
    """

    characters: Tensor
    context: int
    vocabulary: int

    def __len__(self) -> int:
        return len(self.characters) // self.context

    @property
    def labels_each(self) -> int:
        """Labels of one piece."""
        return self.context

    @property
    def numbers_each(self) -> int:
        """Numbers that a piece takes in a forward pass: those of its output."""
        return self.context * self.vocabulary

    def take(self, index: Tensor | slice) -> tuple[Int64[Tensor, "batch context"], Int64[Tensor, "batch context"]]:
        """Return pieces at some positions, and the character that follows each of theirs."""
        pieces, labels = (part.unflatten(0, (-1, self.context)) for part in (self.characters[:-1], self.characters[1:]))
        return pieces[index].long(), labels[index].long()

    def pieces(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all pieces in their order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


Samples = Images | Pieces
"""What a network learns from."""


def cut(text: Text, *, context: int, device: torch.device) -> tuple[Pieces, Pieces, Pieces]:
    """Cut the parts of a text into pieces.

    Args:
        text: The text.
        context: Characters of a piece.
        device: Device of the pieces.

    Returns:
        Those for training, for validation and for the test.

    Raises:
        DataError: A part is shorter than a piece and the character behind it.
    """
    parts = {"training": text.train, "validation": text.validation, "test": text.test}
    for name, part in parts.items():
        if len(part) <= context:
            raise DataError(
                f"{text.name}: its {name} part has {len(part):,} characters, expected more than the context of "
                f"{context:,}: use a smaller --context, or a longer text"
            )

    def pieces(part: Tensor) -> Pieces:
        whole = (len(part) - 1) // context * context + 1
        return Pieces(characters=part[:whole].to(device), context=context, vocabulary=len(text.vocabulary))

    train, validation, test = map(pieces, parts.values())
    return train, validation, test


def label_loss(output: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Compute the cross-entropy in nats, for pieces of text over all positions.

    Args:
        output: ``(batch, classes)`` or ``(batch, context, classes)``.
        labels: ``(batch,)`` or ``(batch, context)``.
        reduction: "mean" or "sum", over all labels.
    """
    return cross_entropy(output.flatten(0, -2), labels.flatten(), reduction=reduction)


def order(seed: int, epoch: int, size: int) -> Int64[Tensor, " size"]:
    """Draw the order of the training images, or pieces of text, in an epoch; a resumed run draws the same."""
    return torch.randperm(size, generator=generator(seed, str(epoch), "batches"))


def probe(seed: int, size: int, count: int) -> Int64[Tensor, " count"]:
    """Draw the ``count`` training images or pieces, or all there are, on which the angles are measured."""
    return torch.randperm(size, generator=generator(seed, "", "probe"))[:count]
