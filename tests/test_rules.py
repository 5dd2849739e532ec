"""The laws that belong to single rules, and FLOPs, which are exact for all."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import falign
from cases import LAYERWISE, RULES, batch, build, gradients, loss_of, relative, step
from falign.rules import (
    AdaptiveFeedbackAlignment,
    DirectRandomTargetProjection,
    KolenPollack,
    ProductFeedbackAlignment,
)


def train(model, optimizer, steps, x, y):
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, x, y)
        optimizer.step()


def flops(model, x, y):
    with FlopCounterMode(display=False) as counter:
        step(model, x, y)
    return counter.get_total_flops()


@pytest.mark.parametrize("rule", [rule for rule in LAYERWISE if rule not in ("kp", "pfa")])
@pytest.mark.parametrize("case", ["mlp", "conv", "residual", "sequence"])
def test_layerwise_costs_exactly_what_backpropagation_costs(rule, case):
    assert flops(build(case, rule), *batch(case)) == flops(build(case, "bp"), *batch(case))


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_direct_costs_forward_weight_gradients_and_projections(rule):
    """MLP 20-30-30-25-7, batch 16: forward 2·n·|W|, weight gradients the same, e B into three cuts."""
    weights = 20 * 30 + 30 * 30 + 30 * 25 + 25 * 7
    projections = 7 * (30 + 30 + 25)
    assert flops(build("mlp", rule), *batch("mlp")) == 2 * 16 * (2 * weights + projections)
    assert flops(build("mlp", "bp"), *batch("mlp")) == 2 * 16 * (3 * weights - 20 * 30)


def test_direct_costs_on_convolutions():
    """Each layer on its own, its input cut: that is forward and weight gradients."""
    x = batch("conv")[0]
    with FlopCounterMode(display=False) as alone:
        for layer in build("conv"):
            x = layer(x.detach())
            if x.requires_grad:
                x.sum().backward()
    projections = 2 * 4 * 5 * (6 * 6 * 6 + 4 * 6 * 8 + 4 * 4 * 6)
    assert flops(build("conv", "dfa"), *batch("conv")) == alone.get_total_flops() + projections


def test_kolen_pollack_costs_one_weight_gradient_more():
    weights = 20 * 30 + 30 * 30 + 30 * 25 + 25 * 7
    assert flops(build("mlp", "kp"), *batch("mlp")) == 2 * 16 * (4 * weights - 20 * 30)


def test_direct_kolen_pollack_costs_a_readout_of_every_layer_more():
    readouts = 7 * (20 + 30 + 30 + 25)
    assert flops(build("mlp", "dkp"), *batch("mlp")) == flops(build("mlp", "dfa"), *batch("mlp")) + 2 * 16 * readouts


@pytest.mark.parametrize("fan", [1, 8, 32])
def test_product_feedback_costs_two_products_with_its_blocks(fan):
    """P R where an error is carried on, Pᵀ ∇W everywhere; the gradient of W is used again and costs nothing."""

    def block(out):
        return out // fan * fan * fan + (out % fan) ** 2

    products = sum(block(out) * width for out, width in ((30, 20), (30, 30), (25, 30), (7, 25)))
    carried = products - block(30) * 20
    rule = ProductFeedbackAlignment(fan=fan)
    assert flops(build("mlp", rule), *batch("mlp")) == flops(build("mlp", "bp"), *batch("mlp")) + 2 * (
        products + carried
    )


@pytest.mark.parametrize("rule", ["kp", "pfa", ProductFeedbackAlignment(fan=3)], ids=str)
@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_kolen_pollack_weights_and_feedback_meet_at_the_rate_of_the_decay(case, rule):
    """W - B shrinks by (1 - ηλ) a step, exactly, whatever the gradients are."""
    model, (x, y) = build(case, rule), batch(case)
    layers = [m for m in model if hasattr(m, "feedback")]

    def differences():
        return [(m.weight - m.feedback.feedback_matrix(m.weight)).detach().clone() for m in layers]

    before = differences()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5), 20, x, y)
    for difference, start in zip(differences(), before, strict=True):
        assert torch.allclose(difference, (1 - 0.05) ** 20 * start, rtol=1e-10, atol=1e-13)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5), 180, x, y)
    assert float(differences()[1].norm()) < 2e-4


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
])  # fmt: skip
@pytest.mark.parametrize("rule", ["kp", "adafa", "brsf", "dkp", "pfa", "ldfa"])
def test_learned_feedback_survives_a_resume(rule, make):
    """state_dict of model and optimizer, and for brsf the same seed, continue to the same numbers."""
    x, y = batch("mlp")
    whole = build("mlp", rule)
    optimizer = make(whole.parameters())
    train(whole, optimizer, 5, x, y)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, 5, x, y)

    resumed = build("mlp", rule, seed=0 if rule == "brsf" else 99)
    optimizer = make(resumed.parameters())
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, 5, x, y)
    assert relative(dict(resumed.named_parameters()), dict(whole.named_parameters())) == 0
    assert relative(falign.feedback_state(resumed), falign.feedback_state(whole)) == 0


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_adaptive_feedback_follows_every_change_once(rate):
    model, (x, y) = build("mlp", AdaptiveFeedbackAlignment(rate=rate)), batch("mlp")
    layer = model[2]
    expected = layer.feedback.B.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        expected = (1 - rate) * expected + rate * layer.weight.detach()
        for _ in range(3):  # several passes on the same weights move it once
            step(model, x, y)
        assert torch.allclose(layer.feedback.B, expected, rtol=1e-13, atol=1e-15)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(x)
        assert torch.allclose(layer.feedback.B, expected, rtol=1e-13, atol=1e-15), "evaluation does not move it"
        model.train()


def test_adaptive_feedback_sees_changes_of_any_kind():
    model, (x, y) = build("mlp", AdaptiveFeedbackAlignment(rate=1.0)), batch("mlp")
    step(model, x, y)
    model[2].weight.data[3, 4] += 1e-12  # past autograd's version counter, the smallest kind of step
    step(model, x, y)
    assert torch.equal(model[2].feedback.B, model[2].weight)


def test_adaptive_feedback_runs_from_feedback_alignment_to_backpropagation():
    x, y = batch("mlp")
    fixed = gradients(falign.convert(build("mlp"), "fa", scale=0.6), x, y)
    true = gradients(build("mlp", "bp"), x, y)
    fa = falign.convert(build("mlp"), AdaptiveFeedbackAlignment(rate=0.0), scale=0.6)
    assert relative(gradients(fa, x, y), fixed) == 0
    assert relative(gradients(build("mlp", AdaptiveFeedbackAlignment(rate=1.0)), x, y), true) <= 1e-14


def test_batchwise_signs_are_fresh_in_every_training_pass():
    model, (x, y) = build("mlp", "brsf"), batch("mlp")
    layer = model[2]
    pool = layer.feedback.B.clone()
    seen = []
    for _ in range(5):
        step(model, x, y)
        matrix = layer.feedback.feedback_matrix(layer.weight)
        assert torch.equal(matrix.sign(), layer.weight.sign())
        assert torch.equal(matrix.abs().flatten().sort().values, pool.flatten().sort().values)
        seen.append(matrix)
    assert all(not torch.equal(one, other) for one in seen for other in seen if one is not other)
    model.eval()
    step(model, x, y)
    with torch.no_grad():
        model(x)
    assert torch.equal(layer.feedback.feedback_matrix(layer.weight), seen[-1]), "evaluation draws nothing"
    assert torch.equal(layer.feedback.B, pool)


def test_batchwise_magnitudes_visit_the_whole_pool_once():
    model = falign.convert(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), "brsf")
    layer, x, y = model[1], torch.randn(3, 6, dtype=torch.float64), torch.randint(4, (3,))
    met = []
    for _ in range(20):
        step(model, x, y)
        met.append(layer.feedback.feedback_matrix(layer.weight)[2, 3].abs())
    assert torch.equal(torch.stack(met).sort().values, layer.feedback.B.flatten().sort().values)


@pytest.mark.parametrize("rule", ["usf", "frsf", "brsf"])
def test_sign_rules_give_zero_where_the_weight_is_zero(rule):
    model, (x, y) = build("mlp", rule), batch("mlp")
    with torch.no_grad():
        model[2].weight[:, 3] = 0
    matrix = model[2].feedback.feedback_matrix(model[2].weight)
    assert (matrix[:, 3] == 0).all()
    assert falign.verify(model, x, lambda output: loss_of(output, y))


@pytest.mark.parametrize("rule", ["usf", "frsf", "brsf"])
def test_large_layers_take_the_piecewise_path_to_the_same_matrix(rule):
    model = falign.convert(
        nn.Sequential(nn.Linear(9, 900), nn.ReLU(), nn.Linear(900, 1201), nn.ReLU(), nn.Linear(1201, 3)), rule
    )
    x, y = torch.randn(5, 9), torch.randint(3, (5,))
    for _ in range(3):
        result = falign.verify(model, x, lambda output: loss_of(output, y))
        assert result
        assert result.worst.error < 1e-6
        step(model, x, y)


def test_target_projection_is_the_target_times_the_share_of_a_sample():
    """Mean cross-entropy over 16 samples: every cut receives -(1/16) t B, whatever the output says."""
    model, (x, y) = build("mlp", "drtp"), batch("mlp")
    state, seen = falign.feedback_state(model), {}
    model[1].register_forward_hook(lambda m, a, out: out.register_hook(lambda g: seen.__setitem__("e", g)) and None)
    step(model, x, y)
    expected = -(1 / 16) * nn.functional.one_hot(y, 7).double() @ state["2"]
    assert torch.allclose(seen["e"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("output", "loss", "target"),
    [
        ("softmax", nn.functional.cross_entropy, torch.randint(7, (16,))),
        ("sigmoid", nn.functional.binary_cross_entropy_with_logits, torch.rand(16, 7, dtype=torch.float64)),
        ("linear", nn.functional.mse_loss, torch.randn(16, 7, dtype=torch.float64)),
    ],
)
def test_target_projection_recovers_the_share_of_every_matching_loss(output, loss, target):
    rule = DirectRandomTargetProjection(output=output)
    logits = torch.randn(16, 7, dtype=torch.float64, requires_grad=True)
    (error,) = torch.autograd.grad(3.0 * loss(logits, target), logits)
    goal = nn.functional.one_hot(target, 7).double() if target.dim() == 1 else target
    share = {"softmax": 3 / 16, "sigmoid": 3 / (16 * 7), "linear": 3 * 2 / (16 * 7)}[output]
    assert torch.allclose(rule.error(error, logits.detach(), goal, -1), -share * goal, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaptiveFeedbackAlignment(rate=1.5), "adafa: rate is 1.5, expected a number from 0"),
        pytest.param(
            lambda: DirectRandomTargetProjection(output="relu"),
            "drtp: output is 'relu', expected softmax",
            marks=pytest.mark.unchecked,
        ),
    ],
)
def test_wrong_options_of_rules(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_rules_are_values():
    assert KolenPollack() == KolenPollack()
    assert hash(AdaptiveFeedbackAlignment(rate=0.1)) == hash(AdaptiveFeedbackAlignment(rate=0.1))
    model = falign.convert(build("mlp"), KolenPollack())
    assert falign.feedback_state(model)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns(rule):
    """A small task, the same start: the loss falls well below chance under every rule."""
    torch.manual_seed(0)
    x = torch.randn(200, 10)
    y = (x @ torch.randn(10, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    falign.convert(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    train(model, optimizer, 150, x, y)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean()
    assert accuracy > 0.85


@pytest.mark.parametrize("rule", RULES)
def test_last_layer_has_its_true_gradient(rule):
    x, y = batch("mlp")
    model = build("mlp", rule)
    taken, true = gradients(model, x, y), gradients(build("mlp", "bp"), x, y)
    last = {name: taken[name] for name in ("6.weight", "6.bias")}
    assert relative(last, {name: true[name] for name in last}) == 0


def test_every_rule_documents_its_source():
    for rule in falign.ALL_RULES.values():
        assert "Source:" in rule.__doc__
        assert rule.__name__ not in (None, "Rule")
