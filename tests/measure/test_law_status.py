"""What is said of each layer: exact, accounted for, a drift of which order, or no law, and why."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from law_training import CLASSES, batches, built, by_layer, inputs, mlp, norm, sgd, slopes, step, trained
from torch import Tensor, nn

import falign
from falign.measure.law import ConservationLaw
from falign.rules import Rule

pytestmark = pytest.mark.unchecked


class Residual(nn.Module):
    """x + inner(x), rectified."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)).relu()


def residual() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), Residual(nn.Linear(12, 12)), nn.Linear(12, 10))


def tangent() -> nn.Module:
    return mlp(nn.Tanh)


def forked() -> nn.Module:
    """One layer feeds two, whose outputs lie side by side before the last."""
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), Fork(nn.Linear(12, 6), nn.Linear(12, 4)), nn.Linear(10, 10))


class Fork(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x).relu() for part in self.parts], 1)


def _drifts(make, rates, *, time=2.0, rule="fa", optimizer=sgd, momentum=1.0):
    """Slopes of the mean drift in the rate, at a fixed training time, on one batch."""

    def drift(rate):
        model = built(make, rule)
        trainer, (x, y) = optimizer(model, rate), (inputs()[:64], CLASSES[:64])
        law = ConservationLaw(model, trainer)
        for _ in range(round(time / rate * momentum)):
            step(model, trainer, x, y)
        return float(torch.cat(list(law.drift().values())).abs().mean())

    return slopes(drift, rates)


@pytest.mark.parametrize(("make", "why"), [(residual, "residual connection"), (tangent, "tanh is not homogeneous")])
def test_a_lost_balance_is_a_drift_that_does_not_shrink_with_the_rate(make, why):
    report = trained(built(make)).report()
    lost = [row for row in report.laws if why in row.reason]
    assert {(row.status, row.order) for row in lost} == {("none", "O(1)")}
    assert min(row.residual for row in lost) > 1e-4
    assert report.holds
    assert _drifts(make, [0.1, 0.05, 0.025]) == pytest.approx([0, 0], abs=0.25)


def test_momentum_drifts_by_its_effective_rate():
    model = built(mlp)
    report = trained(model, sgd(model, momentum=0.9)).report()
    rows = report.laws
    assert {(row.status, row.reason, row.order) for row in rows} == {("drift", "momentum 0.9", "O(η/(1-μ)²)")}
    assert all(row.residual == row.drift > 1e-4 for row in rows)
    assert report.checked == 0
    slopes = _drifts(mlp, [0.01, 0.005, 0.0025], momentum=0.5, optimizer=lambda m, r: sgd(m, r, momentum=0.5))
    assert slopes == pytest.approx([1, 1], abs=0.1)

    def level(momentum):
        model = built(mlp)
        optimizer = sgd(model, 0.01, momentum=momentum)
        law = ConservationLaw(model, optimizer)
        for _ in range(round(200 * (1 - momentum))):
            step(model, optimizer, inputs()[:64], CLASSES[:64])
        return float(torch.cat(list(law.drift().values())).abs().mean())

    assert level(0.5) / level(0.0) == pytest.approx((1 + 0.5) / (1 - 0.5) ** 2, rel=0.1)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_adaptive_optimizers_drift(kind):
    model = built(mlp)
    rows = trained(model, kind(model.parameters(), lr=1e-3)).report().laws
    expected = ("drift", f"{kind.__name__} is not plain gradient descent", "O(1)")
    assert {(row.status, row.reason, row.order) for row in rows} == {expected}
    assert min(row.drift for row in rows) > 1e-5


def test_the_drift_of_adam_does_not_shrink_with_the_rate():
    slopes = _drifts(mlp, [2e-3, 1e-3, 5e-4], time=0.2, optimizer=lambda m, r: torch.optim.Adam(m.parameters(), lr=r))
    assert max(map(abs, slopes)) < 0.4


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "kp", "adafa"])
@pytest.mark.parametrize("make", [mlp, norm])
def test_weight_decay_is_accounted_for(rule, make):
    model = built(make, rule)
    groups = [
        {"params": [p], "weight_decay": 0.01 * (1 + index % 3)} for index, p in enumerate(model.parameters())
    ]  # each its own
    report = trained(model, torch.optim.SGD(groups, lr=0.1)).report()
    assert {row.status for row in report.laws} == {"accounted"}
    assert all("weight decay 0.0" in row.reason and row.order == "O(1)" for row in report.laws)
    assert max(row.residual for row in report.laws) <= 1e-13
    assert max(row.drift for row in report.laws) > 1e-2


def test_weight_decay_ends_where_the_alignment_is_the_length_of_the_incoming_weights():
    """At a stationary point ⟨B,W⟩ = |w|² + b² for every neuron, which is never negative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Identity(), nn.Linear(6, 2)).double()  # a kink would not come to rest
    falign.convert(model, "fa", scale=1.0)
    x = torch.randn(24, 3, dtype=torch.float64)
    y = torch.stack([x[:, 0] - x[:, 1], x[:, 2].abs()], 1)
    optimizer = sgd(model, 0.4, weight_decay=0.1)
    law = ConservationLaw(model, optimizer)
    for _ in range(700):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    (w, b), out = model[0].parameters(recurse=False), model[2].weight
    aligned = (model[2].feedback.B * out).sum(0)
    assert torch.allclose(aligned, w.square().sum(1) + b.square(), rtol=0, atol=1e-5)
    assert aligned.max() > 0.1
    assert law.report().holds


@pytest.mark.parametrize("rule", ["bp", "fa", "frsf", "kp"])
def test_a_rate_for_each_parameter_keeps_the_law_exact(rule):
    model = built(mlp, rule)
    rates = {name: 0.05 * (1 + index % 4) for index, (name, _) in enumerate(model.named_parameters())}
    optimizer = torch.optim.SGD([{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()])
    report = trained(model, optimizer).report()
    assert max(row.residual for row in report.laws) <= 1e-13
    assert report.laws[0].status == ("accounted" if rule == "frsf" else "exact")
    ratio = rates["0.weight"] / rates["2.weight"]
    assert f"{ratio:.4g}·" in report.laws[0].form
    assert max(row.drift for row in report.laws) < 0.1


def test_a_schedule_of_all_rates_keeps_the_law_exact_and_one_of_some_is_accounted_for():
    for other in (1.0, 0.5):
        model = built(mlp)
        first, rest = [model[0].weight], [p for p in model.parameters() if p is not model[0].weight]
        optimizer = torch.optim.SGD([{"params": first}, {"params": rest}], lr=0.2)
        changes = [lambda epoch: (epoch % 7) / 6, lambda epoch, o=other: o * (epoch % 7) / 6 + (1 - o)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, changes)  # it begins with no rate at all
        law = ConservationLaw(model, optimizer)
        for x, y in batches(50):
            step(model, optimizer, x, y)
            schedule.step()
        rows = by_layer(law)
        assert rows["0"].status == ("exact" if other == 1 else "accounted")
        assert ("ratio of the learning rates changed" in rows["0"].reason) == (other != 1)
        assert rows["2"].status == "exact"
        assert max(row.residual for row in rows.values()) <= 1e-13


def test_climbing_has_the_law_as_well():
    model = built(mlp)
    report = trained(model, sgd(model, 0.01, maximize=True, weight_decay=0.1), steps=20).report()
    assert report.checked == 2
    assert max(row.residual for row in report.laws) <= 1e-13


def test_several_targets_and_columns_side_by_side():
    for rule in ("bp", "fa", "usf", "kp"):
        rows = by_layer(trained(built(forked, rule)))
        assert rows["0"].targets == "2.parts.0, 2.parts.1"
        assert rows["0"].form.count("Σₜ") == 1
        assert rows["2.parts.0"].targets == rows["2.parts.1"].targets == "3"
        assert max(row.residual for row in rows.values()) <= 1e-13


class Attention(nn.Module):
    """Fixed mixing of positions, and softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(5))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ones(8, 8, dtype=x.dtype).tril() @ self.first(x.view(-1, 8, 8)).relu() / 8
        q, k, v = (part(x).view(-1, 8, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(x).relu().flatten(1))


def test_attention_keeps_the_law_of_its_values_and_a_mixing_of_positions_that_of_all():
    for rule in ("fa", "usf"):
        rows = by_layer(trained(built(Attention, rule), steps=20))
        for name in ("first", "v", "out"):
            assert rows[name].status in ("exact", "accounted")
            assert rows[name].residual <= 1e-13
        assert (rows["q"].targets, rows["q"].status) == ("k", "exact")  # whose law is the keys' as well
        assert rows["q"].residual <= 1e-13
        assert "k" not in rows


def test_layers_that_keep_backpropagation_have_its_law():
    for rule in ("fa", "dfa"):
        rows = by_layer(trained(built(mlp, rule, skip=["2"])))
        assert rows["0"].form == "½|w|² + ½b² - ½|W|²"
        assert rows["2"].form == "½|w|² - ⟨B,W⟩"
        assert max(row.residual for row in rows.values()) <= 1e-13


def test_a_kolen_pollack_feedback_that_the_optimizer_does_not_have_is_a_fixed_one():
    model = built(mlp)
    weights = list(model.parameters())
    falign.convert(falign.revert(model), "kp")
    rows = trained(model, torch.optim.SGD(weights, lr=0.1)).report().laws
    assert {(row.form.split(" - ")[1], row.status) for row in rows} == {("⟨B,W⟩", "exact")}
    assert max(row.residual for row in rows) <= 1e-13


@dataclass(frozen=True, kw_only=True)
class Softened(Rule):
    """B = tanh(W): an entrywise feedback that falign does not know."""

    name: ClassVar[str] = "softened"
    reads_weight: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    def init_feedback(self, draw, deviation):
        return torch.tensor(deviation)

    def feedback_inputs(self, feedback, weight, *, advance):
        return feedback.matrix, weight.detach()

    def feedback_matrix(self, *sources, scratch=None):
        return torch.tanh(sources[1])


def test_an_entrywise_feedback_has_its_integral():
    model = built(mlp, Softened())
    law = trained(model, sgd(model, 0.02), steps=300)
    rows = law.report().laws
    assert {row.status for row in rows} == {"accounted"}
    assert all(row.form.endswith("∫⟨B(W),dW⟩") for row in rows)
    assert max(row.residual for row in rows) <= 1e-13

    def integral(weight):  # of tanh
        return weight.cosh().log().sum(0)

    fresh, weight = built(mlp, Softened()), model[2].weight.detach()
    _, gained = law.changes()["0"]
    assert torch.allclose(gained, integral(weight) - integral(fresh[2].weight.detach()), atol=2e-3)
    assert gained.abs().max() > 2e-2


def test_what_does_not_learn_has_no_law_and_a_zero_bias_is_none():
    model = built(mlp)
    model[2].weight.requires_grad_(False)
    rows = by_layer(trained(model, steps=5))
    assert rows["0"].reason == "the weight of layer '2' is frozen"
    assert rows["2"].reason == "its weight is frozen"
    model = built(mlp)
    rows = by_layer(trained(model, torch.optim.SGD([p for p in model.parameters() if p is not model[2].weight], 0.1)))
    assert rows["2"].reason == "its weight is not in the optimizer"
    for value, status in ((0.0, "exact"), (0.1, "none")):
        model = built(mlp)
        nn.init.constant_(model[0].bias, value).requires_grad_(False)
        rows = by_layer(trained(model))
        assert rows["0"].status == status
        assert (rows["0"].residual <= 1e-13) == (status == "exact")
        assert ("bias is frozen" in rows["0"].reason) == (status == "none")


def test_normalisation_without_parameters_or_by_running_statistics():
    model = built(lambda: nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 10)))
    (row,) = trained(model, steps=5).report().laws
    assert (row.status, row.reason, row.residual) == ("none", "layer '1' has no weight of its own", None)
    model = built(norm).eval()
    rows = by_layer(trained(model))
    assert "running statistics" in rows["1"].reason
    assert rows["2"].status == "exact"
    assert rows["2"].residual <= 1e-13


def test_several_batches_behind_one_step_cannot_be_told_apart_where_each_pass_has_its_own():
    for make, rule, reason in ((mlp, "brsf", "several passes"), (norm, "fa", "several passes"), (mlp, "adafa", "")):
        model = built(make, rule)
        optimizer = sgd(model)
        law = ConservationLaw(model, optimizer)
        for count, (x, y) in enumerate(batches(20)):
            nn.functional.cross_entropy(model(x), y).backward()
            if count % 2:
                optimizer.step()
                optimizer.zero_grad()
        row = law.report().laws[0]
        assert (row.status == "drift") == bool(reason)
        assert reason in row.reason
        assert law.report().holds
        assert law.steps == 10


def test_the_table_reads_well():
    model = built(norm, "fa")
    lines = str(trained(model, sgd(model, weight_decay=1e-3), steps=10).report()).splitlines()
    assert lines[0] == "conservation law after 10 steps: holds (4 layers of 4 checked)"
    assert lines[1].split("  ")[0] == "layer"
    assert len(lines) == 6
    assert lines[2].endswith("the ε of its batch normalisation; weight decay 0.001: O(1)")
    assert max(map(len, lines)) < 145


def test_the_report_as_a_table_of_numbers():
    polars = pytest.importorskip("polars")
    law = trained(built(mlp), steps=5)
    rows = law.report().rows()
    assert list(rows[0]) == [
        "layer", "targets", "form", "status", "reason", "order", "neurons", "drift", "residual", "moved", "leap",
        "tolerance", "told",
    ]  # fmt: skip
    assert [row["neurons"] for row in rows] == [16, 12]
    frame = law.report().to_polars()
    assert isinstance(frame, polars.DataFrame)
    assert frame["layer"].to_list() == ["0", "2"]
    assert [law.name for law in law.laws] == ["0", "2"]
    assert law.laws[0].targets == ("2",)
