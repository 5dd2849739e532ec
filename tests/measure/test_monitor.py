"""A monitor in a training loop: what it records, that it changes nothing, and where it can be hung."""

import copy
import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import falign
from cases import RULES, batch, build, loss_of
from falign.measure import Monitor, alignment


def batches(count):
    made = torch.Generator().manual_seed(5)
    return [
        (torch.randn(16, 20, generator=made, dtype=torch.float64), torch.randint(7, (16,), generator=made))
        for _ in range(count)
    ]


def train(model, optimizer, data, monitor=None):
    for x, y in data:
        if monitor is not None:
            monitor.step(loss_of, x, y)
        optimizer.zero_grad()
        with falign.targets(model, y):
            loss_of(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_training_is_the_same_with_a_monitor(rule):
    ends = []
    for watched in (False, True):
        model = build("mlp", rule)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        monitor = Monitor(model, every=2, optimizer=optimizer) if watched else None
        train(model, optimizer, batches(6), monitor)
        ends.append({**dict(model.named_parameters()), **dict(model.named_buffers())})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [row["step"] for row in monitor.records] == [0] * 4 + [2] * 4 + [4] * 4


def test_displacement_is_what_was_really_applied():
    """Momentum and clipping included: against the weights before and after, and the true gradient of that batch."""
    model = build("mlp", "fa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = batches(4)
    monitor = Monitor(model, every=3, optimizer=optimizer)
    train(model, optimizer, data[:3], monitor)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with falign.backprop(model):
        true = torch.autograd.grad(loss_of(model(data[3][0]), data[3][1]), list(model.parameters()))
    slopes = dict(zip(before, true, strict=True))
    train(model, optimizer, data[3:], monitor)
    for row in monitor.records[4:]:
        names = [name for name in before if name.startswith(row["layer"] + ".")]
        step = torch.cat([(before[name] - model.get_parameter(name).detach()).flatten() for name in names])
        slope = torch.cat([slopes[name].flatten() for name in names])
        cosine = float(step @ slope / step.norm() / slope.norm())
        assert row["displacement_angle"] == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-5)
        assert row["displacement_norm"] == pytest.approx(float(step.norm()))


def test_records_are_what_alignment_says_and_go_to_parquet(tmp_path):
    pl = pytest.importorskip("polars")
    model, (x, y) = build("mlp", "dfa"), batch("mlp")
    with Monitor(model, every=10) as monitor:
        with pytest.raises(ValueError, match="nothing was measured yet"):
            monitor.save(tmp_path / "none.parquet")
        found = monitor.step(loss_of, x, y)
        assert monitor.step(loss_of, x, y) is None
        assert monitor.count == 2
    assert str(found) == str(alignment(model, loss_of, x, y))
    monitor.save(tmp_path / "alignment.parquet")
    table = pl.read_parquet(tmp_path / "alignment.parquet")
    assert table.height == 4
    assert table["dominance"].to_list() == [found.dominance] * 4
    assert table["total_descent"].to_list() == [found.descent] * 4
    assert table["gradient_angle"].to_list() == [row.gradient_angle for row in found.layers]
    assert [path.name for path in tmp_path.iterdir()] == ["alignment.parquet"]


def test_a_resumed_monitor_goes_on():
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    with Monitor(model, every=2) as first:
        for _ in range(3):
            first.step(loss_of, x, y)
    second = Monitor(model, every=2)
    second.load_state_dict(first.state_dict())
    assert second.step(loss_of, x, y) is None
    assert second.step(loss_of, x, y) is not None
    assert [row["step"] for row in second.records if row["layer"] == "0"] == [0, 2, 4]


def test_one_sentence_for_bad_input():
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    with pytest.raises(ValueError, match="is not converted"):
        Monitor(build("mlp"))
    with pytest.raises(ValueError, match="every is 0, expected a whole number"):
        Monitor(model, every=0)
    with pytest.raises(ValueError, match="holds none of the model's trainable parameters"):
        Monitor(model, optimizer=torch.optim.SGD(build("mlp").parameters(), lr=0.1))
    monitor = Monitor(model)
    with pytest.raises(ValueError, match=r"has a monitor already: use that one, or close\(\) it first"):
        Monitor(model)
    Monitor(copy.deepcopy(model)).close()  # a copy has none
    monitor.close()
    with pytest.raises(ValueError, match="the monitor is closed"):
        monitor.step(loss_of, x, y)
    Monitor(model).close()


class Untidy(nn.Module):
    """Replaces its buffer, draws from Python's and NumPy's generators, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        kept = random.random() + float(np.random.rand())  # noqa: NPY002
        return self.last(torch.relu(self.first(x)) * kept)


def test_nothing_is_left_changed():
    model = falign.convert(Untidy(), falign.rules.AdaptiveFeedbackAlignment(rate=1.0))
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    count, states = model.count, (random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    report = alignment(model, loss_of, x, y)
    assert model.count is count
    assert count == 0
    if "FALIGN_TYPECHECK" not in os.environ:  # checked annotations draw from Python's generator themselves
        assert states[0] == random.getstate()
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert max(row.gradient_angle for row in report.layers) < 0.05  # B = W, and both passes drew the same numbers
    assert all(p.grad is None for p in model.parameters())
    assert all(not layer._forward_hooks or len(layer._forward_hooks) == 1 for layer in (model.first, model.last))


def test_a_backward_that_is_still_to_come_is_not_disturbed():
    """Activation checkpointing recomputes by the rule of its forward, though a true pass was made in between."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.last(checkpoint(lambda h: torch.tanh(self.inner(h)), h, use_reentrant=False))

    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    slopes = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = falign.convert(Checkpointed(), "fa")
        loss = loss_of(model(x), y)
        if measured:
            alignment(model, loss_of, x, y)
        loss.backward()
        slopes.append(model.first.weight.grad)
    assert torch.equal(*slopes)


@pytest.mark.parametrize("rule", ["fa", "dfa", "usf"])
def test_under_autocast(rule):
    model, (x, y) = build("mlp", rule, dtype=torch.float32), batch("mlp", torch.float32)
    exact = alignment(model, loss_of, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        rough = alignment(model, loss_of, x, y)
    for one, other in zip(exact.layers, rough.layers, strict=True):
        assert other.gradient_angle == pytest.approx(one.gradient_angle, abs=1.5)
        assert other.received_angle == pytest.approx(one.received_angle, abs=1.5)
