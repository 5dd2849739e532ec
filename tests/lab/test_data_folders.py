import numpy as np
import pytest
from PIL import Image

from falign.lab.data import DataError, load


def save(path, value, mode="RGB", size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.full((*size[::-1], 3), value, np.uint8)
    Image.fromarray(levels).convert(mode).save(path)


@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_a_split_folder(tmp_path, test):
    save(tmp_path / "train" / "dog" / "a.png", 1)
    save(tmp_path / "train" / "cat" / "b.PNG", 2)
    save(tmp_path / "train" / "cat" / "a.bmp", 3)
    save(tmp_path / "train" / "cat" / "c.jpeg", 200, "L")
    save(tmp_path / test / "dog" / "a.webp", 4)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("passed over")
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"passed over")
    (tmp_path / "train" / ".git").mkdir()
    dataset = load(str(tmp_path), progress=False)
    assert dataset.name == tmp_path.name
    assert dataset.classes == ("cat", "dog")
    assert dataset.shape == (3, 4, 5)
    assert dataset.train_labels.tolist() == [0, 0, 0, 1]
    assert dataset.train_images[:, 0, 0, 0].tolist() == [3, 2, 200, 1]
    assert dataset.test_labels.tolist() == [1]


def test_grey_images_have_one_channel(tmp_path):
    for name in ("train/a/x.png", "train/b/x.bmp", "test/a/x.jpg"):
        save(tmp_path / name, 7, "L")
    dataset = load(str(tmp_path), progress=False)
    assert dataset.shape == (1, 4, 5)
    assert dataset.train_images[0].unique().tolist() == [7]


def test_without_a_split_a_sixth_of_every_class_is_the_test_set(tmp_path):
    for name, count in (("a", 12), ("b", 7), ("c", 2), ("d", 1)):
        for k in range(count):
            save(tmp_path / name / f"{k}.png", k, "L")
    dataset = load(str(tmp_path))
    assert dataset.train_labels.bincount(minlength=4).tolist() == [10, 6, 1, 1]
    assert dataset.test_labels.bincount(minlength=4).tolist() == [2, 1, 1, 0]
    # the rule depends on names alone: this value must never change
    assert dataset.test_images[:, 0, 0, 0].tolist() == [0, 6, 6, 0]


def test_images_of_different_sizes_are_refused_by_name(tmp_path):
    for name, size in (("a", (5, 4)), ("b", (5, 4)), ("c", (4, 5)), ("d", (9, 9))):
        save(tmp_path / "one" / f"{name}.png", 0, size=size)
    with pytest.raises(DataError, match=r"a\.png is 4 × 5 and .*c\.png is 5 × 4 \(height × width\)"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_damaged_images_are_refused_by_name(tmp_path, content):
    save(tmp_path / "one" / "a.png", 0)
    noise = np.random.default_rng(0).integers(256, size=(4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "one" / "b.png")
    path = tmp_path / "one" / "b.png"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(DataError, match=r"b\.png cannot be decoded"):
        load(str(tmp_path), progress=False)


def test_sixteen_bits_are_not_clipped_in_silence(tmp_path):
    (tmp_path / "one").mkdir()
    Image.fromarray(np.full((4, 5), 60_000, np.uint16)).save(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="image of mode I;16, expected 8-bit"):
        load(str(tmp_path))


def test_folders_that_make_no_data_set(tmp_path):
    with pytest.raises(DataError, match="neither the four standard IDX files nor class folders"):
        load(str(tmp_path))
    save(tmp_path / "train" / "a" / "x.png", 0)
    with pytest.raises(DataError, match="holds train and none of test, val, valid"):
        load(str(tmp_path))
    save(tmp_path / "test" / "b" / "x.png", 0)
    with pytest.raises(DataError, match="test set has the class b and the training set has not"):
        load(str(tmp_path))
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        load(str(tmp_path))


def test_one_image_makes_no_test_set(tmp_path):
    save(tmp_path / "a" / "x.png", 0)
    with pytest.raises(DataError, match="the test set has shape"):
        load(str(tmp_path))
