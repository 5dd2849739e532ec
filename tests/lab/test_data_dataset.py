import hashlib

import numpy as np
import pytest
import torch

from falign.lab import data
from falign.lab.data import DataError, Dataset, load


def parts(**changes):
    generator = torch.Generator().manual_seed(0)
    valid = {
        "name": "made",
        "train_images": torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8, generator=generator),
        "train_labels": torch.tensor([0, 1, 2, 0, 1, 2, 0]),
        "test_images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8),
        "test_labels": torch.tensor([2, 0]),
        "classes": ("a", "b", "c"),
    }
    return valid | changes


def test_surface():
    assert set(data.__all__) == {"DataError", "Dataset", "NAMES", "Text", "load", "load_text"}
    assert data.NAMES == (
        "digits",
        "mnist",
        "fashion-mnist",
        "cifar10",
        "cifar100",
        "tiny-imagenet",
        "mnist-10k",
    )
    assert issubclass(DataError, ValueError)


def test_mean_and_std_are_those_of_numpy():
    dataset = Dataset(**parts())
    mean, std = dataset.mean_and_std()
    pixels = dataset.train_images.numpy().astype(np.float64)
    assert dataset.shape == (3, 4, 5)
    assert mean.dtype == std.dtype == torch.float64
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-13)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels": torch.tensor([0, 1])}, "training set has 2 labels for 7 images"),
        ({"test_labels": torch.tensor([0, 3])}, "test labels run from 0 to 3, expected 0 to 2"),
        ({"test_labels": torch.tensor([-1, 0])}, "test labels run from -1 to 0"),
        ({"test_images": torch.zeros(0, 3, 4, 5, dtype=torch.uint8)}, "at least one image"),
        ({"test_images": torch.zeros(2, 1, 4, 5, dtype=torch.uint8)}, "3×4×5 and test images 1×4×5"),
        ({"train_images": torch.full((7, 3, 4, 5), float("nan"))}, "torch.float32 images"),
        ({"train_images": torch.zeros(7, 4, 5, dtype=torch.uint8)}, "3 dimensions"),
        ({"train_labels": torch.zeros(7)}, "torch.float32 labels"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(DataError, match=words):
        Dataset(**parts(**changes))


def test_digits_are_whole_and_split_the_same_way_everywhere():
    digits = load("digits")
    assert digits.shape == (1, 8, 8)
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    assert (int(digits.train_images.min()), int(digits.train_images.max())) == (0, 16)
    together = digits.train_labels.bincount() + digits.test_labels.bincount()
    assert together.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert digits.test_labels[:12].tolist() == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2]
    assert hashlib.sha256(digits.test_images.numpy().tobytes()).hexdigest()[:16] == "342538e35bc5249d"
