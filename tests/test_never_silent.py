"""What would make a gradient silently wrong, zero or backpropagation's is right, or refused in words."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import falign
from cases import batch, build, gradients, loss_of, relative


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.fixture
def x():
    return torch.randn(6, 8, dtype=torch.float64)


@pytest.fixture
def y():
    return torch.randint(4, (6,))


class Returns(nn.Module):
    """A body, and something made of its output."""

    def __init__(self, make):
        super().__init__()
        self.body, self.make = mlp(), make

    def forward(self, x):
        return self.make(self.body(x))


@pytest.mark.parametrize("key", ["loss", "probs"])
def test_a_loss_that_does_not_pass_the_output_is_refused(key, x, y):
    model = Returns(lambda out: {"loss": loss_of(out, y), "logits": out, "probs": out.softmax(-1)})
    falign.convert(model, "dfa", example=x, output="logits")
    with pytest.raises(RuntimeError, match="the loss does not pass through the model's output that carries the error"):
        model(x)[key].sum().backward()
    model.zero_grad()
    loss_of(model(x)["logits"], y).backward()
    assert model.body[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("output", [lambda result: result["a"].mean(1), lambda result: result["a"] + 0])
def test_an_output_that_is_no_part_of_the_result_is_refused(output, x):
    (problem,) = falign.check(Returns(lambda out: {"a": out}), "dfa", example=x, output=output)
    assert "output= picked a tensor that is no part of what the model returned (dict)" in problem


def test_output_that_fails_or_is_not_needed(x):
    (problem,) = falign.check(mlp(), "dfa", example=x, output=lambda result: result.logits)
    assert "output= raised AttributeError" in problem
    (problem,) = falign.check(mlp(), "dfa", example=x, output="logits")
    assert "it is no structure, leave output='logits' out" in problem


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.reentrant = mlp(), reentrant

    def forward(self, x):
        return self.body[4](checkpoint(self.body[:4], x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rule", ["fa", "usf", "adafa"])
def test_checkpointing_follows_the_forward_not_the_context_of_the_backward(rule, reentrant, x, y):
    x.requires_grad_()
    names = dict(Recomputed(reentrant).named_parameters())

    def run(inside_forward, inside_backward):
        model = falign.convert(Recomputed(reentrant), rule)
        if inside_forward:
            with falign.backprop(model):
                loss = loss_of(model(x), y)
        else:
            loss = loss_of(model(x), y)
        if inside_backward:
            with falign.backprop(model):
                loss.backward()
        else:
            loss.backward()
        return {name: model.get_parameter(name).grad for name in names}

    assert relative(run(True, False), run(True, True)) == 0
    assert relative(run(False, True), run(False, False)) == 0
    true = gradients(falign.convert(Recomputed(reentrant), "bp"), x, y)
    assert relative(run(True, False), true) == 0


def test_a_tied_weight_takes_one_rule(x):
    first, second = mlp(), mlp()
    second[0].weight = first[0].weight
    falign.convert(first, "fa")
    (problem,) = falign.check(second, "kp")
    assert problem == (
        "parameter '0.weight' is also a weight of a model that is converted already, to rule 'fa', and one weight "
        "takes one rule: call falign.revert on that model first, or convert the model that both are parts of"
    )
    both = nn.ModuleList([falign.revert(first), second])
    assert falign.check(both, "kp") == []
    falign.convert(second, "usf")


def test_a_part_of_a_converted_model(x):
    model = falign.convert(mlp(), "fa")
    part = model[:3]
    (problem,) = falign.check(part, "usf")
    assert "the model, or a part of it, is converted already, to rule 'fa'" in problem
    assert set(falign.feedback_state(part)) == {"0", "2"}
    falign.revert(part)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in part.modules())


def test_a_forward_that_raises_leaves_nothing_behind(x, y):
    model = falign.convert(mlp(), "dfa")
    handle = model[3].register_forward_hook(lambda *args: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        model(x)
    handle.remove()
    assert model._falign.state.runs == []
    with pytest.raises(RuntimeError, match="outside the forward of the converted model"):
        model[2](torch.tanh(model[0](x)))
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_a_model_that_calls_itself_is_refused(x):
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, depth=2):
            if depth == 0:
                return self.layer(torch.tanh(x))
            h = self.layer(torch.tanh(self.inner(x)))
            return h + self(h, depth - 1)

    model = falign.convert(Recursive().double(), "dfa")
    with pytest.raises(RuntimeError, match="needs a model that does not call itself"):
        model(x)
    layerwise = falign.convert(Recursive().double(), "fa")
    assert falign.verify(layerwise, x, lambda output: output.square().sum())


class Product(nn.Module):
    """A vector in a product, a rank-one matrix, a scaled tied weight."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 8), nn.Linear(8, 4)
        self.v = nn.Parameter(torch.randn(8, 1) if kind == "rank one" else torch.randn(8))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.kind == "vector":
            return self.b(h * (h @ self.v)[:, None])
        if self.kind == "rank one":
            return self.b(h + h @ self.v)
        return self.b(nn.functional.linear(h, self.a.weight * 0.3))


@pytest.mark.parametrize("kind", ["vector", "rank one"])
def test_products_with_any_parameter_are_found(kind, x, y):
    model = falign.convert(Product(kind).double(), "fa", example=x)
    assert set(falign.feedback_state(model)) == {"a", "b", "v"}
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_a_weight_that_is_changed_before_its_product_is_refused():
    (problem,) = falign.check(Product("scaled"), "fa", example=torch.randn(5, 8))
    assert "parameter 'a.weight' is changed by mul before its product" in problem


def test_a_layer_class_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    (problem,) = falign.check(nn.Sequential(Scaled(8, 1), nn.Linear(1, 3)), "fa")
    assert "layer '0' (Scaled) has a forward of its own" in problem


def test_position_embeddings_need_an_example_or_skip():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.position = nn.Parameter(torch.zeros(1, 5, 8))

        def forward(self, x):
            return self.head((self.patch(x) + self.position).tanh().mean(1))

    example = torch.randn(3, 5, 8)
    (problem,) = falign.check(Vision(), "fa")
    assert "name the parameter in skip=" in problem
    shown = falign.convert(Vision(), "fa", example=example)  # position is added, and in no product
    assert set(falign.feedback_state(shown)) == {"patch", "head"}
    assert falign.verify(shown, example, lambda output: loss_of(output, torch.randint(4, (3,))))
    model = falign.convert(Vision(), "dfa", skip=("position",), example=example)
    assert falign.verify(model, example, lambda output: loss_of(output, torch.randint(4, (3,))))


def test_hooks_that_were_there_before_keep_their_derivative(x, y):
    model = mlp()
    model[2].register_forward_hook(lambda layer, args, output: output * 3)
    falign.convert(model, "fa")
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_ignored_targets_have_no_share(x, y):
    def hidden(targets, inputs):
        model = falign.convert(mlp(), "drtp")
        with falign.targets(model, targets):
            nn.functional.cross_entropy(model(inputs), targets).backward()
        return {"weight": model[0].weight.grad}

    ignored = y.clone()
    ignored[3:] = -100
    assert relative(hidden(ignored, x), hidden(y[:3], x[:3])) <= 1e-12


def test_targets_whose_classes_could_lie_on_two_axes_are_refused():
    model = falign.convert(
        nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 5)), "drtp", example=torch.randn(2, 5, 8)
    )
    with (
        pytest.raises(RuntimeError, match="if only one axis can be these"),
        falign.targets(model, torch.zeros(2, 5, dtype=torch.long)),
    ):
        model(torch.randn(2, 5, 8))


def test_an_input_changed_in_place_after_its_layer_is_refused(x):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.f, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.f.weight.requires_grad_(False)

        def forward(self, x):
            h = self.a(x)
            h += torch.tanh(self.f(h))
            return self.o(h)

    model = falign.convert(InPlace().double(), "dfa")
    with pytest.raises(RuntimeError, match="the input of layer 'f' was changed in place after the layer ran"):
        model(x)


@pytest.mark.parametrize("rule", ["fa", "dfa", "kp"])
def test_parametrized_weights_are_computed_as_often_as_before(rule, x, y):
    plain = mlp()
    spectral_norm(plain[2])
    model = falign.convert(copy.deepcopy(plain), rule)
    for _ in range(3):
        assert torch.equal(model(x), plain(x))
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_verify_takes_the_converted_model_itself(x):
    model = falign.convert(mlp(), "dfa")
    with pytest.raises(ValueError, match="not a part or a wrapper of it"):
        falign.verify(nn.Sequential(model), x, torch.sum)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="depends on no trainable parameter"):
        falign.verify(model, x, torch.sum)


def test_feedback_of_two_models_in_one_keeps_both(x):
    both = nn.ModuleDict({"a": falign.convert(mlp(), "fa"), "b": falign.convert(mlp(), "kp", seed=1)})
    state = falign.feedback_state(both)
    assert list(state) == ["a.0", "a.2", "a.4", "b.0", "b.2", "b.4"]
    falign.load_feedback_state(both, {name: 2 * b for name, b in state.items()})
    assert torch.equal(falign.feedback_state(both["b"])["2"], 2 * state["b.2"])


def test_an_attribute_of_the_users_is_not_lost():
    model = mlp()
    model[2].feedback = "mine"
    (problem,) = falign.check(model, "fa")
    assert "layer '2' (Linear) has an attribute feedback of its own" in problem


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_keyword_call_is_named_by_check(rule, x):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(input=torch.relu(self.a(x)))

    (problem,) = falign.check(Keyword().double(), rule, example=x)
    assert "layer 'b' was called with keyword arguments only" in problem


def test_measuring_does_not_move_adaptive_feedback():
    model = build("mlp", "adafa")
    gradients(model, *batch("mlp"))
    before = model[2].feedback.B.clone()
    with torch.no_grad():
        model[2].weight.add_(1)
    model[2].feedback.feedback_matrix(model[2].weight)
    assert torch.equal(model[2].feedback.B, before)
