import gzip
import struct

import numpy as np
import pytest

from falign.lab.data import DataError, load
from falign.lab.data._idx import IDX_NAMES
from falign.lab.data._loading import Location, load_source, locate
from falign.lab.data._registry import SOURCES


@pytest.fixture
def mnist_10k(tmp_path):
    """A folder called mnist-10k with a very small set in it, and its parent."""
    folder = tmp_path / "data" / "mnist-10k"
    folder.mkdir(parents=True)
    for name, sizes in zip(IDX_NAMES, ((2, 3, 3), (2,), (1, 3, 3), (1,)), strict=True):
        content = struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes) + bytes(np.prod(sizes))
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def test_every_published_file_has_a_checksum_and_mirrors():
    for name, source in SOURCES.items():
        assert source.name == name
        for file in source.files if name != "mnist-10k" else ():
            assert len(bytes.fromhex(file.sha256)) == 32
            assert len(file.mirrors) > 1
            assert all(mirror.endswith("/") for mirror in file.mirrors)


def test_in_the_folder_by_name_or_directly(mnist_10k):
    for folder in (mnist_10k.parent, mnist_10k):
        assert load("mnist-10k", folder=folder).shape == (1, 3, 3)


def test_in_the_folder_of_the_environment(mnist_10k, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FALIGN_DATA", str(mnist_10k.parent))
    assert load("mnist-10k").name == "mnist-10k"
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"mnist-10k is not in .*other.* as they are never downloaded"):
        load("mnist-10k", folder=tmp_path / "other")
    with pytest.raises(DataError, match=r"data folder .*missing is not a folder"):
        load("mnist-10k", folder=tmp_path / "missing")
    monkeypatch.setenv("FALIGN_DATA", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"data folder .*missing is not a folder"):
        load("mnist")
    assert load("digits").shape == (1, 8, 8)


def test_in_the_cache_after_the_folder(mnist_10k, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"given": tmp_path / "empty", "cache": mnist_10k.parent, "progress": False}
    assert load_source(SOURCES["mnist-10k"], download=True, **places).shape == (1, 3, 3)


def test_other_idx_files_are_not_taken_for_mnist_10k(mnist_10k, tmp_path):
    other = mnist_10k.rename(mnist_10k.parent / "other")
    with pytest.raises(DataError, match="mnist-10k is not in"):
        load_source(SOURCES["mnist-10k"], given=other, cache=tmp_path / "cache", download=True, progress=False)
    assert load(str(other)).name == "other"


def test_other_idx_files_are_not_taken_for_mnist(mnist_10k):
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz has SHA-256 .* load its folder by path"):
        load("mnist", folder=mnist_10k, download=False)


@pytest.mark.parametrize("name", ["", "mnits", "./nowhere", "cifar-10"])
def test_an_unknown_name(name):
    with pytest.raises(DataError, match=f"'{name}' is neither a known data set .* expected one of digits, mnist"):
        load(name)


def test_a_path_from_home(mnist_10k, monkeypatch):
    monkeypatch.setenv("HOME", str(mnist_10k.parent))
    monkeypatch.setenv("USERPROFILE", str(mnist_10k.parent))
    assert load("~/mnist-10k").name == "mnist-10k"


def test_whereabouts_of_what_is_here_and_what_is_not(mnist_10k, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FALIGN_DATA", raising=False)
    here = locate("mnist-10k", mnist_10k.parent)
    assert [path.name for path in here.paths] == [f"{name}.gz" for name in IDX_NAMES]
    assert here.bytes == sum(path.stat().st_size for path in here.paths)
    assert here.remedy == ""
    there = locate("mnist-10k")
    assert (there.paths, there.bytes) == ((), 0)
    assert there.remedy.startswith("never downloaded; put these files into ")
    absent = locate("cifar10", mnist_10k.parent)
    assert (absent.paths, absent.bytes) == ((), 170_052_171)
    assert absent.remedy.startswith(f"downloads 170 MB to {tmp_path / 'cache'}")
    unpacked = mnist_10k.parent / "cifar-10-batches-bin"
    unpacked.mkdir()
    (unpacked / "data_batch_1.bin").write_bytes(bytes(3073))
    assert locate("cifar10", mnist_10k.parent) == Location(name="cifar10", paths=(unpacked,), bytes=3073, remedy="")
    (digits,) = locate("digits").paths
    assert digits.is_file()
    assert {locate(name, tmp_path / "no such folder").name for name in SOURCES} == set(SOURCES)
