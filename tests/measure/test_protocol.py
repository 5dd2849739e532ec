"""Suppliers beside the true gradient, steps of single layers, agreement between batches: against closed forms."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import falign
from cases import batch, build, loss_of
from falign.measure import Monitor, alignment, compare, consistency

FLAT = nn.functional.cross_entropy


def digits(begin=0, count=64):
    images, labels = load_digits(return_X_y=True)
    some = slice(begin, begin + count)
    return torch.tensor(images[some] / 16, dtype=torch.float64), torch.tensor(labels[some])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()


def true_gradient(model, loss_fn, x, y):
    loss = loss_fn(model(x), y)
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def squares(output, y):
    return ((output - y) ** 2).mean() / 2


def test_columns_of_a_linear_model_are_closed_forms():
    """L = |X W - Y|²/2n: cosines, norms and the loss after a step are quadratic forms, computed by NumPy."""
    random = np.random.default_rng(0)
    x, y, w = random.normal(size=(12, 5)), random.normal(size=(12, 1)), random.normal(size=(1, 5))
    model = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(w))
    g = (x @ w.T - y).T @ x / 12
    f = random.normal(size=(1, 5))
    suppliers = {
        "half": lambda *_: {"weight": torch.tensor(g / 2)},
        "against": lambda *_: {"weight": torch.tensor(-g)},
        "other": lambda *_: {"weight": torch.tensor(f)},
    }
    report = compare(model, suppliers, squares, torch.tensor(x), torch.tensor(y), step_size=0.05)

    def loss(w):
        return ((x @ w.T - y) ** 2).mean() / 2

    assert report.loss == pytest.approx(loss(w))
    for row in report.layers:
        own = {"half": g / 2, "against": -g, "other": f}[row.supplier]
        cosine = np.vdot(own, g) / np.linalg.norm(own) / np.linalg.norm(g)
        assert row.cosine == pytest.approx(cosine)
        assert row.angle == pytest.approx(np.degrees(np.arccos(np.clip(cosine, -1, 1))), abs=1e-5)
        assert row.norm_ratio == pytest.approx(np.linalg.norm(own) / np.linalg.norm(g))
        assert row.descent == pytest.approx(np.vdot(own, g))
        assert row.descends == (cosine > 0)
        step = 0.05 * np.linalg.norm(w) * own / np.linalg.norm(own)
        assert row.loss_change == pytest.approx(loss(w - step) - loss(w), rel=1e-9)
        assert row.unreadable is None
    assert len(report.layers) == 2 * len(suppliers)  # the layer, and the whole network


def node_perturbation(model, loss_fn, x, y):
    """Noise on each layer's output, times what the loss makes of it: a method that is no rule."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    made = torch.Generator().manual_seed(0)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    size, times = 1e-4, 200
    with torch.no_grad():
        for name, layer in layers.items():
            for _ in range(times):
                noise, losses, inputs = None, [], []
                for sign in (1, -1):

                    def disturb(module, args, z, sign=sign, inputs=inputs):
                        nonlocal noise
                        inputs[:] = args
                        if noise is None:
                            noise = torch.randn(z.shape, generator=made, dtype=z.dtype)
                        return z + sign * size * noise

                    hook = layer.register_forward_hook(disturb)
                    losses.append(float(loss_fn(model(x), y)))
                    hook.remove()
                error = (losses[0] - losses[1]) / 2 / size * noise / times
                total[f"{name}.weight"] += error.T @ inputs[0]
                total[f"{name}.bias"] += error.sum(0)
    return total


def test_a_method_that_is_no_rule_gets_the_same_columns():
    model, (x, y) = network(), digits()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    suppliers = {"node perturbation": node_perturbation, "bp": "bp", "fa": "fa", "none": "frozen"}
    report = compare(model, suppliers, FLAT, x, y, step_size=1e-3)
    rows = {(row.supplier, row.layer): row for row in report.layers}
    assert set(rows) == set(itertools.product(suppliers, ["0", "2", "*"]))
    assert rows["bp", "*"].cosine == pytest.approx(1)
    assert rows["node perturbation", "2"].descends
    assert rows["node perturbation", "2"].cosine > 0.2
    assert rows["node perturbation", "*"].loss_change < 0
    assert rows["bp", "*"].loss_change < rows["node perturbation", "*"].loss_change
    assert rows["none", "0"].cosine is rows["none", "0"].loss_change is None
    assert rows["none", "2"].cosine == pytest.approx(1)
    # the rule has the numbers that it has where a model is converted by it
    own = {row.layer: row for row in alignment(falign.convert(network(), "fa"), FLAT, x, y, step_size=1e-3).layers}
    for name, row in own.items():
        assert rows["fa", name].cosine == pytest.approx(row.cosine, rel=1e-9)
        assert rows["fa", name].loss_change == pytest.approx(row.loss_change, rel=1e-6)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert str(report).count("\n") == len(report.layers) + 1


def test_a_converted_model_is_compared_by_its_own_feedback():
    model, (x, y) = falign.convert(network(), "fa", seed=5), digits()
    own = {row.layer: row.cosine for row in alignment(model, FLAT, x, y).layers}
    report = compare(model, ["fa", "usf"], FLAT, x, y)
    rows = {(row.supplier, row.layer): row for row in report.layers}
    assert {name: rows["fa", name].cosine for name in own} == pytest.approx(own)
    again = falign.convert(network(), "usf")
    other = {row.layer: row.cosine for row in alignment(again, FLAT, x, y).layers}
    assert {name: rows["usf", name].cosine for name in other} == pytest.approx(other)
    assert falign.feedback_state(model)


def test_a_comparison_knows_what_cannot_be_read():
    """Under float16 a loss of 1e-6 has errors that are zero or one bit; in float32 they are numbers as any."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    x, y = digits()

    def small(output, y):
        return FLAT(output, y) * 1e-5

    report = compare(model, ["bp", "fa"], small, x.float(), y)
    assert all(row.unreadable != "gradient" and row.cosine is not None for row in report.layers)
    with torch.autocast("cpu", torch.float16):
        report = compare(model, ["bp", "fa"], small, x.float(), y)
    assert any("gradient" in (row.unreadable or "") and row.cosine is None for row in report.layers)
    assert "unreadable" in str(report)


def test_what_a_supplier_leaves_behind_is_put_back():
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 10)).double()
    x, y = digits()
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept

    def by_backward(model, loss_fn, x, y):
        loss_fn(model(x), y).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = compare(model, {"backward": by_backward}, FLAT, x, y)
    assert report.layers[-1].cosine == pytest.approx(1)  # the same dropout masks as the true gradient
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is kept
    assert model[3].weight.grad is None


@pytest.mark.unchecked
def test_one_sentence_for_bad_suppliers():
    model, (x, y) = network(), digits()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    good = true_gradient(model, FLAT, x, y)

    def changing(model, loss_fn, x, y):
        with torch.no_grad():
            model[2].weight.add_(1)
        return good

    for error, sentence, supplier in (
        (ValueError, "'a' gave no gradient of '2.bias'", lambda *_: {k: g for k, g in good.items() if k != "2.bias"}),
        (
            ValueError,
            r"gave a gradient \(3,\) of '2.bias', expected \(10,\)",
            lambda *_: good | {"2.bias": torch.ones(3)},
        ),
        (ValueError, "of '2.bias' is not finite", lambda *_: good | {"2.bias": torch.full((10,), float("nan"))}),
        (ValueError, "'3.bias', which is no trainable parameter", lambda *_: good | {"3.bias": torch.ones(3)}),
        (TypeError, "gave a float for '2.bias', expected a tensor", lambda *_: good | {"2.bias": 1.0}),
        (TypeError, "gave a list, expected", lambda *_: list(good.values())),
        (ValueError, "'a' changed '2.weight': it has to leave the weights", changing),
        (TypeError, "'a' is 3, expected a rule", 3),
        (ValueError, "'a' cannot be carried out by a copy of the model", "nonsense"),
    ):
        with pytest.raises(error, match=sentence):
            compare(model, {"a": supplier}, FLAT, x, y)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="no suppliers were given"):
        compare(model, {}, FLAT, x, y)
    with pytest.raises(ValueError, match="step_size is 0, expected a number between 0 and 1"):
        compare(model, ["fa"], FLAT, x, y, step_size=0)
    with pytest.raises(ValueError, match="a batch of 1, expected two"):
        compare(model, ["fa"], FLAT, x[:1], y[:1])


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_loss_change_is_the_loss_at_the_moved_weights(rule, case):
    model, (x, y) = build(case, rule), batch(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pending = loss_of(model(x), y)
    report = alignment(model, loss_of, x, y, step_size=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pending.backward()  # no version of a weight has changed
    for row in report.layers:
        own = {name: p for name, p in model.named_parameters() if name.startswith(row.layer + ".")}
        own = {name: p for name, p in own.items() if "feedback" not in name}
        weights, slopes = (np.concatenate([v.detach().numpy().ravel() for v in values]) for values in (
            own.values(), [p.grad for p in own.values()]))  # fmt: skip
        rate = 1e-3 * np.linalg.norm(weights) / np.linalg.norm(slopes)
        with torch.no_grad():
            for p in own.values():
                p.sub_(rate * p.grad)
            moved = float(loss_of(model(x), y))
            for name, p in own.items():
                p.copy_(before[name])
            assert row.loss_change == pytest.approx(moved - float(loss_of(model(x), y)), rel=1e-6)
        assert row.loss_change == pytest.approx(-rate * row.descent, rel=0.05, abs=1e-7)  # to first order


def test_a_change_below_the_rounding_of_the_loss_is_unreadable():
    model, (x, y) = build("mlp", "fa", dtype=torch.float32), batch("mlp", torch.float32)
    report = alignment(model, loss_of, x, y, step_size=1e-9)
    assert all(row.lost("loss") and row.loss_change is None and row.gradient_angle is not None for row in report.layers)
    assert report.unreadable == 0
    assert "unreadable" in str(report)


def test_consistency_is_the_mean_over_all_pairs():
    model = falign.convert(network(), "fa")
    batches = [digits(64 * i) for i in range(9)]
    report = consistency(model, FLAT, iter(batches))
    taken, true = [], []
    for x, y in batches:
        with falign.backprop(model):
            true.append(true_gradient(model, FLAT, x, y))
        taken.append(true_gradient(model, FLAT, x, y))
    for row in report.layers:
        for value, slopes in ((row.taken, taken), (row.true, true)):
            flat = [np.concatenate([g[f"{row.layer}.{k}"].numpy().ravel() for k in ("weight", "bias")]) for g in slopes]
            pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(flat, 2)]
            assert value == pytest.approx(np.mean(pairs), rel=1e-9)
        assert (row.batches, row.unreadable) == (9, 0)
    assert report.layers[1].taken == pytest.approx(report.layers[1].true)
    assert str(report).startswith("mean cosine between the gradients of 9 batches")


@pytest.mark.unchecked
def test_consistency_of_one_batch_is_one_and_few_are_refused():
    model, data = falign.convert(network(), "dfa"), digits()
    assert all(row.taken == pytest.approx(1) for row in consistency(model, FLAT, [data] * 8).layers)
    with pytest.raises(ValueError, match="there are 7 batches, expected 8 or more"):
        consistency(model, FLAT, [data] * 7)
    with pytest.raises(TypeError, match=r"expected a pair \(x, y\)"):
        consistency(model, FLAT, [data[0]] * 8)
    with pytest.raises(ValueError, match="is not converted"):
        consistency(network(), FLAT, [data] * 8)


@pytest.mark.unchecked
def test_a_monitor_counts_the_steps_that_descend():
    model, data = falign.convert(network(), "fa"), [digits(64 * i) for i in range(6)]
    with Monitor(model, every=1, step_size=1e-3) as monitor:
        reports = [monitor.step(FLAT, x, y) for x, y in data]
        state = monitor.state_dict()
    expected = {"*": np.mean([report.descent > 0 for report in reports])} | {
        name: np.mean([row.descent > 0 for report in reports for row in report.layers if row.layer == name])
        for name in ("0", "2")
    }
    assert monitor.descending() == pytest.approx(expected)
    assert all(record["loss_change"] is not None for record in monitor.records)
    with Monitor(model) as again:
        again.load_state_dict(state)
        assert again.descending() == monitor.descending()
    with pytest.raises(ValueError, match="step_size is 2, expected"):
        Monitor(model, step_size=2)
