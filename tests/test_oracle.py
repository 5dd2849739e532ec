"""Every rule's gradients against the independent NumPy oracle, on every network."""

import dataclasses

import numpy as np
import pytest
import torch

import falign
import oracles
from cases import CASES, DIRECT, LAYERWISE, REFERENCES, RULES, batch, build, gradients, loss_of, relative


def arrays(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if "feedback" not in name}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", [*RULES, *REFERENCES])
def test_gradients_equal_the_definition(rule, case):
    model = build(case, rule)
    x, y = batch(case)
    feedback = {
        name: b.numpy() for name, b in falign.feedback_state(model).items() if not name.endswith((".passes", ".seen"))
    }
    defined = oracles.gradients(rule, CASES[case].steps, x.numpy(), y.numpy(), arrays(model), feedback)
    taken = gradients(model, x, y)
    assert relative(taken, defined) <= 1e-10
    assert all(np.any(value) for value in defined.values()), "a gradient that is zero would prove nothing"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", [*RULES, *REFERENCES])
def test_verify_agrees_with_the_oracle(rule, case):
    model = build(case, rule)
    x, y = batch(case)
    before = {name: b.clone() for name, b in falign.feedback_state(model).items()}
    result = falign.verify(model, x, lambda output: loss_of(output, y), target=y)
    assert result
    assert result.worst.error <= 1e-10
    assert str(result).count("\n") == len(result.rows) + 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], b) for name, b in falign.feedback_state(model).items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", [*LAYERWISE, *DIRECT])
def test_verify_sees_a_wrong_gradient(rule, case, monkeypatch):
    """An error that is delivered a thousandth too large is named, with the layers below it."""
    for name, kind in falign.layers.KINDS.items():
        wrong = dataclasses.replace(kind, error=lambda e, b, x, spec, kind=kind: kind.error(e, b, x, spec) * 1.001)
        monkeypatch.setitem(falign.layers.KINDS, name, wrong)
    right = falign._delivery.project
    monkeypatch.setattr(falign._delivery, "project", lambda *args, **how: right(*args, **how) * 1.001)
    model = build(case, rule)
    x, y = batch(case)
    result = falign.verify(model, x, lambda output: loss_of(output, y), target=y)
    assert not result
    assert result.worst.error > 5e-4
    assert "WRONG" in str(result)
    assert all(row.error <= 1e-10 for row in result.rows[-2:]), "the last layer has its true gradient"


def test_backpropagation_is_autograd_to_the_bit():
    for case in CASES:
        plain, converted = build(case), build(case, "bp")
        x, y = batch(case)
        loss_of(plain(x), y).backward()
        expected = {name: p.grad for name, p in plain.named_parameters()}
        taken = gradients(converted, x, y)
        assert all(torch.equal(taken[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", CASES)
def test_feedback_of_the_weights_is_backpropagation(case):
    """With B = W layerwise delivery is the chain rule: the identity that nothing else can satisfy by accident."""
    model = build(case)
    x, y = batch(case)
    names = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    true = gradients(build(case, "bp"), x, y)
    falign.convert(model, "fa", feedback={name: model.get_submodule(name).weight for name in names})
    assert relative(gradients(model, x, y), true) <= 1e-14
