"""Odd folders, files and names: each is read right, or refused in one sentence that names it."""

import gzip
import os
import pickle
import re
import socket

import numpy as np
import pytest
from PIL import Image
from test_data_folders import save
from test_data_idx import contents, idx, write

from falign.lab.data import DataError, load
from falign.lab.data._download import content_sha256
from falign.lab.data._idx import IDX_NAMES, read_idx, spellings
from falign.lab.data._loading import load_source
from falign.lab.data._registry import SOURCES

POSIX = pytest.mark.skipif(os.name != "posix", reason="no pipes, links or users as here")


def images(folder, classes=("a", "b"), count=3):
    """A folder of images by class."""
    for label, name in enumerate(classes):
        for k in range(count):
            save(folder / name / f"{k}.png", 40 * label + k, "L")
    return folder


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path)[-100:])


def loop(path):
    path.symlink_to(path)


def nowhere(path):
    path.symlink_to(path.parent / "gone")


def zero(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


@POSIX
@pytest.mark.parametrize("make", [pipe, listening, loop, nowhere, zero, folder])
def test_what_is_no_file_among_images(tmp_path, monkeypatch, make):
    monkeypatch.chdir(images(tmp_path) / "a")
    make((tmp_path / "a" / "x.png") if make is not listening else type(tmp_path)("x.png"))
    with pytest.raises(
        DataError, match=r"a/x\.png (cannot be opened \(.+\)|is a pipe, a device or a socket), expected"
    ):
        load(str(tmp_path), progress=False)


@POSIX
@pytest.mark.parametrize("make", [pipe, loop, zero, folder])
@pytest.mark.parametrize("name", [None, "mnist", "mnist-10k"])
def test_what_is_no_file_among_idx_files(tmp_path, make, name):
    own = write(tmp_path / (name or "own"), contents())
    (own / f"{IDX_NAMES[1]}.gz").unlink()
    make(own / f"{IDX_NAMES[1]}.gz")
    with pytest.raises(DataError, match=r"train-labels|train-images-idx3-ubyte.gz has SHA-256"):
        load(name or str(own), folder=tmp_path, download=False, progress=False)


@POSIX
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_a_pipe_in_place_of_an_archive(tmp_path, name):
    (file,) = SOURCES[name].files
    pipe(tmp_path / file.name)
    with pytest.raises(DataError, match=rf"{file.name} is a pipe, a device or a socket"):
        load(name, folder=tmp_path, download=False, progress=False)
    (tmp_path / file.name).unlink()
    unpacked = tmp_path / file.unpacked
    unpacked.mkdir()
    pipe(unpacked / {"cifar10": "data_batch_1.bin", "cifar100": "train.bin"}.get(name, "wnids.txt"))
    with pytest.raises(DataError, match=r"is a pipe, a device or a socket"):
        load(name, folder=tmp_path, download=False, progress=False)


def test_a_file_that_vanishes_between_listing_and_reading(tmp_path, monkeypatch):
    images(tmp_path)
    unlinked = []

    def remove(items, *_, **__):
        unlinked.append((tmp_path / "b" / "1.png").unlink())
        return items

    monkeypatch.setattr("falign.lab.data._folders.track", remove)
    with pytest.raises(DataError, match=r"b/1\.png cannot be opened \(No such file or directory\)"):
        load(str(tmp_path))
    assert unlinked


def test_an_image_that_changes_between_listing_and_reading(tmp_path, monkeypatch):
    images(tmp_path)

    def replace(items, *_, **__):
        save(tmp_path / "b" / "1.png", 3, "L", size=(1, 1))  # which would fit, by broadcasting
        return items

    monkeypatch.setattr("falign.lab.data._folders.track", replace)
    with pytest.raises(DataError, match=r"b/1\.png is an image of 1 × 1, expected 4 × 5"):
        load(str(tmp_path))


@POSIX
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="needs a second user")
@pytest.mark.parametrize("where", [".", "b", "b/1.png", "idx"])
def test_what_may_not_be_read(tmp_path, monkeypatch, where):
    target, asked = images(tmp_path) / where, "."
    if where == "idx":
        target, asked = write(tmp_path / "own", contents()) / f"{IDX_NAMES[2]}.gz", "own"
    monkeypatch.chdir(tmp_path)  # nobody else may look into the folders above
    tmp_path.chmod(0o755)
    target.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(DataError, match=r"Permission denied\), expected") as refusal:
            load(asked, progress=False)
    finally:
        os.seteuid(0)
        target.chmod(0o755)
    assert target.name in str(refusal.value) or where == "."


@pytest.mark.parametrize(
    "path",
    ["x" * 300, "y/" * 3000, "a\0b", "~nobody-is-called-so/data", "\udcff\udcfe", "[/red]", "\x1b[31m", "\n", "."],
)
def test_odd_paths(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="expected"):
        load(path, progress=False)
    if path != ".":
        with pytest.raises(DataError, match="expected"):
            load("mnist", folder=type(tmp_path)(path), download=False)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "set.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"set\.npz' is neither a known data set nor an existing folder"):
        load(str(tmp_path / "set.npz"))


@POSIX
def test_names_that_are_not_utf_8_are_data(tmp_path):
    for k in range(6):
        image = tmp_path / os.fsdecode(b"gr\xfcn") / os.fsdecode(b"M\xfcller-%d.png" % k)
        save(image.with_name(f"{k}.png"), k, "L")
        image.with_name(f"{k}.png").rename(image)
    save(tmp_path / "[b] :cat: \x1b[2J\n" / "x.png", 9, "L")
    data = load(str(tmp_path))
    assert set(data.classes) == {"gr\udcfcn", "[b] :cat: \x1b[2J\n"}
    assert len(data.train_labels) == 6
    assert data.test_images[:, 0, 0, 0].tolist() == [2]  # it depends on the bytes of the names, and must never change
    (tmp_path / os.fsdecode(b"gr\xfcn") / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    with pytest.raises(DataError, match=re.escape("\udcff.png cannot be decoded")):
        load(str(tmp_path))


def test_the_split_of_ordinary_names_is_as_it_was(tmp_path):
    for k in range(12):
        save(tmp_path / "ä" / f"größe-{k}.png", k, "L")
    assert load(str(tmp_path)).test_images[:, 0, 0, 0].tolist() == [0, 6]


@pytest.mark.parametrize("ending", [".tif", ".heic", ".npy", ""])
def test_files_that_are_passed_over_are_counted(tmp_path, ending):
    images(tmp_path)
    assert load(str(tmp_path)).notes == ()
    for k in range(3):
        (tmp_path / "a" / f"{k}{ending.upper()}").write_bytes(b"?")
    (tmp_path / "b" / "notes.txt").write_text("")
    words = f"3 {ending or 'without ending'}"
    (note,) = load(str(tmp_path)).notes
    assert note.startswith(f"passed over: {words}, 1 .txt, read are .bmp, .gif")
    for k in range(3):
        (tmp_path / "a" / f"{k}.png").unlink()
    with pytest.raises(DataError, match=rf"a holds no images but {words}, expected"):
        load(str(tmp_path))


def test_odd_sets_are_read_and_said(tmp_path):
    one = load(str(images(tmp_path / "one", ("only",))))
    assert one.notes == ("one has one class only: there is nothing to tell apart",)
    images(tmp_path / "few", count=2)
    save(tmp_path / "few" / "c" / "x.png", 200, "L")
    assert load(str(tmp_path / "few")).notes == ("few has no test image of class c",)
    for k in range(3):
        save(tmp_path / "swapped" / "train" / "a" / f"{k}.png", k, "L")
        save(tmp_path / "swapped" / "test" / "a" / f"{k}.png", k, "L")
        save(tmp_path / "swapped" / "test" / "a" / f"{k}.bmp", k + 100, "L")
    assert load(str(tmp_path / "swapped")).notes[1:] == (
        "swapped has 3 training and 6 test images: check that they are not swapped",
        "swapped: 3 of 6 test images are training images too",
    )


def test_labels_that_begin_with_one_are_said(tmp_path):
    files = contents()
    for name, labels in ((IDX_NAMES[1], [1, 2, 3, 7, 1, 2]), (IDX_NAMES[3], [1, 2, 7])):
        files[name] = idx(np.array(labels, np.uint8))
    data = load(str(write(tmp_path / "own", files)))
    assert len(data.classes) == 8
    assert data.notes == (
        "own has no training image of class 0, 4, 5, 6",
        "own has no test image of class 0, 3, 4, 5, 6",
    )


@pytest.mark.parametrize("place", range(1, 12))
def test_the_names_of_kaggle_and_seven_zip(tmp_path, place):
    plain = write(tmp_path / "plain", contents(), packed=False)
    other = tmp_path / "other"
    for name, content in contents().items():
        path = other / spellings(name)[place]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if place % 2 else content)  # whatever the name says
    expected, data = load(str(plain)), load(str(other))
    assert data.train_images.equal(expected.train_images)
    assert data.test_labels.equal(expected.test_labels)


def test_a_named_set_under_the_names_of_kaggle(tmp_path, data_folder):
    for file in SOURCES["fashion-mnist"].files:
        (tmp_path / file.unpacked.replace("-idx", ".idx")).write_bytes(
            gzip.decompress((data_folder / "fashion-mnist" / file.name).read_bytes())
        )
    assert load("fashion-mnist", folder=tmp_path, download=False).notes == ()


@pytest.mark.parametrize("rest", [0, 2])
def test_emnist_is_named(tmp_path, rest):
    for part in ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1"):
        (tmp_path / f"emnist-letters-{part}-ubyte.gz").write_bytes(b"")
    write(tmp_path, dict(list(contents().items())[:rest]))
    with pytest.raises(DataError, match=r"holds emnist-letters-test-images-idx3-ubyte.gz, .* expected the four"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_an_unpacked_set_given_as_a_path(tmp_path, name):
    source = SOURCES[name]
    (file,) = source.files
    for place in (file.unpacked, "renamed"):
        for mark in source.marks:
            path = tmp_path / place / mark
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        called = f", called {file.unpacked}" if place == "renamed" else ""
        with pytest.raises(
            DataError, match=rf"by the name {name}, from the folder that it is in{called} \(--data {tmp_path}"
        ):
            load(str(tmp_path / place))
    with pytest.raises(DataError, match=rf"holds {file.unpacked}, expected .*: load it by the name {name}"):
        load(str(tmp_path))


@pytest.mark.parametrize(("name", "number"), [("cifar10", 10), ("cifar100", 100)])
def test_python_pickles_are_named_and_never_read(tmp_path, name, number):
    folder = tmp_path / (f"cifar-{number}-batches-py" if number == 10 else f"cifar-{number}-python")
    folder.mkdir()
    (folder / ("data_batch_1" if number == 10 else "train")).write_bytes(pickle.dumps({b"data": b""}))
    for ask in (
        lambda: load(name, folder=tmp_path, download=False),
        lambda: load(str(tmp_path)),
        lambda: load(str(folder)),
    ):
        with pytest.raises(
            DataError, match=rf"holds {name} as Python pickles, .* never read: get cifar-{number}-binary"
        ):
            ask()


def test_mnist_10k_that_changes_after_its_first_use_is_refused(tmp_path):
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False, "progress": False}
    source = SOURCES["mnist-10k"]
    files = contents()
    folder = write(tmp_path / "mnist-10k", files)
    assert load_source(source, **places).notes == ()
    write(folder, files, packed=False)
    for name in files:
        (folder / f"{name}.gz").unlink()
    assert load_source(source, **places).notes == ()
    for name, at in ((IDX_NAMES[0], 20), (IDX_NAMES[3], 9)):
        write(
            folder,
            files | {name: files[name][:at] + bytes([files[name][at] ^ 1]) + files[name][at + 1 :]},
            packed=False,
        )
        with pytest.raises(DataError, match=r"has SHA-256 \w+, expected \w+ as when it was first read"):
            load_source(source, **places)
    write(folder, files, packed=False)
    assert load_source(source, **places).train_images.shape == (6, 1, 4, 5)


@pytest.mark.parametrize(
    ("mode", "options", "shape"),
    [
        ("P", {"transparency": bytes([0, 255, 128])}, 3),
        ("P", {"transparency": 0}, 3),
        ("RGBA", {}, 3),
        ("LA", {}, 1),
        ("1", {}, 1),
        ("RGB", {"transparency": (1, 2, 3)}, 3),
        ("L", {"transparency": 5}, 1),
    ],
)
def test_transparency_is_dropped(tmp_path, mode, options, shape):
    for k in range(2):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), (k + 1, k + 1, k + 1)).convert(mode).save(tmp_path / "a" / f"{k}.png", **options)
    data = load(str(tmp_path))
    assert data.shape == (shape, 4, 5)
    with Image.open(tmp_path / "a" / "0.png") as image:
        expected = np.asarray(image.convert("RGBA"))[..., :3]
    both = [*data.train_images, *data.test_images]
    assert any(np.array_equal(one.numpy().transpose(1, 2, 0), expected[..., :shape]) for one in both)


def test_four_inks_and_a_turned_picture(tmp_path):
    turned = Image.new("RGB", (5, 4), (10, 200, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    turned.save(tmp_path / "a" / "0.jpg", exif=exif)
    Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(tmp_path / "a" / "1.jpg", quality=100)
    data = load(str(tmp_path))
    assert data.shape == (3, 4, 5)  # as stored, not as EXIF would have it turned
    levels = sorted(
        one.flatten(1).float().mean(1).round().tolist() for one in (data.train_images[0], data.test_images[0])
    )
    assert levels[1][0] > 230  # red
    assert max(levels[1][1:]) < 30


def test_an_animation_gives_its_first_frame(tmp_path):
    (tmp_path / "a").mkdir()
    for name, kind in (("0", "gif"), ("1", "webp")):
        frames = [Image.new("RGB", (5, 4), (k, 0, 255 - k)) for k in range(60)]
        frames[0].save(tmp_path / "a" / f"{name}.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    data = load(str(tmp_path))
    for one in (data.train_images[0], data.test_images[0]):
        assert one[:, 0, 0].tolist() == [0, 0, 255]


def test_what_is_called_an_image_and_is_another_format(tmp_path):
    images(tmp_path)
    Image.new("L", (5, 4)).save(tmp_path / "a" / "x.tif")
    (tmp_path / "a" / "x.tif").rename(tmp_path / "a" / "x.png")
    with pytest.raises(DataError, match=r"x\.png cannot be decoded"):
        load(str(tmp_path))


def test_the_checksum_of_more_than_is_expected_is_not_computed(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes(5_000_000)))
    assert content_sha256(path, at_most=4_999_999) is None
    assert content_sha256(path, at_most=5_000_000) == content_sha256(path)


def test_a_damaged_image_header_of_idx_says_what_it_is(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x80\x04K\x05" * 9)
    with pytest.raises(DataError, match=r"begins with 80044b05 and has at least 16 bytes, expected the magic"):
        read_idx(path, 3)
