"""Measuring where users put it: between a forward and its backward, behind hooks, with odd layers and optimizers."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import falign
from cases import batch, build, loss_of
from falign.measure import Monitor, alignment


def true_norms(model, x, y):
    with falign.backprop(model):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
        parameters = {
            name: [p for key, p in layer.named_parameters() if "feedback" not in key] for name, layer in layers.items()
        }
        loss = loss_of(model(x), y)
        return {
            name: float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, own, retain_graph=True)]).norm())
            for name, own in parameters.items()
        }


def test_a_hook_before_a_layer_is_walked_through():
    model, (x, y) = build("mlp"), batch("mlp")
    model[2].register_forward_pre_hook(lambda layer, args: (args[0] * 3,))
    falign.convert(model, "fa")
    expected = true_norms(model, x, y)
    for row in alignment(model, loss_of, x, y).layers:
        assert row.gradient_norm == pytest.approx(expected[row.layer], rel=1e-9)


@pytest.mark.parametrize("rule", ["fa", "dfa", "brsf", "adafa"])
def test_between_a_forward_and_its_backward(rule):
    """Batch normalisation and moving feedback keep buffers that the pending backward has saved."""
    x, y = torch.randn(16, 9), torch.randint(3, (16,))
    slopes = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        falign.convert(model, rule)
        loss = loss_of(model(x), y)
        if measured:
            alignment(model, loss_of, x, y)
        loss.backward()
        slopes.append(model[0].weight.grad)
    assert torch.equal(*slopes)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(checkpoint(lambda h: torch.tanh(self.inner(h)), h, use_reentrant=self.reentrant))


def test_checkpoints_of_direct_rules_and_reentrant_ones():
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    model = falign.convert(Checkpointed(False), "dfa")
    loss = loss_of(model(x), y)
    alignment(model, loss_of, x, y)
    loss.backward()
    assert model.inner.weight.grad.any()
    model = falign.convert(Checkpointed(True), "fa")
    with pytest.raises(ValueError, match=r"'inner' runs within a re-entrant checkpoint.*use_reentrant=False"):
        alignment(model, loss_of, x, y)


def test_a_layer_that_no_error_reaches_is_not_the_last():
    class Probed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.probe = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x):
            h = torch.relu(self.first(x))
            output = self.last(h)
            self.seen = self.probe(h.detach())
            return output

    model = falign.convert(Probed(), "fa")
    report = alignment(model, loss_of, torch.randn(8, 6), torch.randint(3, (8,)))
    rows = {row.layer: row for row in report.layers}
    assert report.dominance == pytest.approx(rows["first"].descent / rows["last"].gradient_norm ** 2, rel=1e-5)
    assert rows["probe"].gradient_norm == 0


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4))
    falign.convert(model, "fa")
    x, y = torch.randint(11, (5, 6)), torch.randint(4, (5, 6))
    report = alignment(model, loss_of, x, y)
    model[0].sparse = False
    assert report.other == pytest.approx(alignment(model, loss_of, x, y).other, rel=1e-5)


def test_words_for_what_cannot_be_measured():
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    with torch.inference_mode(), pytest.raises(ValueError, match="measure outside of it"):
        alignment(model, loss_of, x, y)
    with pytest.raises(ValueError, match="expected a real number"):
        alignment(model, lambda output, y: loss_of(output, y) * 1j, x, y)
    with pytest.raises(ValueError, match=r"\(LBFGS\) cannot make a step by itself"):
        alignment(model, loss_of, x, y, optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_dropped_monitor_does_not_bar_the_way(tmp_path):
    pytest.importorskip("polars")
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Monitor(model, optimizer=optimizer).step(loss_of, x, y)
    gc.collect()
    with Monitor(model) as monitor:
        monitor.step(loss_of, x, y)
        monitor.save(tmp_path / "new" / "folder.parquet")
    assert (tmp_path / "new" / "folder.parquet").exists()


def test_parts_by_several_rules():
    lower = falign.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), "fa")
    upper = falign.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), "usf")
    model = nn.Sequential(lower, upper)
    report = alignment(model, loss_of, torch.randn(8, 6), torch.randint(3, (8,)))
    assert report.rule == "fa + usf"
