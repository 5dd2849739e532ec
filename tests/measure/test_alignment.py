"""Every column of the alignment report against NumPy, on every rule and network."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import falign
import oracles
from cases import CASES, DIRECT, RULES, batch, build, follows, loss_of, rule_class
from falign.measure import alignment, gradient_angles


def arrays(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if "feedback" not in name}


def feedback_of(model):
    state = falign.feedback_state(model)
    return {name: b.numpy() for name, b in state.items() if not name.endswith((".passes", ".seen"))}


def angle(one, other):
    return np.degrees(np.arccos(np.clip(np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other), -1, 1)))


def spread(one, other):
    found = [angle(a, b) for a, b in zip(one, other, strict=True) if np.linalg.norm(a) > 0 and np.linalg.norm(b) > 0]
    return np.mean(found), np.std(found, ddof=1)


def flat(slopes, layer):
    return np.concatenate([slopes[key].ravel() for key in (layer + ".weight", layer + ".bias") if key in slopes])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_report_is_what_numpy_finds(rule, case):
    model, (x, y) = build(case, rule), batch(case)
    weights, feedback, errors, true_errors = arrays(model), feedback_of(model), {}, {}
    arguments = (CASES[case].steps, x.numpy(), y.numpy(), weights, feedback)
    f = oracles.gradients(rule, *arguments, errors=errors)
    g = oracles.gradients("bp", *arguments, errors=true_errors)
    report = alignment(model, loss_of, x, y)
    assert [row.layer for row in report.layers] == list(errors)[::-1]
    inputs_want_errors = case == "sequence"
    for index, row in enumerate(report.layers):
        own, true = flat(f, row.layer), flat(g, row.layer)
        assert row.taken_norm == pytest.approx(np.linalg.norm(own), rel=1e-9)
        assert row.gradient_norm == pytest.approx(np.linalg.norm(true), rel=1e-9)
        assert row.descent == pytest.approx(own @ true, rel=1e-9, abs=1e-15)
        assert row.gradient_angle == pytest.approx(angle(own, true), abs=1e-5)
        received, delivered = zip(errors[row.layer], true_errors[row.layer], strict=True)
        np.testing.assert_allclose([row.received_angle, row.received_angle_sd], spread(*received), atol=1e-5)
        if index == 0 and not inputs_want_errors:
            assert row.delivered_angle is row.weight_angle is row.effective_rank is None
            continue
        np.testing.assert_allclose([row.delivered_angle, row.delivered_angle_sd], spread(*delivered), atol=1e-5)
        values = np.linalg.svd(delivered[0].reshape(len(x), -1), compute_uv=False)
        assert row.effective_rank == pytest.approx((values**2).sum() ** 2 / (values**4).sum(), rel=1e-6)
    inner = {key: np.vdot(f[key], g[key]) for key in g}
    assert report.descent == pytest.approx(sum(inner.values()), rel=1e-9)
    assert report.other == pytest.approx(sum(v for k, v in inner.items() if k == "0.weight" and case == "sequence"))
    last = flat(g, report.layers[-1].layer)
    assert report.dominance == pytest.approx(sum(inner.values()) / (last @ last) - 1, rel=1e-8)
    assert f"rule {rule_class(rule).name}" in str(report)
    assert str(report).count("\n") == len(report.layers) + 2


@pytest.mark.parametrize("case", ["mlp", "conv"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("bp", *DIRECT)])
def test_feedback_beside_the_weight(rule, case):
    model, (x, y) = build(case, rule), batch(case)
    weights, feedback = arrays(model), feedback_of(model)
    # reports are made after the pass: adafa has taken note of the weights, brsf is put back to before it
    report = alignment(model, loss_of, x, y)
    for row in report.layers[1:]:
        weight = weights[row.layer + ".weight"]
        if rule == "pfa":
            matrix = oracles.turned(feedback, row.layer, feedback[row.layer])
        else:
            matrix = oracles.effective(rule, weight, feedback[row.layer], passes=0, rate=0.0)
        assert row.weight_angle == pytest.approx(angle(matrix, weight), abs=1e-5)
        assert row.norm_ratio == pytest.approx(np.linalg.norm(matrix) / np.linalg.norm(weight))
        assert row.sign_agreement == pytest.approx(np.mean(np.sign(matrix) == np.sign(weight)))
        groups = model.get_submodule(row.layer).groups if weight.ndim > 2 else 1
        parts = (matrix * weight).reshape(groups, -1, weight.shape[1], *weight.shape[2:])
        inner = parts.sum((1, *range(3, parts.ndim))).ravel()
        np.testing.assert_allclose(report.neurons[row.layer].numpy(), inner, rtol=1e-9)
        assert row.neurons == len(inner)
        assert row.aligned_neurons == np.mean(inner > 0)
        assert report.neuron_cosines[row.layer].abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_descent_is_the_derivative_of_the_loss(rule):
    """-dL/dt along the gradients taken, against a central difference of the loss itself."""
    model = nn.Sequential(nn.Linear(9, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 3)).double()
    falign.convert(model, rule)
    x, y = torch.randn(16, 9, dtype=torch.float64), torch.randint(3, (16,))
    if follows(rule):
        falign.follow(model, x)
    report = alignment(model, loss_of, x, y)
    twin = copy.deepcopy(model)
    with falign.targets(twin, y):
        loss_of(twin(x), y).backward()
    moved = {name: p for name, p in twin.named_parameters() if "feedback" not in name}
    steps, losses, size = {name: p.grad.clone() for name, p in moved.items()}, [], 1e-5
    for sign in (-1, 1):
        with torch.no_grad():
            for name, p in moved.items():
                p.add_(steps[name], alpha=sign * size)
            losses.append(float(loss_of(twin(x), y)))
            for name, p in moved.items():
                p.sub_(steps[name], alpha=sign * size)
    assert report.descent == pytest.approx((losses[1] - losses[0]) / 2 / size, rel=1e-6)
    assert report.other != 0
    assert report.descent == pytest.approx(
        report.other + sum(row.cosine * row.gradient_norm * row.taken_norm for row in report.layers), rel=1e-9
    )


def test_residual_connections_do_not_mix_the_error_that_a_layer_delivers():
    """The error at a residual block's input is the delivered one and what comes by the skip; a row has the first."""
    model, (x, y) = build("residual", "fa"), batch("residual")
    rows = {row.layer: row for row in alignment(model, loss_of, x, y).layers}
    with torch.no_grad():
        model.get_submodule("1.inner.1").feedback.B.neg_()
    turned = {row.layer: row for row in alignment(model, loss_of, x, y).layers}
    assert turned["1.inner.1"].delivered_angle == pytest.approx(180 - rows["1.inner.1"].delivered_angle, abs=1e-4)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_displacement_is_that_of_the_optimizer(make):
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)

    def train(model, optimizer):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()

    train(model, optimizer)  # so that it has a state
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = alignment(model, loss_of, x, y, optimizer=optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state_dict()["state"][i][k]))
               for i, parts in state.items() for k, v in parts.items() if v is not None)  # fmt: skip
    with falign.backprop(model):
        true = torch.autograd.grad(loss_of(model(x), y), list(model.parameters()))
    g = {name: slope for (name, _), slope in zip(model.named_parameters(), true, strict=True)}
    train(model, optimizer)
    for row in report.layers:
        names = [name for name in before if name.startswith(row.layer + ".")]
        step = torch.cat([(before[name] - model.get_parameter(name).detach()).flatten() for name in names]).numpy()
        slope = torch.cat([g[name].flatten() for name in names]).numpy()
        assert row.displacement_angle == pytest.approx(angle(step, slope), abs=1e-5)
        assert row.displacement_norm == pytest.approx(np.linalg.norm(step), rel=1e-9)


def test_a_layer_used_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))))

    model = falign.convert(Twice().double(), "fa")
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    rows = {row.layer: row for row in alignment(model, loss_of, x, y).layers}
    assert list(rows) == ["first", "again", "last"]
    assert rows["again"].received_angle > 1


def test_vanishing_errors_have_angles():
    """In float32 the squares of such errors are zero."""
    model = falign.convert(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)))
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    plain = alignment(model, loss_of, x, y).layers
    small = alignment(model, lambda output, y: loss_of(output, y) * 1e-30, x, y).layers
    for row, other in zip(plain[1:], small[1:], strict=True):
        assert other.received_angle == pytest.approx(row.received_angle, abs=0.1)
        assert other.effective_rank == pytest.approx(row.effective_rank, rel=1e-3)


def test_one_sentence_for_bad_input():
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    with pytest.raises(ValueError, match=r"is not converted: call falign\.convert"):
        alignment(build("mlp"), loss_of, x, y)
    with pytest.raises(ValueError, match="a batch of 1, expected two samples"):
        alignment(model, loss_of, x[:1], y[:1])
    with pytest.raises(ValueError, match=r"returned \(16,\), expected a scalar"):
        alignment(model, lambda output, y: nn.functional.cross_entropy(output, y, reduction="none"), x, y)
    with pytest.raises(ValueError, match="returned a float, expected a scalar tensor"):
        alignment(model, lambda output, y: 1.0, x, y)
    with pytest.raises(ValueError, match="depends on no trainable parameter"):
        alignment(model, lambda output, y: torch.zeros(()), x, y)
    with pytest.raises(ValueError, match=r"optimizer \(SGD\) holds none"):
        alignment(model, loss_of, x, y, optimizer=torch.optim.SGD(build("mlp").parameters(), lr=1.0))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan, expected a finite number: 2\.weight is not"):
        alignment(model, loss_of, x, y)


def test_rows_as_a_table():
    pl = pytest.importorskip("polars")
    model, (x, y) = build("conv", "dfa"), batch("conv")
    table = alignment(model, loss_of, x, y).to_polars()
    assert table["layer"].to_list() == ["0", "2", "4", "7"]
    assert table["weight_angle"].null_count() == 3  # a direct B has the shape of the last weight alone
    assert table.schema["gradient_angle"] == pl.Float64
    assert gradient_angles(model, loss_of, x, y) == dict(table.select("layer", "gradient_angle").rows())


class Recomputed(nn.Sequential):
    """The same layers, their activations recomputed in backward."""

    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("rule", ["fa", "usf", "adafa", "kp"])
def test_activation_checkpointing_changes_nothing(rule):
    model, (x, y) = build("mlp", rule), batch("mlp")
    again = falign.convert(Recomputed(*build("mlp")), rule)
    again[3].inplace = False
    assert str(alignment(again, loss_of, x, y)) == str(alignment(model, loss_of, x, y))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_weights(wrap):
    """Spectral norm changes its state whenever the weight is read in training; measuring leaves it alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    falign.convert(model, "fa")
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(3, (10,))
    report = alignment(model, loss_of, x, y)
    twin = copy.deepcopy(model)
    with falign.backprop(twin):
        loss_of(twin(x), y).backward()
    for row, layer in zip(report.layers, (twin[0], twin[2], twin[4]), strict=True):
        slopes = torch.cat([p.grad.flatten() for name, p in layer.named_parameters() if "feedback" not in name])
        assert row.gradient_norm == pytest.approx(float(slopes.norm()), rel=1e-9)
