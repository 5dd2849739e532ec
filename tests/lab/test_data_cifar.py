import hashlib
import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from falign.lab.data import DataError
from falign.lab.data._archives import CIFAR10, CIFAR100
from falign.lab.data._download import PublishedFile
from falign.lab.data._loading import load_source
from falign.lab.data._registry import SOURCES, Source

SMALL = {
    "cifar10": replace(CIFAR10, train_records=4, test_records=3),
    "cifar100": replace(CIFAR100, train_records=5, test_records=3),
}
ARCHIVE = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}

LAYOUTS = pytest.mark.parametrize("name", list(SMALL))


def contents(layout):
    """The members of a small archive by name, and the labels of all records in order."""
    random = np.random.default_rng(0)
    files, labels = {}, []
    for file in (*layout.train, layout.test):
        count = layout.train_records if file in layout.train else layout.test_records
        head = random.integers(20, size=(count, layout.label_bytes), dtype=np.uint8)
        head[:, -1] = random.integers(layout.classes, size=count)
        pixels = random.integers(256, size=(count, 3072), dtype=np.uint8)
        files[file] = np.concatenate([head, pixels], 1).tobytes()
        labels += head[:, -1].tolist()
    names = [f"class_{label}" for label in range(layout.classes)]
    # the official CIFAR-10 list ends with an empty line
    files[layout.class_file] = ("\n".join(names) + "\n\n").encode()
    return files, labels


def pack(path, layout, files):
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo(layout.root)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        # the class names come first here: no order is relied on
        for name in sorted(files):
            member = tarfile.TarInfo(f"{layout.root}/{name}")
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
        readme = tarfile.TarInfo("../readme.html")
        archive.addfile(readme, io.BytesIO())
    return path


def unpack(path, files):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@LAYOUTS
@pytest.mark.parametrize("packed", [True, False])
def test_records_come_back(tmp_path, name, packed):
    layout = SMALL[name]
    files, labels = contents(layout)
    path = pack(tmp_path / ARCHIVE[name], layout, files) if packed else unpack(tmp_path / layout.root, files)
    dataset = layout.read(name, [path])
    assert dataset.shape == (3, 32, 32)
    assert dataset.train_labels.tolist() + dataset.test_labels.tolist() == labels
    assert dataset.classes[:2] == ("class_0", "class_1")
    record = files[layout.train[-1]][-3072:]
    assert dataset.train_images[-1].numpy().tobytes() == record
    assert dataset.test_images[0].numpy().tobytes() == files[layout.test][layout.label_bytes :][:3072]


@LAYOUTS
def test_an_altered_archive_is_refused_by_its_checksum(tmp_path, name):
    layout = SMALL[name]
    files, _ = contents(layout)
    path = pack(tmp_path / ARCHIVE[name], layout, files)
    made = PublishedFile(name=ARCHIVE[name], unpacked=layout.root, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    source = Source(name=name, files=(made,), read=layout.read)
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False, "progress": False}
    assert len(load_source(source, **places).test_labels) == layout.test_records
    for altered in (path.read_bytes()[:-1], path.read_bytes() + b"\0"):
        path.write_bytes(altered)
        with pytest.raises(DataError, match=rf"{ARCHIVE[name]} has SHA-256 \w+, expected {made.sha256}"):
            load_source(source, **places)


@LAYOUTS
def test_members_of_another_length_are_refused(tmp_path, name):
    layout = SMALL[name]
    files, _ = contents(layout)
    for file in (layout.train[0], layout.test):
        for altered in (files[file][:-1], files[file] + b"\0", b""):
            path = pack(tmp_path / ARCHIVE[name], layout, files | {file: altered})
            with pytest.raises(DataError, match=rf"{file} has {len(altered)} bytes, expected \d records of"):
                layout.read(name, [path])


@LAYOUTS
@pytest.mark.parametrize("packed", [True, False])
def test_missing_members_are_refused(tmp_path, name, packed):
    layout = SMALL[name]
    files, _ = contents(layout)
    del files[layout.test]
    path = pack(tmp_path / ARCHIVE[name], layout, files) if packed else unpack(tmp_path / layout.root, files)
    with pytest.raises(DataError, match=f"has no file {layout.test}"):
        layout.read(name, [path])


def test_a_link_is_no_member(tmp_path):
    layout = SMALL["cifar100"]
    files, _ = contents(layout)
    content = files.pop(layout.test)
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    path = tmp_path / ARCHIVE["cifar100"]
    with tarfile.open(path, "w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(f"{layout.root}/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        link = tarfile.TarInfo(f"{layout.root}/{layout.test}")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    with pytest.raises(DataError, match=r"has no file test.bin"):
        layout.read("cifar100", [path])


def test_labels_and_class_names_are_checked(tmp_path):
    layout = SMALL["cifar10"]
    files, _ = contents(layout)
    wrong = bytes([10]) + files[layout.test][1:]
    path = pack(tmp_path / ARCHIVE["cifar10"], layout, files | {layout.test: wrong})
    with pytest.raises(DataError, match=r"test labels run from . to 10, expected 0 to 9"):
        layout.read("cifar10", [path])
    path = pack(tmp_path / ARCHIVE["cifar10"], layout, files | {layout.class_file: b"cat\ndog\n"})
    with pytest.raises(DataError, match=r"batches.meta.txt names 2 classes, expected 10"):
        layout.read("cifar10", [path])


@pytest.mark.parametrize("alter", [lambda packed: packed[: len(packed) // 2], lambda packed: b"PK" + packed])
def test_what_is_no_archive_is_refused(tmp_path, alter):
    layout = SMALL["cifar10"]
    path = pack(tmp_path / ARCHIVE["cifar10"], layout, contents(layout)[0])
    path.write_bytes(alter(path.read_bytes()))
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz cannot be read as an archive"):
        layout.read("cifar10", [path])


def test_the_official_layouts():
    assert (5 * CIFAR10.train_records, CIFAR10.test_records) == (50_000, 10_000)
    assert (CIFAR100.train_records, CIFAR100.test_records) == (50_000, 10_000)
    for name, archive in ARCHIVE.items():
        (file,) = SOURCES[name].files
        assert (file.name, file.unpacked) == (archive, SMALL[name].root)
