"""Small files that would become huge: refused in one sentence, within the memory that the docs state, and soon."""

import gzip
import io
import os
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from test_data_cifar import SMALL as CIFARS
from test_data_cifar import contents as cifar_contents
from test_data_folders import save
from test_data_idx import contents, idx, write
from test_data_tiny_imagenet import ROOT, WNIDS
from test_data_tiny_imagenet import SMALL as TINY
from test_data_tiny_imagenet import contents as tiny_contents

from falign.lab import _memory
from falign.lab.data import DataError, load
from falign.lab.data._cache import load_cached_images
from falign.lab.data._idx import IDX_NAMES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")

MIB = 2**20
BOUND = 256 * MIB
SECONDS = 20
CIFAR = CIFARS["cifar100"]


def status(field):
    """A number of bytes from the state of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def outcome(do):
    """What a fresh process says of it, and the memory that it took at most beside what it had."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads
        pid = os.fork()
    if pid == 0:
        said = "crashed"
        try:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")  # forget the highest memory so far
            before = status("VmRSS")
            try:
                do()
                said = f"{status('VmHWM') - before} read"
            except DataError as error:
                said = f"{status('VmHWM') - before} {error}"
        except BaseException as error:
            said = f"{error!r}"
        finally:
            os.write(writing, said[:4000].encode(errors="replace"))
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


def refused(do, words, bound=BOUND):
    begun = time.monotonic()
    taken, _, sentence = outcome(do).partition(" ")
    assert taken.lstrip("-").isdigit(), (taken, sentence)
    assert words in sentence
    assert int(taken) < bound, f"{int(taken) / MIB:.0f} MiB for: {sentence}"
    assert time.monotonic() - begun < SECONDS


def zeros(mib):
    """A gzip file of very many zeros: files that follow each other unpack to one."""
    return gzip.compress(bytes(MIB)) * mib


@pytest.mark.parametrize("file", IDX_NAMES)
@pytest.mark.parametrize("mib", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_idx_that_unpacks_to_more_than_its_header_says(tmp_path, file, mib):
    write(tmp_path, contents())
    path = tmp_path / f"{file}.gz"
    path.write_bytes(path.read_bytes() + zeros(mib))
    refused(lambda: load(str(tmp_path)), f"{file}.gz has at least 65")


def test_idx_under_a_name_of_the_table_is_not_unpacked_to_its_end(tmp_path):
    write(tmp_path, contents())
    (tmp_path / f"{IDX_NAMES[3]}.gz").write_bytes(zeros(3000))  # the smallest of the four
    for k in range(3):
        (tmp_path / f"{IDX_NAMES[k]}.gz").unlink()
    from falign.lab.data._registry import SOURCES

    file = SOURCES["mnist"].files[3]
    refused(lambda: file.check(file.find(tmp_path)), "unpacks to more than 290,688 bytes")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("file", "sizes"),
    [
        (0, (2**32 - 1,) * 3),
        (0, (60_000, 30_000, 30_000)),
        (2, (2**31, 2, 3)),
        (1, (2**32 - 1,)),
        (3, (10**9,)),
    ],
)
def test_idx_with_a_header_that_announces_more_than_the_file_can_hold(tmp_path, packed, file, sizes):
    header = struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)
    write(tmp_path, contents() | {IDX_NAMES[file]: header + bytes(1000)}, packed)
    # what fits into no memory at all is refused as that, before anything is unpacked
    refused(lambda: load(str(tmp_path)), "expected")


def test_idx_with_more_than_the_memory_and_a_file_as_long(tmp_path):
    write(tmp_path, contents(), packed=False)
    with (tmp_path / IDX_NAMES[0]).open("wb") as stream:
        stream.write(struct.pack(">4B3I", 0, 0, 8, 3, 2**20, 2**10, 2**11))
        stream.truncate(16 + 2**41)  # holes take no room on the disk
    refused(lambda: load(str(tmp_path)), "needs 2.05e+03 GiB of memory")


def test_labels_become_eight_times_as_large(tmp_path):
    count = _memory.available() // 8
    write(tmp_path, contents(), packed=False)
    with (tmp_path / IDX_NAMES[1]).open("wb") as stream:
        stream.write(struct.pack(">4BI", 0, 0, 8, 1, min(count, 2**32 - 1)))
        stream.truncate(8 + min(count, 2**32 - 1))
    refused(lambda: load(str(tmp_path)), "of memory, expected at most the")


@pytest.mark.parametrize(("train", "test"), [(700_000, 900_000), (10, 1_200_000)])
def test_many_small_images_take_no_more_than_large_ones(train, test, tmp_path):
    """Images are looked at one after the other, so that each costs what it holds."""
    parts = ((train, 1, 2), (train,), (test, 1, 2), (test,))
    for name, sizes in zip(IDX_NAMES, parts, strict=True):
        header = struct.pack(f">4B{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + bytes(np.prod(sizes))))
    taken, _, sentence = outcome(lambda: load(str(tmp_path))).partition(" ")
    assert sentence == "read"
    assert int(taken) < 2 * 9 * (train + test) + BOUND


@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        ("0::/user.slice/job\n", {"user.slice/memory.max": "3000000", "user.slice/job/memory.max": "max"}, 3000000),
        ("0::/a\n", {"memory.max": "5000000", "a/memory.max": "4000000"}, 4000000),
        ("4:memory,x:/a/b\n1:cpu:/\n", {"memory/a/memory.limit_in_bytes": "6000000"}, 6000000),
        ("no such line", {"memory/memory.limit_in_bytes": "7000000"}, 7000000),
    ],
)
def test_the_memory_is_that_of_the_narrowest_control_group(groups, limits, least, tmp_path, monkeypatch):
    monkeypatch.setattr(_memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(_memory, "_MINE", tmp_path / "mine")
    (tmp_path / "mine").write_text(groups)
    for name, text in limits.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert _memory.available() == least


def tar(path, *members):
    """A tar archive of raw blocks: what no tool writes can be in it."""
    with gzip.open(path, "wb", 1) as stream:
        for head, content, size in members:
            stream.write(head)
            for _ in range(0, size, MIB):
                stream.write(content)
        stream.write(bytes(1024))
    return path


def block(name, kind, size):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def test_tar_members_of_every_hostile_kind(tmp_path):
    path = tmp_path / "cifar-100-binary.tar.gz"
    whole = f"{CIFAR.root}/test.bin"
    hostile = {
        "pax": [(block("x", tarfile.XHDTYPE, 300 * MIB), b"1" * MIB, 300 * MIB)],
        "long name": [(block("x", tarfile.GNUTYPE_LONGNAME, 300 * MIB), b"n" * MIB, 300 * MIB)],
        "large member": [(block(whole, tarfile.REGTYPE, 300 * MIB), bytes(MIB), 300 * MIB)],
        "larger than there is": [(block(whole, tarfile.REGTYPE, 2**40), bytes(MIB), MIB)],
        "other member": [(block("readme", tarfile.REGTYPE, 300 * MIB), bytes(MIB), 300 * MIB)],
        "sparse": [(block(whole, tarfile.GNUTYPE_SPARSE, 2**40), bytes(MIB), MIB)],
        "many members": [(block("x", tarfile.REGTYPE, 0) * 100_000, b"", 0)],
    }
    for members in hostile.values():
        tar(path, *members)
        refused(lambda: CIFAR.read("cifar100", [path]), str(path))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
@pytest.mark.parametrize("place", ["{}", "/{}", "../{}", "./x/../{}"])
def test_only_regular_members_of_the_exact_name_count(tmp_path, kind, place):
    files, _ = cifar_contents(CIFAR)
    content = files.pop("test.bin")
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(f"{CIFAR.root}/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        member = tarfile.TarInfo(place.format(f"{CIFAR.root}/test.bin"))
        if place == "{}":
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        else:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"has no file test\.bin"):
        CIFAR.read("cifar100", [path])


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    files, _ = cifar_contents(CIFAR)
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, body in (*files.items(), ("test.bin", bytes(len(files["test.bin"])))):
            member = tarfile.TarInfo(f"{CIFAR.root}/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    with pytest.raises(DataError, match=r"has the file test\.bin more than once"):
        CIFAR.read("cifar100", [path])
    path = tmp_path / "a.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name in ("wnids.txt", "wnids.txt"):
            archive.writestr(f"{ROOT}/{name}", "\n".join(WNIDS))
    with pytest.raises(DataError, match=r"has the file wnids\.txt more than once"):
        TINY.read("tiny-imagenet", [path])


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", f"train/{WNIDS[0]}/images/{WNIDS[0]}_1.JPEG"])
@pytest.mark.parametrize("how", ["declared", "hidden", "lzma", "folder"])
def test_large_members_of_zip_files_and_folders(tmp_path, name, how):
    path = tmp_path / ROOT if how == "folder" else tmp_path / "a.zip"
    if how == "folder":
        for each, content in tiny_contents().items():
            (path / each).parent.mkdir(parents=True, exist_ok=True)
            (path / each).write_bytes(content)
        os.truncate(path / name, 2**40)
    else:
        kind = zipfile.ZIP_LZMA if how == "lzma" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive:
            for each, content in tiny_contents().items():
                archive.writestr(f"{ROOT}/{each}", bytes(300 * MIB) if each == name and how != "lzma" else content)
        if how == "hidden":  # the size in the directory is another than the content's
            whole = path.read_bytes().replace(struct.pack("<I", 300 * MIB), struct.pack("<I", 1000))
            path.write_bytes(whole)
    refused(lambda: TINY.read("tiny-imagenet", [path]), "get it anew")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, bits=8, colour=2):
    head = struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def bmp(width, height):
    return b"BM" + struct.pack("<4I2i2H6I", 54, 0, 54, 40, width, height, 1, 24, *[0] * 6)


BIG = zlib.compress(bytes(300 * MIB))
IMAGES = {
    "png of 13000": png(13_000, 13_000, chunk(b"IDAT", zlib.compress(bytes(1000)))),
    "png of 2^31": png(2**31 - 1, 2**31 - 1),
    "png of nothing": png(0, 7),
    "png with a profile": png(5, 4, chunk(b"iCCP", b"x\0\0" + BIG), chunk(b"IDAT", BIG[:1000])),
    "png with a text": png(5, 4, chunk(b"zTXt", b"x\0\0" + BIG), chunk(b"IDAT", BIG[:1000])),
    "png with a long text": png(5, 4, chunk(b"iTXt", b"x\0\1\0\0\0" + BIG), chunk(b"IDAT", BIG[:1000])),
    "gif of 65535": b"GIF89a"
    + struct.pack("<2H", 65535, 65535)
    + b"\x80\0\0"
    + bytes(6)
    + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    "bmp of 30000": b"BM"
    + struct.pack("<3I", 54, 0, 54)
    + struct.pack("<I2i2H6I", 40, 30_000, 30_000, 1, 24, *[0] * 6),
    "bmp below 0": b"BM" + struct.pack("<3I", 54, 0, 54) + struct.pack("<I2i2H6I", 40, -5, -(2**31), 1, 24, *[0] * 6),
    "jpeg of 65500": b'\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\3\1"\0\2\x11\1\3\x11\1\xff\xd9',
    "webp of 16383": b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0\x2f\xff\xff\xff\x07" + bytes(13),
}


@pytest.mark.parametrize("name", list(IMAGES))
def test_images_that_announce_more_than_they_have(tmp_path, name):
    (tmp_path / "a").mkdir()
    for k in range(2):
        (tmp_path / "a" / f"{k}.{name.partition(' ')[0]}").write_bytes(IMAGES[name])
    refused(lambda: load(str(tmp_path), progress=False), str(tmp_path / "a" / "0."))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
def test_an_image_file_of_a_terabyte(tmp_path, suffix):
    save(tmp_path / "a" / f"0{suffix}", 1)
    os.truncate(tmp_path / "a" / f"0{suffix}", 2**40)
    refused(lambda: load(str(tmp_path), progress=False), f"0{suffix} has more than 268,435,456 bytes")


def test_a_folder_that_is_more_than_the_memory(tmp_path):
    """Each of them would fit."""
    (tmp_path / "a").mkdir()
    for k in range(400):
        (tmp_path / "a" / f"{k}.png").write_bytes(png(9000, 9000, chunk(b"IDAT", zlib.compress(bytes(1000)))))
    refused(
        lambda: load(str(tmp_path), progress=False), f"the set in {tmp_path} needs 90.5 GiB of memory, expected at most"
    )


def test_kept_images_of_a_terabyte_are_not_read(tmp_path):
    path = tmp_path / "train.npy"
    np.save(path, np.zeros((2, 3, 4, 4), np.uint8))
    os.truncate(path, 2**40)
    assert load_cached_images(path, (2, 3, 4, 4)) is None


def test_what_a_set_takes_while_it_is_read(tmp_path):
    """The statement of the docs, of a set that is right: at most twice its images and 256 MiB."""
    count, side = 2000, 256
    rows = np.zeros((count, side, side), np.uint8)
    files = contents() | {IDX_NAMES[0]: idx(rows), IDX_NAMES[1]: idx(np.zeros(count, np.uint8))}
    files[IDX_NAMES[2]] = idx(rows[:2])
    files[IDX_NAMES[3]] = idx(np.zeros(2, np.uint8))
    write(tmp_path, files)
    del files

    def read():
        before = status("VmRSS")
        load(str(tmp_path))
        raise DataError(f"{(status('VmHWM') - before) / rows.nbytes:.2f}")

    _, _, share = outcome(read).partition(" ")
    assert 1 < float(share) < 2
