"""Angles to the true gradient, measured without leaving a trace."""

import copy
from math import degrees

import pytest
import torch
from torch import nn

import falign
from cases import RULES, batch, build, gradients, loss_of
from falign.measure import angle, gradient_angles


@pytest.mark.parametrize("case", ["mlp", "conv", "residual", "sequence"])
@pytest.mark.parametrize("rule", RULES)
def test_angles_are_those_of_the_gradients(rule, case):
    model, (x, y) = build(case, rule), batch(case)
    own, true = gradients(copy.deepcopy(model), x, y), gradients(build(case, "bp"), x, y)
    angles = gradient_angles(model, loss_of, x, y)
    for name, value in angles.items():
        keys = [key for key in (name + ".weight", name + ".bias") if key in own]
        f, g = (torch.cat([slopes[key].flatten() for key in keys]) for slopes in (own, true))
        expected = degrees(float(torch.acos(torch.clamp(f @ g / f.norm() / g.norm(), -1, 1))))
        assert value == pytest.approx(expected, abs=1e-5)
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert list(angles) == layers
    assert angles[layers[-1]] == pytest.approx(0, abs=1e-5)
    if rule == "bp":
        assert max(angles.values()) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_measuring_leaves_no_trace(rule):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    falign.convert(model, rule)
    x, y = torch.randn(16, 9), torch.randint(3, (16,))
    with falign.targets(model, y):
        loss_of(model(x), y).backward()
    before = copy.deepcopy((model.state_dict(), falign.feedback_state(model)))
    slopes, random = [p.grad.clone() for p in model.parameters()], torch.random.get_rng_state()
    gradient_angles(model, loss_of, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(before[1].values(), falign.feedback_state(model).values(), strict=True)
    )
    assert all(torch.equal(a, p.grad) for a, p in zip(slopes, model.parameters(), strict=True))
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.training


def test_dropout_masks_match():
    """Under backpropagation both passes are the same pass: the angle is zero only if the masks are the same."""
    model = nn.Sequential(nn.Linear(9, 50), nn.Dropout(0.5), nn.ReLU(), nn.Linear(50, 3)).double()
    falign.convert(model, falign.rules.AdaptiveFeedbackAlignment(rate=1.0))
    x, y = torch.randn(8, 9, dtype=torch.float64), torch.randint(3, (8,))
    assert max(gradient_angles(model, loss_of, x, y).values()) < 1e-5


def test_frozen_layers_are_left_out_and_no_grad_does_not_matter():
    model, (x, y) = build("mlp", "fa"), batch("mlp")
    model[2].requires_grad_(False)
    with torch.no_grad():
        assert list(gradient_angles(model, loss_of, x, y)) == ["0", "4", "6"]


def test_effective_feedback_of_a_sign_rule_has_the_signs():
    """Peers compare |B₀| with W and report 90 degrees; with the signs the angle is about 37."""
    model = falign.convert(
        nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200)), "frsf", feedback="normal"
    )
    nn.init.normal_(model[2].weight)
    part = model[2].feedback
    assert angle(part.feedback_matrix(model[2].weight), model[2].weight) == pytest.approx(50.5, abs=1)
    assert 89 < angle(part.B, model[2].weight) < 91
    usf = falign.convert(nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200)), "usf")
    nn.init.normal_(usf[2].weight)
    assert angle(usf[2].feedback.feedback_matrix(usf[2].weight), usf[2].weight) == pytest.approx(37.1, abs=1)


def test_angle_of_nothing_is_a_right_angle():
    assert angle(torch.zeros(3), torch.ones(3)) == 90
