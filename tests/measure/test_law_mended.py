"""Correct trainings that are unlike the plain one, and wrong ones that gradients alone would not show."""

import pytest
import torch
from law_training import CLASSES, batches, built, by_layer, conv, inputs, mlp, norm, sgd, step, trained
from torch import Tensor, nn

import falign
from cases import LAYERWISE
from falign.measure.law import ConservationLaw


def run(model, optimizer=None, *, law=None, before=None, after=None, steps=20, dtype=torch.float64, scaled=lambda x: x):
    """A training into which something happens before or after its steps."""
    optimizer = optimizer or sgd(model)
    law = law or ConservationLaw(model, optimizer)
    for count, (x, y) in enumerate(batches(steps, dtype=dtype)):
        if before is not None:
            before(count, optimizer)
        step(model, optimizer, scaled(x), y)
        if after is not None:
            with torch.no_grad():
                after(count)
    return law


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("rule", ["bp", *LAYERWISE])
def test_weights_that_another_hand_shrinks_are_seen(rule, make):
    model = built(make, rule)
    report = run(model, after=lambda count: model[-1].weight.mul_(0.5) if count == 10 else None).report()
    assert not report.holds
    assert max(row.residual for row in report.laws) > 1e-2
    assert by_layer(run(built(make, rule)))[report.laws[-1].layer].residual <= 1e-14


def test_a_learned_feedback_that_another_hand_overwrites_is_seen():
    model = built(mlp, "kp")
    law = run(model, after=lambda count: model[-1].feedback.matrix.mul_(0.5) if count == 10 else None)
    assert not law.report().holds


@pytest.mark.parametrize("rule", ["bp", "usf", "kp", "adafa"])
def test_a_resumed_run_still_sees_the_weights_as_they_are(rule):
    model = built(mlp, rule)
    optimizer = sgd(model, weight_decay=0.01)
    law = run(model, optimizer)
    saved = law.state_dict()
    law.detach()
    for factor in (1.0, 0.5):
        again = ConservationLaw(model, optimizer)
        again.load_state_dict(saved)
        assert again.state_dict() is saved
        with pytest.raises(ValueError, match="give example=; the state that was loaded is used from then on"):
            again.report()
        with torch.no_grad():
            model[-1].weight.mul_(factor)
        if factor == 1.0:
            again = run(model, optimizer, law=again)
            assert again.steps == 40
            assert max(row.residual for row in again.report().laws) <= 1e-14
            saved = again.state_dict()
        else:
            assert not run(model, optimizer, law=again).report().holds
        again.detach()


def test_a_pass_that_only_measures_is_not_the_example():
    model = built(mlp, "usf")
    optimizer = sgd(model)
    law = ConservationLaw(model, optimizer)
    falign.measure.alignment(model, nn.functional.cross_entropy, inputs()[:8], CLASSES[:8])
    with pytest.raises(ValueError, match="no forward pass was seen yet"):
        _ = law.laws
    report = run(model, optimizer, law=law).report()
    assert all("Σ|B||W|" in row.form for row in report.laws)
    assert max(row.residual for row in report.laws) <= 1e-14


class Joined(nn.Module):
    """Two layers, one of them zero at first, and a number that is zero at first."""

    def __init__(self, join) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(64, 12), nn.Linear(64, 12), nn.Linear(12, 10)
        self.shift, self.join = nn.Parameter(torch.zeros(())), join
        for parameter in self.b.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.join(self.a(x), self.b(x), x, self.shift).relu())


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b, x, shift: a + shift,
        lambda a, b, x, shift: a + 2 * shift,
        lambda a, b, x, shift: torch.stack([a, b]).sum(0),
        lambda a, b, x, shift: torch.where(x[:, 2:3] > 0.3, a, b),
    ],
)
def test_what_is_zero_only_at_first_is_not_zero(join):
    report = run(built(lambda: Joined(join))).report()
    assert report.holds
    assert report.laws[0].status == "none"


@pytest.mark.parametrize(("name", "index"), [("2.weight", 0), ("0.weight", 0), ("0.bias", 0)])
def test_weights_frozen_for_some_steps_drift(name, index):
    model = built(mlp)
    report = run(model, before=lambda count, _: model.get_parameter(name).requires_grad_(not 5 <= count < 9)).report()
    assert report.holds
    assert report.laws[index].status == "drift"
    assert "no gradient in some steps" in report.laws[index].reason


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x).relu()
        return self.c(self.b(h).relu())


def test_a_backbone_without_gradients_drifts_though_the_optimizer_has_it():
    first, second = run(built(Backbone)).report().laws
    assert (first.status, second.status) == ("drift", "exact")
    assert second.residual <= 1e-14


def test_momentum_and_weight_decay_that_come_later():
    def momentum(count, optimizer):
        optimizer.param_groups[0]["momentum"] = 0.9 * (5 < count < 10)

    model = built(mlp)
    law = run(model, before=momentum)
    assert {(row.status, row.reason) for row in law.report().laws} == {("drift", "momentum 0.9")}
    saved = law.state_dict()
    law.detach()
    again = ConservationLaw(model, sgd(model), example=inputs()[:2])
    again.load_state_dict(saved)
    assert {row.status for row in again.report().laws} == {"drift"}

    def decay(count, optimizer):
        optimizer.param_groups[0]["weight_decay"] = 0.01 * (count > 9)

    rows = run(built(mlp), before=decay).report().laws
    assert {(row.status, row.reason) for row in rows} == {("accounted", "weight decay 0.01")}
    assert max(row.residual for row in rows) <= 1e-14


def test_a_rate_of_zero_is_named_and_a_warm_up_from_zero_has_its_ratio():
    for start in (0.0, 0.02):
        model = built(mlp)
        others = [p for p in model.parameters() if p is not model[0].weight]
        optimizer = torch.optim.SGD([{"params": [model[0].weight]}, {"params": others}], lr=0.1)

        def rates(count, optimizer, start=start):
            warm = min(1.0, count / 5) if start else 1.0
            for group, rate in zip(optimizer.param_groups, (start, 0.1), strict=True):
                group["lr"] = rate * warm

        row = run(model, optimizer, before=rates).report().laws[0]
        assert row.residual <= 1e-14
        assert (row.status, row.reason) == (("exact", "") if start else ("accounted", "one of its learning rates is 0"))


def test_the_mode_of_the_training_counts():
    model = built(norm).eval()
    optimizer = sgd(model)
    law = ConservationLaw(model, optimizer, example=inputs()[:4])
    assert "running statistics" in law.laws[0].reason
    report = run(model.train(), optimizer, law=law).report()
    assert report.checked == 4
    assert max(row.residual for row in report.laws) <= 1e-14
    model = built(mlp)
    rows = run(model, before=lambda count, _: model.train(count < 9)).report().laws
    assert {row.reason for row in rows} == {"steps in evaluation mode, in which it was not followed"}


def test_a_mean_far_above_the_spread_hides_the_law():
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))

    checked = {"exact", "accounted"}
    for level, spread, dtype, status in (
        (1.0, 1.0, torch.float32, checked),
        (2.0, 0.5, torch.float32, checked),
        (50.0, 0.3, torch.float64, checked),
        (200.0, 0.03, torch.float32, {"drift"}),
    ):
        model = built(net, "fa", dtype)
        law = run(model, scaled=lambda x, a=level, b=spread: a + b * x, dtype=dtype)
        assert {row.status for row in law.report().laws} == status
        assert law.report().holds


def test_where_hardly_anything_moved_it_is_said():
    for rate, dtype in ((0.0, torch.float64), (1e-9, torch.float32)):
        model = built(mlp, "fa", dtype)
        report = run(model, sgd(model, rate), dtype=dtype).report()
        assert report.holds
        assert not report.conclusive
        assert {row["told"] for row in report.rows()} == {False}
        assert str(report).count("too little has moved to tell") == 3
    assert trained(built(mlp), steps=3).report().conclusive


def test_a_model_without_pairs_and_one_with_many_targets():
    model = falign.convert(nn.Sequential(nn.Linear(64, 10)).double(), "fa")
    assert str(run(model).report()).endswith("no layer of this model feeds another, so there is nothing to check")

    class Star(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.parts = nn.Linear(64, 12), nn.ModuleList(nn.Linear(12, 2) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            return torch.cat([part(h) for part in self.parts], 1)

    model = built(Star)
    groups = [{"params": [p], "lr": 0.01 * (1 + index)} for index, p in enumerate(model.parameters())]
    row = run(model, torch.optim.SGD(groups, lr=0.1)).report().laws[0]
    assert row.form.endswith(" - Σₜsₜ⟨B,W⟩ over 5 layers")
    assert row.residual <= 1e-14
