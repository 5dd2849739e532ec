"""How neurons are cut into pieces and chunks."""

import pytest
import torch

from falign.theory.two_layer import activation, draw_reduced
from falign.theory.two_layer._activations import fastest_form
from falign.theory.two_layer._dual import layout, tiles


@pytest.mark.parametrize(
    ("n", "p", "runs", "expected"),
    [
        (50, 200, 50, (50, 1, 200)),
        (50, 3200, 16, (4, 4, 800)),
        (50, 12_800, 20, (1, 16, 800)),
        (50, 1600, 1, (1, 2, 800)),
        (50, 25_600, 1, (1, 16, 800)),
        (50, 12_799, 1, (1, 16, 799)),
        (1, 1, 1, (1, 1, 1)),
    ],
)
def test_layout(n, p, runs, expected):
    assert layout(n, p, runs) == expected


@pytest.mark.parametrize("p", [1, 4, 11, 12, 23])
@pytest.mark.parametrize("size", [1, 40, 100])
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_every_neuron_of_every_run_is_in_one_piece(p, size, chunk, monkeypatch):
    monkeypatch.setattr("falign.theory.two_layer._dual._CACHED", size)
    monkeypatch.setattr("falign.theory.two_layer._dual._CHUNK", chunk)
    start = draw_reduced(range(2), n=5, d=6, p=p)
    psi = fastest_form(activation("tanh"), start.U)
    found, weights = torch.zeros(6, 5, p).double(), torch.zeros(6, 1, p).double()
    for piece in tiles(start, psi, 3):
        found[piece.runs, :, piece.neurons] += piece.joined(piece.U)
        weights[piece.runs, :, piece.neurons] += piece.joined(piece.beta)
        assert piece.U.shape[-1] <= chunk
        assert piece.U.numel() <= max(size, 5 * chunk)
        assert piece.origin(3).tolist() == [run // 3 for run in range(6)[piece.runs]]
    assert torch.equal(found, start.U.repeat_interleave(3, 0))
    assert torch.equal(weights[:, 0], start.beta.repeat_interleave(3, 0))
