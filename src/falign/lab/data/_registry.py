"""Table of the data sets known by name: their files, checksums, mirrors and readers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from falign.lab.data._archives import CIFAR10, CIFAR100, TinyImageNet
from falign.lab.data._dataset import Dataset
from falign.lab.data._download import PublishedFile
from falign.lab.data._idx import IDX_NAMES, Idx, spellings

# The handwritten digits that scikit-learn ships: 1,797 real images of 8 × 8, no download.


_DIGITS_TEST = (
    "000004883524104000064100934205001a00080100240028062c12001000940a009019120420f8a0028110a000080a8820441524494240a0"
    "0a0000004004d80000818020004805c400104008a0100005404800301000020ec409000224840083a8013c20a6980a0000000b08400804a0"
    "184802024041c1008004404684376a810216004480004042a0a4180a5000840b8561c608108008004c80c02004068e000108820081003808"
    "03c008190000100e01008410a0210033282904c044c080680e0102830082008822a6402c24042108a860809081a00c02820242120138a415"
    "00"
)
"""The test images among the digits, a bit an image: what scikit-learn's ``train_test_split`` draws for 360 images,
stratified by class, with ``random_state=0``. Importing that takes seconds."""


def _read_digits(name: str, paths: Sequence[Path], *, keep: Path | None = None, progress: bool = False) -> Dataset:
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
    table = torch.from_numpy(_digits())
    images, labels = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].long()
    test = torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(_DIGITS_TEST), np.uint8))[: len(table)]).bool()
    return Dataset(
        name=name,
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple("0123456789"),
    )


def _digits() -> np.ndarray:
    """Read the digits from scikit-learn's own file, without importing it where that is not needed: it takes seconds.

    Returns:
        An image a row, uint8, ``(1797, 65)``: its pixels, then its label.
    """
    spec = find_spec("sklearn")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    return np.column_stack([np.asarray(pixels), np.asarray(targets)]).astype(np.uint8)


@runtime_checkable
class Reader(Protocol):
    """Function that reads the files of a data set."""

    def __call__(self, name: str, paths: Sequence[Path], *, keep: Path | None, progress: bool) -> Dataset:
        """Read the files.

        Args:
            name: Name of the data set.
            paths: Its files, in the order of the table.
            keep: Folder for what is costly to decode, one for each checksum; None to keep nothing.
            progress: Whether to show a bar.

        Returns:
            The data set.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set with a name.

    Attributes:
        name: The name.
        files: The files it consists of; none if it is part of an installed package.
        read: Function that reads them.
        marks: Files by which the folder that it unpacks to is known, whatever its name.
        pickled: Names of the same images in a form that is never read: unpickling a file can run any code.
    """

    name: str
    files: tuple[PublishedFile, ...]
    read: Reader
    marks: tuple[str, ...] = ()
    pickled: tuple[str, ...] = ()


def _idx_files(
    sha256: Sequence[str | None], sizes: Sequence[int], mirrors: tuple[str, ...] = ()
) -> tuple[PublishedFile, ...]:
    return tuple(
        PublishedFile(
            name=f"{name}.gz", unpacked=name, sha256=checksum, mirrors=mirrors, size=size, spellings=spellings(name)
        )
        for name, checksum, size in zip(IDX_NAMES, sha256, sizes, strict=True)
    )


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_TORONTO = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")

_SOURCES = (
    Source(name="digits", files=(), read=_read_digits),
    Source(
        name="mnist",
        files=_idx_files(
            (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            (9_912_422, 28_881, 1_648_877, 4_542),
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        ),
        read=Idx(classes=tuple("0123456789")).read,
    ),
    Source(
        name="fashion-mnist",
        files=_idx_files(
            (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
            (26_421_880, 29_515, 4_422_102, 5_148),
            (
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            ),
        ),
        read=Idx(classes=_FASHION).read,
    ),
    Source(
        name="cifar10",
        files=(
            PublishedFile(
                name="cifar-10-binary.tar.gz",
                unpacked=CIFAR10.root,
                sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                size=170_052_171,
                mirrors=(*_TORONTO, "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"),
            ),
        ),
        read=CIFAR10.read,
        marks=(*CIFAR10.train, CIFAR10.test),
        pickled=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1", "test_batch"),
    ),
    Source(
        name="cifar100",
        files=(
            PublishedFile(
                name="cifar-100-binary.tar.gz",
                unpacked=CIFAR100.root,
                sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                size=168_513_733,
                mirrors=_TORONTO,
            ),
        ),
        read=CIFAR100.read,
        marks=(*CIFAR100.train, CIFAR100.test),
        pickled=("cifar-100-python", "cifar-100-python.tar.gz"),
    ),
    Source(
        name="tiny-imagenet",
        files=(
            PublishedFile(
                name="tiny-imagenet-200.zip",
                unpacked="tiny-imagenet-200",
                sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
                size=248_100_043,
                mirrors=("http://cs231n.stanford.edu/", "https://image-net.org/data/"),
            ),
        ),
        read=TinyImageNet().read,
        marks=("wnids.txt", "val/val_annotations.txt"),
    ),
    Source(
        name="mnist-10k",
        files=_idx_files((None,) * 4, (1_449_922, 4_625, 163_974, 545)),
        read=Idx(classes=tuple("0123456789")).read,
    ),
)

SOURCES: Mapping[str, Source] = {source.name: source for source in _SOURCES}
