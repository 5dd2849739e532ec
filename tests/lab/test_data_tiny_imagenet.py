import hashlib
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from falign.lab.data import DataError
from falign.lab.data._archives import TinyImageNet
from falign.lab.data._download import PublishedFile
from falign.lab.data._loading import load_source
from falign.lab.data._registry import SOURCES, Source
from mutations import mutations

SMALL = TinyImageNet(classes=2, train_per_class=3, tests=4)
ROOT = "tiny-imagenet-200"
WNIDS = ("n02124075", "n01443537")  # not in alphabetical order, as in the official list


def jpeg(value, mode="RGB", side=64):
    stream = io.BytesIO()
    colour = value if mode == "L" else (value, 255 - value, 128)
    Image.new(mode, (side, side), colour).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def contents():
    files = {
        "wnids.txt": "\n".join(WNIDS).encode(),
        "words.txt": b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\n",
        "val/val_annotations.txt": b"".join(
            f"val_{k}.JPEG\t{WNIDS[k % 2]}\t0\t32\t44\t62\n".encode() for k in (3, 1, 0, 2)
        ),
    }
    for label, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
        for k in range(3):
            # one grey image, as the official archive holds some
            files[f"train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(
                40 * label + 10 * k, "L" if (label, k) == (0, 1) else "RGB"
            )
    files |= {f"val/images/val_{k}.JPEG": jpeg(100 + k) for k in range(4)}
    files["test/images/test_0.JPEG"] = jpeg(7)
    return files


def pack(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{ROOT}/{name}", content)
    return path


def unpack(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def source_of(path):
    made = PublishedFile(name=path.name, unpacked=ROOT, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return Source(name="tiny-imagenet", files=(made,), read=SMALL.read)


@pytest.mark.parametrize("packed", [True, False])
def test_images_labels_and_names(tmp_path, packed):
    path = pack(tmp_path / "a.zip", contents()) if packed else unpack(tmp_path / ROOT, contents())
    dataset = SMALL.read("tiny-imagenet", [path])
    assert dataset.shape == (3, 64, 64)
    assert dataset.classes == ("Egyptian cat", "goldfish")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test_labels.tolist() == [0, 1, 0, 1]
    # JPEG is lossy by a few levels
    assert dataset.train_images[3:, 0, 0, 0].tolist() == pytest.approx([40, 50, 60], abs=3)
    assert dataset.test_images[:, 0, 9, 9].tolist() == pytest.approx([100, 101, 102, 103], abs=3)
    assert dataset.train_images[1, :, 5, 5].tolist() == [10, 10, 10]


def test_decoded_images_are_kept_in_the_cache_only_and_used(tmp_path, capsys):
    given, cache = tmp_path / "given", tmp_path / "cache"
    given.mkdir()
    path = pack(given / "tiny-imagenet-200.zip", contents())
    source = source_of(path)
    places = {"given": given, "cache": cache, "download": False}
    first = load_source(source, progress=True, **places)
    assert list(given.iterdir()) == [path]
    (kept,) = (cache / "tiny-imagenet").iterdir()
    assert kept.name == f"decoded-{source.files[0].sha256}"
    assert sorted(file.name for file in kept.iterdir()) == ["train.npy", "val.npy"]

    again = load_source(source, progress=False, **places)
    assert again.train_images.equal(first.train_images)
    assert again.test_images.equal(first.test_images)
    again.train_images.zero_()
    assert load_source(source, progress=False, **places).train_images.equal(first.train_images)

    assert np.array_equal(np.load(kept / "val.npy"), first.test_images)


def kept_of(source, **places):
    """The data, and what was kept of it."""
    data = load_source(source, progress=False, **places)
    (folder,) = (places["cache"] / "tiny-imagenet").iterdir()
    return data, folder


def test_damaged_kept_images_are_decoded_again(tmp_path):
    source = source_of(pack(tmp_path / "tiny-imagenet-200.zip", contents()))
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False}
    first, kept = kept_of(source, **places)
    whole = {file: file.read_bytes() for file in kept.iterdir()}
    train, val = kept / "train.npy", kept / "val.npy"
    other = io.BytesIO()
    np.save(other, np.zeros((4, 3, 64, 65), np.uint8))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}]), allow_pickle=True)
    pixel = len(whole[train]) // 2
    damages = {
        train: [
            b"",
            b"\x93NUMPY",
            whole[train][:-1],
            whole[train] + b"\0",
            whole[train][:pixel] + bytes([whole[train][pixel] ^ 1]) + whole[train][pixel + 1 :],
            pickled.getvalue(),
            pickled.getvalue() + hashlib.sha256(pickled.getvalue()).hexdigest().encode(),
        ],
        val: [other.getvalue(), whole[train], *(content for _, content in mutations(whole[val], 40))],
    }
    for file, contents_of_it in damages.items():
        for damaged in contents_of_it:
            file.write_bytes(damaged)
            again, _ = kept_of(source, **places)
            assert again.train_images.equal(first.train_images)
            assert again.test_images.equal(first.test_images)
            assert again.notes == (f"{file} was damaged: its images were decoded again",)
            assert {path: path.read_bytes() for path in kept.iterdir()} == whole
    assert kept_of(source, **places)[0].notes == ()


def test_kept_images_of_another_archive_are_not_used(tmp_path):
    places = {"given": tmp_path, "cache": tmp_path / "cache", "download": False}
    archive = tmp_path / "tiny-imagenet-200.zip"
    _, before = kept_of(source_of(pack(archive, contents())), **places)
    before.rename(tmp_path / "before")
    _, now = kept_of(source := source_of(pack(archive, contents() | {CAT: jpeg(200)})), **places)
    (tmp_path / "before" / "train.npy").replace(now / "train.npy")
    data, _ = kept_of(source, **places)
    assert data.train_images[0, 0, 0, 0].item() == pytest.approx(200, abs=3)


def test_what_a_killed_process_left_half_decoded_is_removed(tmp_path):
    source = source_of(pack(tmp_path / "tiny-imagenet-200.zip", contents()))
    kept = tmp_path / "cache" / "tiny-imagenet" / f"decoded-{source.files[0].sha256}"
    (kept / ".partial-killed").mkdir(parents=True)
    (kept / ".partial-killed" / "train.npy").write_bytes(b"half")
    load_source(source, given=tmp_path, cache=tmp_path / "cache", download=False, progress=False)
    assert sorted(file.name for file in kept.iterdir()) == ["train.npy", "val.npy"]


@pytest.mark.parametrize("file", ["wnids.txt", "val/val_annotations.txt", "train/n02124075/images/n02124075_2.JPEG"])
def test_an_unpacked_folder_that_changes_after_its_first_use_is_refused(tmp_path, file):
    archive = pack(tmp_path / "tiny-imagenet-200.zip", contents())
    source = source_of(archive)
    archive.unlink()
    folder = unpack(tmp_path / "data" / ROOT, contents())
    places = {"given": tmp_path / "data", "cache": tmp_path / "cache", "download": False, "progress": False}
    first = load_source(source, **places)
    (folder / "test" / "images" / "test_0.JPEG").unlink()  # never read
    assert load_source(source, **places).test_images.equal(first.test_images)
    (record,) = (tmp_path / "cache" / "tiny-imagenet").iterdir()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content + b"\n")  # still the same lists, and the same picture
    with pytest.raises(DataError, match=rf"{ROOT} has SHA-256 \w+, expected \w+ as when it was first read.*remove"):
        load_source(source, **places)
    record.unlink()
    assert load_source(source, **places).notes == ()
    record.write_bytes(record.read_bytes().replace(b"sha256", b"sha257"))
    assert "nobody knows whether" in load_source(source, **places).notes[0]
    assert load_source(source, **places).notes == ()


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    path = pack(tmp_path / "tiny-imagenet-200.zip", contents())
    (tmp_path / "cache").write_bytes(b"a file where a folder would be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        SMALL.read("tiny-imagenet", [path], keep=tmp_path / "cache" / "decoded")


def test_an_altered_archive_is_refused_by_its_checksum(tmp_path):
    path = pack(tmp_path / "tiny-imagenet-200.zip", contents())
    source = source_of(path)
    for altered in (path.read_bytes()[:-1], path.read_bytes() + b"\0"):
        path.write_bytes(altered)
        with pytest.raises(DataError, match=r"tiny-imagenet-200.zip has SHA-256 \w+, expected"):
            load_source(source, given=tmp_path, cache=tmp_path / "cache", download=False, progress=False)


CAT, FISH = (f"train/{wnid}/images/{wnid}_0.JPEG" for wnid in WNIDS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({FISH: None}, f"has no file {FISH}"),
        ({"val/images/val_3.JPEG": None}, r"has no file val/images/val_3.JPEG"),
        ({"words.txt": None}, r"has no file words.txt"),
        ({CAT: jpeg(0)[:-300]}, rf"{CAT} cannot be decoded"),
        ({CAT: b"not a picture"}, rf"{CAT} cannot be decoded"),
        ({CAT: jpeg(0, side=32)}, rf"{CAT} is an image of 32 × 32, expected 64 × 64"),
        ({"wnids.txt": b"n01443537"}, r"names 1 different classes, expected 2"),
        ({"wnids.txt": b"n01443537\nn01443537"}, r"names 1 different classes, expected 2"),
        ({"wnids.txt": b"n01443537\n../../etc"}, r"names 1 different classes, expected 2"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn01443537\n"}, r"gives val_1.JPEG the class None"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn99999999\n"}, r"gives val_0.JPEG the class n99999999"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_parts_are_refused_by_name(tmp_path, changes, words, packed):
    files = {name: content for name, content in (contents() | changes).items() if content is not None}
    path = pack(tmp_path / "a.zip", files) if packed else unpack(tmp_path / ROOT, files)
    with pytest.raises(DataError, match=words):
        SMALL.read("tiny-imagenet", [path])


def test_what_is_no_archive_is_refused(tmp_path):
    path = pack(tmp_path / "a.zip", contents())
    whole = path.read_bytes()
    at = whole.index(contents()[CAT]) + 200
    for altered in (whole[:-100], b"", whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]):
        path.write_bytes(altered)
        with pytest.raises(DataError, match=r"a.zip cannot be read as an archive"):
            SMALL.read("tiny-imagenet", [path])


def test_the_official_layout():
    official = TinyImageNet()
    assert (official.classes * official.train_per_class, official.tests) == (100_000, 10_000)
    (file,) = SOURCES["tiny-imagenet"].files
    assert (file.name, file.unpacked) == ("tiny-imagenet-200.zip", ROOT)
