"""The handwritten digits that scikit-learn ships: 1,797 real images of 8 × 8, no download."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from falign.lab.data.dataset import Dataset


def read_digits(name: str, paths: Sequence[Path], *, keep: Path | None = None, progress: bool = False) -> Dataset:
    """Split the digits into 1,437 training and 360 test images, stratified by class, with the seed 0.

    The pixels keep their values from 0 to 16, and both sets the order of the source.

    Args:
        name: Name of the data set.
        paths: Empty: the images are part of scikit-learn.
        keep: Not used: there is nothing costly to keep.
        progress: Not used: it takes no time.

    Returns:
        The data set, of shape 1 × 8 × 8.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test set).
    """
    from sklearn.datasets import load_digits  # a second to import, wanted for this data set only
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels).astype(np.uint8).reshape(-1, 1, 8, 8))
    labels = torch.from_numpy(np.asarray(targets).astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels.numpy(), random_state=0)
    train, test = np.sort(train), np.sort(test)
    return Dataset(
        name=name,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple("0123456789"),
    )
