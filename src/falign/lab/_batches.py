"""Images as a network takes them, and the order in which training sees them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import Dataset

ROOM = 2 << 30
"""Up to so many bytes of normalised images are held; beyond it each batch is normalised when it is taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """One set of labelled images on the training's device.

    Attributes:
        pixels: ``(n, channels, height, width)``, normalised, or as stored (uint8) where that takes too much
            room.
        labels: ``(n,)``.
        mean: Of every channel of the training set, ``(channels, 1, 1)``.
        deviation: Standard deviation, likewise; 1 where a channel is constant.
    """

    pixels: Tensor
    labels: Int64[Tensor, " n"]
    mean: Float[Tensor, "channels 1 1"]
    deviation: Float[Tensor, "channels 1 1"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor | slice) -> tuple[Float[Tensor, "batch channels height width"], Tensor]:
        """The images and labels at some positions, ``(x - mean) / deviation``."""
        pixels = self.pixels[index] if isinstance(index, slice) else self.pixels.index_select(0, index)
        if not pixels.is_floating_point():
            pixels = _normalised(pixels, self.mean, self.deviation)
        return pixels, self.labels[index]

    def pieces(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in their order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def prepare(data: Dataset, *, device: torch.device, dtype: torch.dtype, room: int = ROOM) -> tuple[Images, Images]:
    """The training and the test set, normalised by mean and standard deviation of the training images.

    Args:
        data: What was loaded.
        device: Where the images go.
        dtype: Of the normalised images.
        room: Bytes that the normalised images of both sets may take together.

    Returns:
        The training set and the test set.
    """
    mean, deviation = data.mean_and_std()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    mean, deviation = (part.to(device, dtype)[:, None, None] for part in (mean, deviation))
    held = (data.train_images.numel() + data.test_images.numel()) * dtype.itemsize <= room

    def images(pixels: Tensor, labels: Tensor) -> Images:
        pixels = pixels.to(device)
        if held:
            pixels = _normalised(pixels, mean, deviation)
        return Images(pixels=pixels, labels=labels.to(device), mean=mean, deviation=deviation)

    return images(data.train_images, data.train_labels), images(data.test_images, data.test_labels)


def _normalised(pixels: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return pixels.to(mean.dtype).sub_(mean).div_(deviation)


def order(seed: int, epoch: int, size: int) -> Int64[Tensor, " size"]:
    """The order of the training images in an epoch; a resumed run repeats it."""
    return torch.randperm(size, generator=generator(seed, str(epoch), "batches"))


def probe(seed: int, size: int, count: int) -> Int64[Tensor, " count"]:
    """Which training images the angles are measured on, ``count`` of them or all there are."""
    return torch.randperm(size, generator=generator(seed, "", "probe"))[:count]
