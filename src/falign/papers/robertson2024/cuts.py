"""Parts of a data set that an experiment trains on: some classes, some images, some labels wrong."""

from dataclasses import replace

import torch
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import DataError, Dataset


def with_classes(data: Dataset, count: int, seed: int) -> Dataset:
    """The images of some random classes, which are numbered anew; the classes of a smaller count are among them.

    Args:
        data: The whole.
        count: How many classes.
        seed: Of their choice.

    Returns:
        Training and test images of these classes only.

    Raises:
        DataError: The data have fewer classes.
    """
    if count > len(data.classes):
        raise DataError(f"{data.name} has {len(data.classes)} classes, expected at least {count}: ask for fewer")
    chosen = torch.randperm(len(data.classes), generator=generator(seed, data.name, "classes"))[:count]

    def cut(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, number = (labels[:, None] == chosen).nonzero(as_tuple=True)
        return images[image], number

    train_images, train_labels = cut(data.train_images, data.train_labels)
    test_images, test_labels = cut(data.test_images, data.test_labels)
    return replace(
        data,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=tuple(data.classes[index] for index in chosen.tolist()),
    )


def with_images(data: Dataset, count: int, seed: int) -> Dataset:
    """A random part of the training images, and all test images.

    Args:
        data: The whole.
        count: How many training images.
        seed: Of their choice.

    Returns:
        The part.

    Raises:
        DataError: There are fewer training images.
    """
    there = len(data.train_labels)
    if count > there:
        raise DataError(f"{data.name} has {there} training images, expected at least {count}: ask for fewer")
    chosen = torch.randperm(there, generator=generator(seed, data.name, "images"))[:count]
    return replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])


def with_noise(data: Dataset, share: float, seed: int) -> Dataset:
    """A share of the training labels, rounded to whole images, is changed to one of the other classes, each as likely.

    Args:
        data: The whole; test labels stay right.
        share: Of the training labels, from 0 to 1.
        seed: Of which images, and of their labels.

    Returns:
        The same images.
    """
    random, labels = generator(seed, data.name, "noise"), data.train_labels.clone()
    wrong = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
    steps = torch.randint(1, len(data.classes), (len(wrong),), generator=random)
    labels[wrong] = (labels[wrong] + steps) % len(data.classes)
    return replace(data, train_labels=labels)
