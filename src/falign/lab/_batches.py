"""Normalised images on the training's device, and the order in which a training sees them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import Dataset

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

    def __len__(self) -> int:
        return len(self.labels)

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


def _normalised(pixels: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return pixels.to(mean.dtype).sub_(mean).div_(deviation)


def order(seed: int, epoch: int, size: int) -> Int64[Tensor, " size"]:
    """Draw the order of the training images in an epoch; a resumed run draws the same."""
    return torch.randperm(size, generator=generator(seed, str(epoch), "batches"))


def probe(seed: int, size: int, count: int) -> Int64[Tensor, " count"]:
    """Draw the ``count`` training images, or all there are, on which the angles are measured."""
    return torch.randperm(size, generator=generator(seed, "", "probe"))[:count]
