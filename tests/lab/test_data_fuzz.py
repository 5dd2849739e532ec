"""Damaged and odd files for every reader: right, or one sentence that names the file; nothing else, and soon."""

import gzip
import hashlib
import io
import math
import random
import signal
import struct
import tarfile
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_cifar import ARCHIVE, SMALL, pack, unpack
from test_data_cifar import contents as cifar_contents
from test_data_idx import contents as idx_contents
from test_data_idx import write
from test_data_tiny_imagenet import ROOT, source_of
from test_data_tiny_imagenet import SMALL as TINY
from test_data_tiny_imagenet import contents as tiny_contents
from test_data_tiny_imagenet import pack as tiny_pack
from test_data_tiny_imagenet import unpack as tiny_unpack

from falign.lab.data import DataError, load
from falign.lab.data._download import PublishedFile
from falign.lab.data._idx import IDX_NAMES, Idx, read_idx
from falign.lab.data._loading import load_source
from falign.lab.data._registry import Source
from mutations import mutations

SECONDS = 5
LIMITS = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


def counts(fast, slow):
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=pytest.mark.slow)])


@contextmanager
def soon():
    """Fail where one input takes longer than some seconds."""

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarm")


def verdict(read, *named):
    """What was read; None where it was refused by a sentence that names one of the paths."""
    refusal = ""
    try:
        with soon():
            return read()
    except DataError as error:
        refusal = str(error)
    assert any(str(path) in refusal for path in named), refusal
    assert "\n" not in refusal.strip(), refusal
    return None


def same(one, other):
    return all(
        getattr(one, part).equal(getattr(other, part))
        for part in ("train_images", "train_labels", "test_images", "test_labels")
    )


# With a checksum no damage is ever read.


@counts(24, 600)
@pytest.mark.parametrize("packed", [True, False])
def test_published_idx(tmp_path, packed, count):
    files = idx_contents()
    source = Source(
        name="made",
        files=tuple(
            PublishedFile(
                name=f"{name}.gz", unpacked=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content)
            )
            for name, content in files.items()
        ),
        read=Idx().read,
    )
    folder = write(tmp_path / "made", files, packed)
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False, "progress": False}
    whole = load_source(source, **places)
    for number, path in enumerate(sorted(folder.iterdir())):
        before = path.read_bytes()
        for _, damaged in mutations(before, count // 4, number):
            path.write_bytes(damaged)
            # flags, time and name in the head of a gzip file may change, and it is the same content
            data = verdict(lambda: load_source(source, **places), path)
            assert data is None or (packed and same(data, whole))
        path.write_bytes(before)


@counts(8, 400)
@pytest.mark.parametrize("name", list(SMALL))
def test_published_cifar(tmp_path, name, count):
    layout = SMALL[name]
    path = pack(tmp_path / ARCHIVE[name], layout, cifar_contents(layout)[0])
    made = PublishedFile(name=ARCHIVE[name], unpacked=layout.root, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    source = Source(name=name, files=(made,), read=layout.read)
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False, "progress": False}
    for _, damaged in mutations(path.read_bytes(), count):
        path.write_bytes(damaged)
        assert verdict(lambda: load_source(source, **places), path) is None


@counts(8, 400)
def test_published_tiny_imagenet(tmp_path, count):
    source = source_of(path := tiny_pack(tmp_path / "tiny-imagenet-200.zip", tiny_contents()))
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False, "progress": False}
    for _, damaged in mutations(path.read_bytes(), count):
        path.write_bytes(damaged)
        assert verdict(lambda: load_source(source, **places), path) is None


# Folders that archives unpack to: what is not as at first is never read.


@counts(14, 350)
@pytest.mark.parametrize("name", list(SMALL))
def test_unpacked_cifar(tmp_path, name, count):
    layout = SMALL[name]
    folder = unpack(tmp_path / layout.root, cifar_contents(layout)[0])
    source = Source(
        name=name, files=(PublishedFile(name=ARCHIVE[name], unpacked=layout.root, sha256="0"),), read=layout.read
    )
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False, "progress": False}
    load_source(source, **places)
    paths = [folder / file for file in (*layout.train, layout.test, layout.class_file)]
    for number, path in enumerate(paths):
        before = path.read_bytes()
        for _, damaged in mutations(before, math.ceil(count / len(paths)), number):
            path.write_bytes(damaged)
            assert verdict(lambda: load_source(source, **places), path, folder) is None
        path.write_bytes(before)
    assert len(load_source(source, **places).test_labels) == layout.test_records


@counts(14, 350)
def test_unpacked_tiny_imagenet(tmp_path, count):
    source = source_of(archive := tiny_pack(tmp_path / "tiny-imagenet-200.zip", tiny_contents()))
    archive.unlink()
    folder = tiny_unpack(tmp_path / ROOT, tiny_contents())
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False, "progress": False}
    load_source(source, **places)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "test" not in path.parts]
    paths = [path for path in paths if not path.name.endswith("_boxes.txt")]
    for number, path in enumerate(paths):
        before = path.read_bytes()
        for _, damaged in mutations(before, math.ceil(count / len(paths)), number):
            path.write_bytes(damaged)
            assert verdict(lambda: load_source(source, **places), path, folder) is None
        path.write_bytes(before)


# Without a checksum: equal to what a plain reading gives, or refused.


def plain(content, dimensions):
    """An IDX file as NumPy reads it, if it is one."""
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error):
        return None
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < 4 + 4 * dimensions:
        return None
    sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    if 0 in sizes or math.prod(sizes) != len(content) - 4 - 4 * dimensions:
        return None
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)


@counts(40, 800)
@pytest.mark.parametrize("packed", [True, False])
def test_own_idx(tmp_path, packed, count):
    for number, (name, content) in enumerate(idx_contents().items()):
        path, dimensions = tmp_path / name, 3 if "images" in name else 1
        for _, damaged in mutations(gzip.compress(content) if packed else content, count // 4, number):
            path.write_bytes(damaged)
            found, expected = verdict(partial(read_idx, path, dimensions), path), plain(damaged, dimensions)
            assert (found is None) == (expected is None)
            assert found is None or np.array_equal(found, expected)


@counts(30, 400)
def test_idx_headers(tmp_path, count):
    path = tmp_path / IDX_NAMES[0]

    @settings(
        max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )
    @given(
        st.sampled_from([0, 1, 255]),
        st.sampled_from([8, 9, 13, 14]),
        st.integers(0, 255),
        st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)), max_size=4),
        st.binary(max_size=200),
        st.booleans(),
    )
    def check(zero, kind, dimensions, sizes, rest, packed):
        content = struct.pack(f">BBBB{len(sizes)}I", 0, zero, kind, dimensions, *sizes) + rest
        path.write_bytes(gzip.compress(content) if packed else content)
        for asked in (1, 3):
            found, expected = verdict(partial(read_idx, path, asked), path), plain(path.read_bytes(), asked)
            assert (found is None) == (expected is None)
            assert found is None or np.array_equal(found, expected)

    check()


@counts(8, 500)
def test_cifar_without_a_checksum(tmp_path, count):
    """The archive is damaged before it is compressed: the CRC of gzip says nothing of it."""
    layout = replace(SMALL["cifar100"], train_records=1, test_records=1)
    files, _ = cifar_contents(layout)
    path = pack(tmp_path / ARCHIVE["cifar100"], layout, files)
    whole = layout.read("cifar100", [path])
    plain_tar = gzip.decompress(path.read_bytes())
    draw, seen = random.Random(0), 0
    for number, (_, damaged) in enumerate(mutations(plain_tar, count)):
        if number % 2:  # most bytes are pixels: every second one is damaged in a header
            at = 512 * draw.choice(
                [k for k in range(len(plain_tar) // 512) if plain_tar[512 * k + 257 :][:5] == b"ustar"]
            )
            damaged = bytearray(plain_tar)
            damaged[at + draw.randrange(512)] = draw.randrange(256)
            if draw.random() < 0.7:  # with a checksum of tar that is right
                damaged[at + 148 : at + 156] = b" " * 8
                damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + 512])
        path.write_bytes(gzip.compress(bytes(damaged), 1))
        data = verdict(lambda: layout.read("cifar100", [path]), path, "cifar100")
        seen += data is not None
        assert data is None or data.shape == whole.shape
    assert seen


@counts(12, 500)
def test_tiny_imagenet_without_a_checksum(tmp_path, count):
    path = tiny_pack(tmp_path / "a.zip", tiny_contents())
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for number, (_, damaged) in enumerate(mutations(whole[directory:], count // 2)):
        path.write_bytes(whole[:directory] + damaged)
        data = verdict(lambda: TINY.read("tiny-imagenet", [path]), path)
        assert data is None or data.shape == (3, 64, 64), number
    for number, (_, damaged) in enumerate(mutations(whole, count // 2, 1)):
        path.write_bytes(damaged)
        data = verdict(lambda: TINY.read("tiny-imagenet", [path]), path)
        assert data is None or data.shape == (3, 64, 64), number


ENDINGS = ("png", "jpg", "bmp", "gif", "webp")


def picture(kind, options):
    noise = np.random.default_rng(3).integers(256, size=(12, 9, 3), dtype=np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(noise)
    (image.quantize(17) if kind == "gif" else image).save(stream, "JPEG" if kind == "jpg" else kind.upper(), **options)
    return stream.getvalue()


@counts(15, 500)
@pytest.mark.parametrize("kind", ENDINGS)
def test_images(tmp_path, kind, count):
    """A damaged image is what Pillow makes of it, of the size of the other ones, or refused."""
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("gif", "bmp") else {"exif": exif}
    whole = picture(kind, options)
    (tmp_path / "a" / f"0.{kind}").write_bytes(whole)
    path = tmp_path / "a" / f"1.{kind}"
    for _, damaged in mutations(whole, count):
        path.write_bytes(damaged)
        data = verdict(lambda: load(str(tmp_path), progress=False), path)
        if data is None:
            continue
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image.info.pop("transparency", None)
            expected = np.asarray(image.convert("RGB" if data.shape[0] == 3 else "L")).reshape(12, 9, -1)
        found = [one.numpy().transpose(1, 2, 0) for one in (data.train_images[0], data.test_images[0])]
        assert any(np.array_equal(one, expected) for one in found)


@counts(20, 400)
def test_folders(tmp_path_factory, count):
    """Any tree of files of any names: read, or refused by a sentence that names the folder."""
    image = picture("png", {})
    name = st.one_of(
        st.sampled_from(["train", "test", "val", "valid", "a", "b", "wnids.txt", *IDX_NAMES, f"{IDX_NAMES[0]}.gz"]),
        st.sampled_from(
            ["x.png", "y.PNG", ".png", "z.jpg", "a.tif", "data_batch_1", "cifar-10-batches-bin", "[/b].gif"]
        ),
        st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=20),
        st.binary(min_size=1, max_size=20).map(
            lambda raw: raw.translate(bytes.maketrans(b"/\0", b"__")).decode(errors="surrogateescape")
        ),
    ).filter(lambda text: text not in (".", "..") and len(text.encode(errors="surrogateescape")) < 200)
    content = st.sampled_from([image, image[:-30], b"", idx_contents()[IDX_NAMES[0]], b"\x1f\x8b"])

    @settings(
        max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )
    @given(st.lists(st.tuples(st.lists(name, min_size=1, max_size=3), content), max_size=12))
    def check(files):
        folder = tmp_path_factory.mktemp("tree")
        for parts, body in files:
            path = folder.joinpath(*parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(body)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue
        try:
            with soon():
                data = load(str(folder), progress=False)
        except DataError as error:
            refusal = str(error)
        else:
            assert data.shape in ((3, 12, 9), (1, 4, 5))
            return
        assert folder.name in refusal

    check()


def test_archives_of_another_kind(tmp_path):
    """What is an archive, and not this one."""
    layout = SMALL["cifar10"]
    path = tmp_path / ARCHIVE["cifar10"]
    for mode in ("w", "w:bz2", "w:xz"):
        with tarfile.open(path, mode) as archive:
            archive.addfile(tarfile.TarInfo(f"{layout.root}/test_batch.bin"), io.BytesIO())
        assert verdict(lambda: layout.read("cifar10", [path]), path) is None
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"y")
    assert verdict(lambda: layout.read("cifar10", [path]), path) is None
    path.write_bytes(gzip.compress(b""))
    assert verdict(lambda: layout.read("cifar10", [path]), path) is None
