"""The table of data sets known by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from falign.lab.data.cifar import CIFAR10, CIFAR100
from falign.lab.data.dataset import Dataset
from falign.lab.data.digits import read_digits
from falign.lab.data.download import PublishedFile
from falign.lab.data.idx import IDX_NAMES, Idx
from falign.lab.data.tiny_imagenet import TinyImageNet


@runtime_checkable
class Reader(Protocol):
    """What turns the files of a data set into a value."""

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
        read: What reads them.
    """

    name: str
    files: tuple[PublishedFile, ...]
    read: Reader


def _idx_files(sha256: Sequence[str | None], mirrors: tuple[str, ...] = ()) -> tuple[PublishedFile, ...]:
    return tuple(
        PublishedFile(name=f"{name}.gz", unpacked=name, sha256=checksum, mirrors=mirrors)
        for name, checksum in zip(IDX_NAMES, sha256, strict=True)
    )


_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_TORONTO = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")

_SOURCES = (
    Source(name="digits", files=(), read=read_digits),
    Source(
        name="mnist",
        files=_idx_files(
            (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            (
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
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
                mirrors=(*_TORONTO, "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"),
            ),
        ),
        read=CIFAR10.read,
    ),
    Source(
        name="cifar100",
        files=(
            PublishedFile(
                name="cifar-100-binary.tar.gz",
                unpacked=CIFAR100.root,
                sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                mirrors=_TORONTO,
            ),
        ),
        read=CIFAR100.read,
    ),
    Source(
        name="tiny-imagenet",
        files=(
            PublishedFile(
                name="tiny-imagenet-200.zip",
                unpacked="tiny-imagenet-200",
                sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
                mirrors=("http://cs231n.stanford.edu/", "https://image-net.org/data/"),
            ),
        ),
        read=TinyImageNet().read,
    ),
    Source(name="mnist-10k", files=_idx_files((None,) * 4), read=Idx(classes=tuple("0123456789")).read),
)

SOURCES: Mapping[str, Source] = {source.name: source for source in _SOURCES}
