"""Angles that rest on rounding: against the same network in float64, which rounds 10⁹ times less."""

import copy
from math import isnan

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import falign
from cases import RULES, batch, build, loss_of
from falign.measure import Monitor, _alignment, alignment, gradient_angles
from falign.measure._floor import LIMIT
from falign.measure._passes import rule_and_true_gradients

FLAT = nn.functional.cross_entropy


class Block(nn.Module):
    """h + W₂ relu(W₁ LN(h))."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h):
        return h + self.down(torch.relu(self.up(self.norm(h))))


def residual(width=32):
    """The audit's network: four pre-normalised residual blocks, a normalisation, a readout."""
    torch.manual_seed(0)
    blocks = [Block(width) for _ in range(4)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


def digits(count=128):
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:count] / 16, dtype=torch.float32), torch.tensor(labels[:count])


def grown(factor):
    """Blocks that add a vector common to all images, times a factor, under a readout that gives class frequencies.

    The normalisation leaves next to nothing of what tells images apart, and the errors of a batch add up to zero: so
    do the gradients of the blocks, but for rounding.
    """
    model, (x, y) = residual(), digits()
    with torch.no_grad():
        for block in model[1:5]:
            block.down.bias.mul_(factor)
        exact = copy.deepcopy(model).double()
        for _ in range(300):
            errors = torch.softmax(exact(x.double()), 1) - nn.functional.one_hot(y, 10)
            exact[6].bias -= 5 * errors.mean(0)
        model[6].bias.copy_(exact[6].bias)
    return model


def unmarked(monkeypatch, model, x, y):
    """Measure as if nothing could rest on rounding."""
    with monkeypatch.context() as patch:
        patch.setattr(_alignment, "lost_rows", lambda *_: {})
        return alignment(model, FLAT, x, y)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("factor", [1, 1e5, 1e7, 1e9])
def test_what_is_unreadable_is_what_float64_contradicts(rule, factor, monkeypatch):
    model, (x, y) = falign.convert(grown(factor), rule), digits()
    marked, shown = alignment(model, FLAT, x, y), unmarked(monkeypatch, model, x, y)
    twin = copy.deepcopy(model).double()
    exact = alignment(twin, FLAT, x.double(), y)
    here, there = (rule_and_true_gradients(m, FLAT, i, y) for m, i in ((model, x), (twin, x.double())))
    for row, plain, truth in zip(marked.layers, shown.layers, exact.layers, strict=True):
        off, name = abs(plain.gradient_angle - truth.gradient_angle), row.layer + ".weight"
        noise = max(  # of an angle that is right by chance
            float((a[name].double() - b[name]).norm() / b[name].norm())
            for a, b in ((here.taken, there.taken), (here.true, there.true))
        )
        if row.lost("gradient"):
            assert row.gradient_angle is row.cosine is row.descent is None
            assert noise > 0.05, (row.layer, off, noise)
        else:
            assert off <= LIMIT, (row.layer, off, noise)
            assert row.gradient_angle == plain.gradient_angle
            assert noise < 0.5, (row.layer, off, noise)
        if not row.lost("received"):
            assert row.received_angle == pytest.approx(truth.received_angle, abs=LIMIT)
    lost = [row.layer for row in marked.layers if row.lost("gradient")]
    assert exact.unreadable == 0
    assert {1: 0, 1e3: 0, 1e5: 0}.get(factor, 5) <= len(lost) == marked.unreadable <= (0 if factor < 1e6 else 9)
    assert ("unreadable" in str(marked)) == bool(lost)


def test_growth_alone_can_be_read(monkeypatch):
    """A gradient of 1e-9 under activations of 1e8 is as exact as any: a small norm is no floor."""
    model, (x, y) = residual(), digits()
    with torch.no_grad():
        for block in model[1:5]:
            block.down.weight.mul_(1e8)
    falign.convert(model, "dfa")
    report = alignment(model, FLAT, x, y)
    exact = alignment(copy.deepcopy(model).double(), FLAT, x.double(), y)
    assert min(row.gradient_norm for row in report.layers) < 1e-7
    assert report.unreadable == 0
    assert report.growth["1"] > 1e6
    for row, truth in zip(report.layers, exact.layers, strict=True):
        assert row.gradient_angle == pytest.approx(truth.gradient_angle, abs=0.5)


def test_where_squares_overflow_nothing_is_shown():
    model, (x, y) = residual(), digits()
    with torch.no_grad():
        for block in model[1:5]:
            block.down.weight.mul_(1e19)
    report = alignment(falign.convert(model, "dfa"), FLAT, x, y)
    assert all(row.lost("gradient") and row.gradient_angle is None for row in report.layers)


@pytest.mark.parametrize("case", ["mlp", "conv", "residual"])
@pytest.mark.parametrize("rule", RULES)
def test_healthy_networks_are_read_once_and_whole(rule, case, monkeypatch):
    model, (x, y) = build(case, rule, dtype=torch.float32), batch(case, torch.float32)
    asked, original = [], _alignment.suspicious
    monkeypatch.setattr(_alignment, "suspicious", lambda *given: asked.append(original(*given)) or True)
    report = alignment(model, loss_of, x, y)
    assert asked == [False]  # so that it costs nothing
    assert report.unreadable == 0  # and a second reading, made all the same, finds nothing


@pytest.mark.parametrize("rule", ["fa", "dfa", "adafa"])
def test_a_second_reading_leaves_no_trace(rule, monkeypatch):
    """Dropout, running statistics, feedback that moves; masks are the same in both readings."""
    monkeypatch.setattr(_alignment, "suspicious", lambda *_: True)
    x, y = digits(64)
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 16), nn.Tanh(),
            nn.Linear(16, 10),
        )  # fmt: skip
        falign.convert(model, rule)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = Monitor(model, every=2, optimizer=optimizer, step_size=1e-2) if watched else None
        for _ in range(4):
            if monitor is not None:
                report = monitor.step(FLAT, x, y)
                assert report is None or report.unreadable == 0
            optimizer.zero_grad()
            FLAT(model(x), y).backward()
            optimizer.step()
        ends.append({**model.state_dict(), "next": torch.rand(3)})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_underflow_in_half_precision():
    """Errors of 1e-9 are zero, or one bit, in float16; in float32 they are numbers as any."""
    model, (x, y) = falign.convert(residual(), "fa"), digits()

    def small(output, y):
        return FLAT(output, y) * 1e-6

    plain = alignment(model, small, x, y)
    assert plain.unreadable == 0
    with torch.autocast("cpu", torch.float16):
        report = alignment(model, small, x, y)
        fine = alignment(model, lambda output, y: FLAT(output, y) * 100, x, y)
    hidden = report.layers[:-1]
    assert all(row.lost("gradient") or not row.gradient_norm for row in hidden)
    assert any(row.lost("gradient") for row in hidden)
    for row, truth in zip(fine.layers, plain.layers, strict=True):
        if not row.lost("gradient"):
            assert row.gradient_angle == pytest.approx(truth.gradient_angle, abs=LIMIT)
    assert fine.unreadable < report.unreadable


def test_unreadable_is_a_word_in_tables_and_nothing_in_data(tmp_path):
    pl = pytest.importorskip("polars")
    model, (x, y) = falign.convert(grown(1e9), "fa"), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    report = alignment(model, FLAT, x, y, optimizer=optimizer)
    lost = [row for row in report.layers if row.lost("gradient")]
    assert str(report).count("unreadable") >= len(lost) > 0
    assert all(row.displacement_angle is None and row.displacement_norm is not None for row in lost)
    angles = gradient_angles(model, FLAT, x, y)
    assert [name for name, value in angles.items() if isnan(value)] == [row.layer for row in lost]
    with Monitor(model, optimizer=optimizer) as monitor:
        monitor.step(FLAT, x, y)
        FLAT(model(x), y).backward()
        optimizer.step()
    monitor.save(tmp_path / "alignment.parquet")
    table = pl.read_parquet(tmp_path / "alignment.parquet")
    assert table.filter(pl.col("unreadable").is_not_null())["layer"].to_list() == [row.layer for row in lost]
    assert table.filter(pl.col("unreadable").is_not_null())["displacement_angle"].null_count() == len(lost)
    assert not monitor.descending().keys() & {row.layer for row in lost}


def test_norms_and_growth_are_what_numpy_finds():
    model, (x, y) = falign.convert(residual().double(), "fa"), digits()
    x = x.double()
    seen = {}
    hooks = [
        module.register_forward_hook(lambda module, args, z, name=name: seen.update({name: (args[0], z)}))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Block))
    ]
    with falign.backprop(model):
        FLAT(model(x), y).backward()
    for hook in hooks:
        hook.remove()
    report = alignment(model, FLAT, x, y)

    def norm(tensor):
        return np.linalg.norm(tensor.detach().numpy())

    for row in report.layers:
        own = seen[row.layer]
        outer = seen.get(row.layer.partition(".")[0], own)
        assert row.input_norm == pytest.approx(np.sqrt(np.mean(norm_rows(own[0]) ** 2)), rel=1e-12)
        assert row.growth == pytest.approx(norm(outer[1]) / norm(outer[0]), rel=1e-12)
    assert list(report.growth) == ["1", "2", "3", "4"]
    assert report.growth["3"] == pytest.approx(norm(seen["3"][1]) / norm(seen["3"][0]))
    bias = model[6].bias.grad  # its error sums up to it
    assert report.layers[-1].error_norm >= float(bias.norm()) / len(x) ** 0.5


def norm_rows(tensor):
    return np.linalg.norm(tensor.detach().numpy().reshape(len(tensor), -1), axis=1)
