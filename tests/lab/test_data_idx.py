import gzip
import hashlib
import os
import struct

import numpy as np
import pytest
import torch

from falign.lab.data import DataError, load
from falign.lab.data._download import PublishedFile
from falign.lab.data._idx import IDX_NAMES, Idx, read_idx
from falign.lab.data._loading import load_source
from falign.lab.data._registry import SOURCES, Source

HAVE_DATA = pytest.mark.skipif(not os.environ.get("FALIGN_DATA"), reason="FALIGN_DATA is not set")


def idx(array, kind=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def contents(train=6, test=3, classes=3):
    """The four files of a small set, by standard name."""
    pixels = np.random.default_rng(0).integers(256, size=(train + test, 4, 5), dtype=np.uint8)
    labels = (np.arange(train + test) % classes).astype(np.uint8)
    arrays = (pixels[:train], labels[:train], pixels[train:], labels[train:])
    return {name: idx(array) for name, array in zip(IDX_NAMES, arrays, strict=True)}


def write(folder, files, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_by_path(tmp_path, packed):
    files = contents()
    dataset = load(str(write(tmp_path / "own", files, packed)))
    assert dataset.name == "own"
    assert dataset.shape == (1, 4, 5)
    assert dataset.classes == ("0", "1", "2")
    assert dataset.train_images.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
    assert dataset.test_images.numpy().tobytes() == files["t10k-images-idx3-ubyte"][16:]
    assert dataset.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.test_labels.dtype == torch.int64


IMAGES = idx(np.arange(40, dtype=np.uint8).reshape(2, 4, 5))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (IMAGES[:-1], r"has 39 bytes after its header, expected 2 × 4 × 5 = 40"),
        (IMAGES + b"\0", r"has 41 bytes after its header"),
        (IMAGES[:10], r"has 10 bytes, expected the magic number 00000803 in a header of 16"),
        (b"", r"begins with nothing"),
        (b"\x89PNG" + IMAGES[4:], r"begins with 89504e47"),
        (idx(np.zeros((2, 4, 5), np.uint8), kind=13), r"begins with 00000d03"),
        (idx(np.zeros(4, np.uint8)), r"begins with 00000801"),
        (idx(np.zeros((0, 4, 5), np.uint8)), r"announces 0 × 4 × 5"),
        (struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"\0", r"has 1 bytes after its header"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_altered_files_are_refused_by_name(tmp_path, content, words, packed):
    write(tmp_path, {"train-images-idx3-ubyte": content}, packed)
    (path,) = tmp_path.iterdir()
    with pytest.raises(DataError, match=words) as refusal:
        read_idx(path, 3)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "alter",
    [
        lambda packed: packed[:-9],
        lambda packed: packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],
        lambda packed: packed[:-1] + bytes([packed[-1] ^ 1]),
        lambda packed: packed[:30] + bytes([packed[30] ^ 255]) + packed[31:],
        lambda packed: packed + b"more",
    ],
    ids=["truncated", "crc", "length", "payload", "trailing"],
)
def test_altered_gzip_is_refused_by_name(tmp_path, alter):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(alter(gzip.compress(IMAGES)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is no intact gzip file"):
        read_idx(path, 3)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_file_is_known_to_be_packed_by_its_content(tmp_path, ending, packed):
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    path.write_bytes(gzip.compress(IMAGES) if packed else IMAGES)
    assert read_idx(path, 3).numpy().tobytes() == IMAGES[16:]


def test_files_that_do_not_belong_together(tmp_path):
    files = contents()
    with pytest.raises(DataError, match="has 3 labels for 6 images"):
        load(str(write(tmp_path / "a", files | {IDX_NAMES[1]: files[IDX_NAMES[3]]})))
    with pytest.raises(DataError, match="test labels run from 0 to 9, expected 0 to 2 for 3 classes"):
        load(str(write(tmp_path / "b", files | {IDX_NAMES[3]: idx(np.array([0, 9, 1], np.uint8))})))
    del files[IDX_NAMES[2]]
    with pytest.raises(DataError, match="some IDX files but not t10k-images-idx3-ubyte"):
        load(str(write(tmp_path / "c", files)))


@pytest.mark.parametrize("packed", [True, False])
def test_published_files_are_verified_by_their_content(tmp_path, packed):
    files = contents()
    source = Source(
        name="made",
        files=tuple(
            PublishedFile(name=f"{name}.gz", unpacked=name, sha256=hashlib.sha256(content).hexdigest())
            for name, content in files.items()
        ),
        read=Idx(classes=("a", "b", "c")).read,
    )
    places = {"cache": tmp_path / "cache", "download": False, "progress": False}
    write(tmp_path / "data" / "made", files, packed)
    assert load_source(source, given=tmp_path / "data", **places).classes == ("a", "b", "c")
    other = files | {IDX_NAMES[1]: idx(np.array([0, 1, 2, 0, 1, 1], np.uint8))}
    write(tmp_path / "data" / "made", other, packed)
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\S* has SHA-256 \w{64}, expected \w{64}"):
        load_source(source, given=tmp_path / "data", **places)
    if packed:
        (tmp_path / "data" / "made" / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b\x08")
        with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz is no intact gzip file"):
            load_source(source, given=tmp_path / "data", **places)


def test_the_table_of_official_idx_files():
    for name in ("mnist", "fashion-mnist"):
        assert [file.unpacked for file in SOURCES[name].files] == list(IDX_NAMES)
    assert not any(file.mirrors or file.sha256 for file in SOURCES["mnist-10k"].files)


@HAVE_DATA
def test_the_real_fashion_mnist():
    fashion = load("fashion-mnist", download=False)
    assert fashion.train_images.shape == (60_000, 1, 28, 28)
    assert fashion.test_images.shape == (10_000, 1, 28, 28)
    assert fashion.train_labels.bincount().tolist() == [6000] * 10
    assert fashion.test_labels.bincount().tolist() == [1000] * 10
    assert fashion.classes[int(fashion.train_labels[0])] == "Ankle boot"
    mean, std = fashion.mean_and_std()
    assert (mean / 255).item() == pytest.approx(0.2860, abs=5e-5)
    assert (std / 255).item() == pytest.approx(0.3530, abs=5e-5)


@HAVE_DATA
def test_the_real_mnist_10k():
    mnist = load("mnist-10k", download=False)
    assert mnist.train_images.shape == (9000, 1, 28, 28)
    assert mnist.test_images.shape == (1000, 1, 28, 28)
    assert mnist.train_labels.bincount(minlength=10).min() > 700
    assert mnist.classes == tuple("0123456789")
