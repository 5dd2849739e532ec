"""Images as the network takes them, and their order."""

import pytest
import torch

from falign.lab._batches import order, prepare, probe
from falign.lab.data import Dataset, load

CPU = torch.device("cpu")


def coloured() -> Dataset:
    images = torch.randint(0, 256, (30, 3, 4, 5), dtype=torch.uint8)
    images[:, 2] = 7
    labels = torch.arange(30) % 3
    return Dataset(
        name="coloured",
        train_images=images[:20],
        train_labels=labels[:20],
        test_images=images[20:],
        test_labels=labels[20:],
        classes=("a", "b", "c"),
    )


def test_training_images_have_mean_zero_and_deviation_one_by_channel() -> None:
    train, test = prepare(coloured(), device=CPU, dtype=torch.float64)
    x, y = train.take(slice(None))
    assert x.shape == (20, 3, 4, 5)
    assert len(test) == 10
    assert x.mean((0, 2, 3)).abs().max() < 1e-12
    deviation = x.std((0, 2, 3), unbiased=False)
    assert deviation.tolist() == pytest.approx([1, 1, 0]), "a constant channel stays finite"
    assert torch.equal(y, coloured().train_labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalising_at_once_or_by_the_batch_is_the_same(dtype: torch.dtype) -> None:
    data = coloured()
    held, stored = (prepare(data, device=CPU, dtype=dtype, room=room)[0] for room in (1 << 20, 0))
    assert held.pixels.dtype == dtype
    assert stored.pixels.dtype == torch.uint8
    assert stored.pixels.data_ptr() == data.train_images.data_ptr(), "no copy is made"
    index = torch.tensor([3, 1, 19])
    for one, other in zip(held.take(index), stored.take(index), strict=True):
        assert torch.equal(one, other)


def test_pieces_cover_the_set_in_order() -> None:
    train, _ = prepare(load("digits"), device=CPU, dtype=torch.float32)
    labels = torch.cat([y for _, y in train.pieces(100)])
    assert torch.equal(labels, train.labels)


def test_order_is_a_permutation_of_its_own_for_every_seed_and_epoch() -> None:
    found = {(seed, epoch): order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)}
    for permutation in found.values():
        assert torch.equal(permutation.sort().values, torch.arange(50))
    assert len({tuple(permutation.tolist()) for permutation in found.values()}) == 4
    torch.manual_seed(5)
    assert torch.equal(order(0, 1, 50), found[0, 1]), "nothing else has a part in it"


def test_probe_is_fixed_and_no_larger_than_the_set() -> None:
    assert torch.equal(probe(0, 50, 10), probe(0, 50, 10))
    assert len(set(probe(0, 50, 10).tolist())) == 10
    assert len(probe(0, 50, 100)) == 50
