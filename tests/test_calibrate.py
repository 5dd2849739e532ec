"""One true pass in so many: falign.calibrate, and --calibrate of the command."""

import copy

import pytest
import torch
from torch import nn

import falign
from cases import CASES, DIRECT, LAYERWISE, batch, build, gradients, loss_of, relative, step


def kinds(model, x, y, passes):
    """Whether each pass is that of the rule (False) or true (True)."""
    rule = gradients(falign.calibrate(copy.deepcopy(model), every=None), x, y)
    with falign.backprop(model):
        true = gradients(model, x, y)
    taken = [gradients(model, x, y) for _ in range(passes)]
    names = [name for name in true if "feedback" not in name]
    assert relative({n: rule[n] for n in names}, {n: true[n] for n in names}) > 1e-3
    return [relative({n: one[n] for n in names}, {n: true[n] for n in names}) <= 1e-13 for one in taken]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", [*LAYERWISE, *DIRECT])
def test_every_third_pass_is_true(rule, case):
    model, (x, y) = build(case, rule), batch(case)
    assert falign.calibrate(model, every=3) is model
    assert kinds(model, x, y, 7) == [False, False, True, False, False, True, False]


def test_what_is_no_training_is_not_counted():
    model, (x, y) = falign.calibrate(build("mlp", "fa"), every=2), batch("mlp")
    with torch.no_grad():
        model(x)
    model.eval()
    step(model, x, y)
    model.train()
    falign.measure.alignment(model, loss_of, x, y)
    falign.verify(model, x, lambda output: loss_of(output, y))
    assert kinds(model, x, y, 4) == [False, True, False, True]


def test_it_goes_on_where_it_was_and_ends():
    model, (x, y) = falign.calibrate(build("mlp", "dfa"), every=4, passes=2), batch("mlp")
    assert kinds(model, x, y, 3) == [False, True, False]
    falign.calibrate(model, every=1)
    assert kinds(model, x, y, 2) == [True, True]
    falign.calibrate(model, every=None)
    assert kinds(model, x, y, 3) == [False, False, False]
    falign.revert(falign.calibrate(model, every=2))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_feedback_does_not_learn_in_a_true_pass():
    model, (x, y) = falign.calibrate(build("mlp", "kp"), every=1), batch("mlp")
    step(model, x, y)
    assert all(layer.feedback.B.grad is None for layer in model if hasattr(layer, "feedback"))
    model = falign.calibrate(build("mlp", "probe"), every=1)
    step(model, x, y)
    assert not any(bool(matrix.any()) for matrix in falign.feedback_state(model).values())


def test_a_pass_that_fails_does_not_leave_the_rule_off():
    class Fails(nn.Sequential):
        def forward(self, x):
            if x.isnan().any():
                raise ArithmeticError
            return super().forward(x)

    x, y = torch.randn(5, 4), torch.randint(2, (5,))
    model = falign.convert(Fails(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), "fa")
    expected = gradients(model, x, y)
    falign.calibrate(model, every=1)
    with pytest.raises(ArithmeticError):
        model(x / 0 * 0)
    falign.calibrate(model, every=None)
    assert relative(gradients(model, x, y), expected) == 0


def test_copies_count_for_themselves():
    model, (x, y) = falign.calibrate(build("mlp", "fa"), every=2), batch("mlp")
    step(model, x, y)
    other = copy.deepcopy(model)
    first, second = gradients(model, x, y), gradients(other, x, y)
    assert relative(first, second) == 0, "both are at their second pass, a true one"
    assert relative(gradients(model, x, y), first) > 1e-3


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("make", "how", "said"),
    [
        (lambda: build("mlp"), {"every": 2}, "is not converted"),
        (lambda: build("mlp", "fa")[:3], {"every": 2}, "the model that was given to falign.convert, not a part"),
        (lambda: build("mlp", "bp"), {"every": 2}, "rule 'bp' has no feedback, so there is nothing to calibrate"),
        (lambda: build("mlp", "frozen"), {"every": 2}, "rule 'frozen' has no feedback"),
        (lambda: build("mlp", "fa"), {"every": 0}, "every is 0, expected a whole number of passes from 1 on, or None"),
        (lambda: build("mlp", "fa"), {"every": 1.5}, "every is 1.5"),
        (lambda: build("mlp", "fa"), {"every": 2, "passes": -1}, "passes"),
    ],
)
def test_what_cannot_be_is_said(make, how, said):
    with pytest.raises(ValueError, match=said):
        falign.calibrate(make(), **how)


@pytest.mark.compiled
def test_compiled_code_is_refused():
    model, (x, _) = falign.calibrate(build("mlp", "fa"), every=2), batch("mlp")
    with pytest.raises(Exception, match="counts passes, which compiled code does not do"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
