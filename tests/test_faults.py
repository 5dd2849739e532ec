"""What would pass unseen is right, or refused in words: layers, weights, defaults, devices, optimizers, copies."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import falign
from cases import DIRECT, LAYERWISE, RULES, batch, build, follows, gradients, loss_of, relative, rule_class, step
from falign.feedback import FAMILIES


def net(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(9, 8, **options), nn.Tanh(), nn.Linear(8, 8, **options), nn.Tanh(), nn.Linear(8, 5, **options)
    )


def data():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(6, 9, generator=generator), torch.randint(5, (6,), generator=generator)


# Weights used by other means than their layer


class ByWeight(nn.Module):
    """Its middle layer is not called."""

    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.c, self.use = nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 5), use

    def forward(self, x):
        return self.c(torch.tanh(self.use(self.b, torch.tanh(self.a(x)))))


USES = {
    "F.linear": lambda layer, h: F.linear(h, layer.weight, layer.bias),
    "forward": lambda layer, h: layer.forward(h),
    "a product": lambda layer, h: h @ layer.weight,
    "scaled": lambda layer, h: h @ (layer.weight * 0.5).T,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "adafa", "dfa"])
def test_a_gradient_that_came_by_the_weight_alone_is_refused_at_that_step(use, rule):
    x, y = data()
    if rule == "dfa":  # it makes an example for itself, and sees how the weight is used
        test_a_weight_that_is_used_by_other_means_takes_feedback_of_its_own(use, rule)
        return
    model = falign.convert(ByWeight(USES[use]), rule)
    with pytest.raises(
        RuntimeError,
        match=r"layer 'b' received a gradient, but the layer itself did not run|'b.weight' is multiplied outside its",
    ):
        loss_of(model(x), y).backward()
    verified = falign.verify(model, x, lambda output: loss_of(output, y))
    assert not verified
    assert "b.weight" in verified.transported


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "adafa", "dfa"])
def test_a_weight_that_is_used_by_other_means_takes_feedback_of_its_own(use, rule):
    x, y = data()
    problems = falign.check(ByWeight(USES[use]), rule, example=None if rule == "dfa" else x)
    assert (problems == []) == (use != "scaled"), problems
    if not problems:
        assert falign.verify(falign.convert(ByWeight(USES[use]), rule, example=x), x, lambda output: loss_of(output, y))


def test_it_is_refused_at_the_step_at_which_it_begins():
    x, y = data()
    model = falign.convert(ByWeight(lambda layer, h: layer(h)), "fa")
    for _ in range(3):
        loss_of(model(x), y).backward()
    model.use = USES["F.linear"]
    with pytest.raises(RuntimeError, match="the layer itself did not run"):
        loss_of(model(x), y).backward()


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(9, 8), nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.body(x)))


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_what_only_looks_like_it_is_not_refused(rule):
    """Heads by turns, graphs that are walked twice, penalties on layers that did not run, frozen and thawed layers."""
    x, y = data()
    model = falign.convert(Heads(), rule, **({"example": (x, 0), "skip": ("heads.1",)} if rule == "dfa" else {}))
    first, second = loss_of(model(x, 0), y), loss_of(model(x, 1), y)
    first.backward(retain_graph=True)
    (first + second).backward()
    model.zero_grad()
    (loss_of(model(x, 0), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    model.zero_grad()
    (loss_of(model(x, 0), y) + 0.1 * sum(p.abs().sum() for p in model.parameters())).backward()
    loss_of(model(x, 0), y).backward()
    (model.body.weight - 1).square().sum().backward()  # apart from the loss, of a layer that ran
    model.heads[0].weight.requires_grad_(False)
    loss_of(model(x, 0), y).backward()
    model.heads[0].weight.requires_grad_(True)
    with falign.backprop(model):
        loss_of(model(x, 0), y).backward()
        late = loss_of(model(x, 1), y)
    loss_of(model(x, 0), y).backward()
    late.backward()
    torch.autograd.grad(loss_of(model(x, 1), y), model.body.weight)


def test_the_guard_goes_with_copies_and_replaced_parameters():
    x, y = data()
    for change in (copy.deepcopy, lambda model: (model.load_state_dict(model.state_dict(), assign=True), model)[1]):
        model = falign.convert(ByWeight(lambda layer, h: layer(h)), "usf")
        loss_of(model(x), y).backward()
        model.zero_grad()
        model = change(model)
        for p in model.parameters():
            p.requires_grad_()
        loss_of(model(x), y).backward()
        model.use = USES["forward"]
        with pytest.raises(RuntimeError, match="the layer itself did not run"):
            loss_of(model(x), y).backward()
    falign.revert(model)
    loss_of(model(x), y).backward()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# Layers that come later


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.down, self.up = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def appended(model):
    model.append(nn.Linear(5, 5))


def inserted(model):
    model.insert(1, nn.Linear(8, 8))


def replaced(model):
    model[4] = nn.Linear(8, 5)


def wrapped(model):
    model[2] = LoRA(model[2])


def attended(model):
    model[1] = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)


@pytest.mark.parametrize("change", [appended, inserted, replaced, wrapped, attended])
@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_layers_that_come_after_convert_are_named(rule, change):
    x, y = data()
    model = falign.convert(net(), rule, example=x)
    loss_of(model(x), y).backward()
    change(model)
    for look in (
        lambda: model(x),
        lambda: falign.verify(model, x, lambda output: loss_of(output, y)),
        lambda: falign.transport(model, x, lambda output: loss_of(output, y)),
        lambda: falign.measure.alignment(model, loss_of, x, y),
    ):
        with pytest.raises(RuntimeError, match=r"changed after falign[^$]*\n- (layer|parameter)"):
            look()
    problems = falign.check(model, rule)
    assert "converted already" in problems[0]
    assert any("came after" in problem or "takes no feedback" in problem for problem in problems[1:]), problems
    with torch.no_grad():
        model(x)
    falign.convert(falign.revert(model), rule, example=x, skip=("1",) if change is attended else ())
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_activations_and_fewer_layers_are_no_newcomers():
    x, y = data()
    model = falign.convert(net(), "fa", skip=("2",))
    model[1] = nn.GELU()
    loss_of(model(x), y).backward()
    model[2] = nn.Linear(8, 8)  # its name is in skip
    loss_of(model(x), y).backward()
    del model[2:4]
    loss_of(model(x), y).backward()


# What a survey does not visit


class Conditional(nn.BatchNorm1d):
    """Batch normalisation with scale and shift from a linear map."""

    def __init__(self, features):
        super().__init__(features, affine=False)
        self.scale = nn.Linear(features, features)

    def forward(self, x):
        return super().forward(x) * self.scale(x)


class Looked(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.up = nn.Linear(sizes[1], sizes[1])

    def forward(self, x):
        return self.up(super().forward(x) * 2)


class Hyper(nn.Module):
    """A weight that a linear layer makes of another."""

    def __init__(self, width):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, weight):
        return self.map(weight)


@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "dfa"])
def test_layers_inside_of_normalisations_and_embeddings_take_the_rule(rule):
    y = data()[1]
    for inner, x in ((Conditional(8), data()[0]), (nn.Identity(), torch.randint(9, (6,)))):
        first = nn.Linear(9, 8) if x.is_floating_point() else Looked(9, 8)
        model = nn.Sequential(first, nn.Tanh(), inner, nn.Linear(8, 5)).double()
        x = x.double() if x.is_floating_point() else x
        falign.convert(model, rule, example=x)
        assert {"2.scale" if x.is_floating_point() else "0.up"} < set(falign.feedback_state(model))
        assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_a_linear_layer_inside_a_parametrization_is_refused():
    model = net()
    parametrize.register_parametrization(model[2], "weight", Hyper(8))
    (problem,) = falign.check(model, "fa")
    assert "layer '2.parametrizations.weight.0.map' (Linear) works inside a parametrization of layer '2'" in problem
    falign.convert(model, "fa", skip=("2.parametrizations.weight.0.map",))
    x, y = data()
    assert falign.verify(model, x, lambda output: loss_of(output, y))


@pytest.mark.parametrize("hold", [lambda m: [m], lambda m: {"a": (m,)}, lambda m: (1, [{m}])])
def test_layers_in_plain_containers_are_refused(hold):
    model = net()
    model.extra = hold(nn.Linear(8, 8))
    for rule in ("fa", "dfa"):
        (problem,) = falign.check(model, rule)
        assert "'extra' holds a Linear in a plain Python container" in problem
    assert falign.check(model, "fa", skip=("extra",)) == []
    model.extra = [model[0], nn.Tanh()]
    assert falign.check(model, "fa") == [], "what is registered as well, or has no weights, is nobody's concern"


def test_weights_of_bags_that_want_gradients_are_refused():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.weigh, self.bag, self.out = nn.Linear(9, 3), nn.EmbeddingBag(7, 8, mode="sum"), nn.Linear(8, 5)

        def forward(self, x, still=False):
            weights = self.weigh(x)
            rows = torch.arange(18).reshape(6, 3) % 7
            return self.out(self.bag(rows, per_sample_weights=weights.detach() if still else weights))

    (x, y), model = data(), falign.convert(Bag(), "fa")
    with pytest.raises(RuntimeError, match="per_sample_weights that want gradients"):
        model(x)
    loss_of(model(x, still=True), y).backward()
    loss_of(falign.revert(model)(x), y).backward()


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_maps_that_are_not_the_layers_own_are_refused(rule):
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    model = net()
    model[2].forward = lambda x: 2 * nn.Linear.forward(model[2], x)
    (problem,) = falign.check(model, rule)
    assert "layer '2' (Linear) has a forward of its own" in problem
    standardised = nn.Sequential(Standardised(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    (problem,) = falign.check(standardised, rule)
    assert "has a _conv_forward of its own" in problem
    problems = falign.check(standardised, rule, example=torch.ones(1, 1, 4, 4))
    if rule == "fa":
        assert "has a _conv_forward of its own" in problems[0]
    else:  # cut as a whole, at the input, which is a direct rule's definition for any map
        assert problems == []
        (row,) = (row for row in problems.rows if row.name == "0")
        assert row.mechanism == "cut as a whole"
        assert "parameter '0.weight' is changed by mean before its product" in row.why
    later, (x, _) = falign.convert(net(), rule, example=data()[0]), data()
    later[2].forward = lambda x: 2 * nn.Linear.forward(later[2], x)
    with pytest.raises(RuntimeError, match=r"layer '2' .Linear. has a forward of its own"):
        later(x)
    later = falign.convert(net(), rule, example=x)
    later(x)
    later[2].forward = lambda x: 2 * nn.Linear.forward(later[2], x)
    with pytest.raises(RuntimeError, match="forward of layer '2' was replaced after convert"):
        later(x)


def test_an_input_that_a_later_hook_replaces_is_refused():
    (x, y), model = data(), falign.convert(net(), "fa")
    handle = model[2].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    with pytest.raises(RuntimeError, match="input of layer '2' was replaced"):
        model(x)
    handle.remove()
    model[2].register_forward_pre_hook(lambda layer, args: None)
    assert falign.verify(model, x, lambda output: loss_of(output, y))


# Defaults, devices, types


@pytest.mark.parametrize("family", ["normal", "uniform", "orthogonal", "low-rank(2)", "sparse(1)", "shared"])
@pytest.mark.parametrize("rule", ["fa", "frsf", "brsf", "usf", "adafa", "kp", "dfa"])
def test_feedback_does_not_hang_on_the_defaults_of_the_process(rule, family):
    feedback = {} if rule == "usf" else {"feedback": family}
    if family == "shared" and rule in ("kp", "adafa"):
        return  # refused

    def drawn():
        with torch.device("cpu"):
            model = net(dtype=torch.float32)
        return falign.feedback_state(falign.convert(model, rule, seed=3, **feedback))

    expected = drawn()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert relative(found, expected) == 0


def test_a_users_family_sees_plain_defaults():
    def of_the_users(shape, random):
        return torch.randn(shape, generator=random) + torch.zeros(shape)

    expected = falign.feedback_state(falign.convert(net(), "fa", feedback=of_the_users))
    torch.set_default_dtype(torch.float64)
    try:
        assert (
            relative(
                falign.feedback_state(falign.convert(net(dtype=torch.float32), "fa", feedback=of_the_users)), expected
            )
            == 0
        )
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_the_meta_device(rule):
    with torch.device("meta"):
        nowhere = net()
    problems = falign.check(nowhere, rule)
    assert len(problems) == 3
    assert all("is on the meta device, without numbers: load its weights first" in problem for problem in problems)
    model = falign.convert(net(), rule)
    expected = falign.feedback_state(model)
    state = model.state_dict()
    model.to_empty(device="cpu").load_state_dict(state)
    assert relative(falign.feedback_state(model), expected) == 0
    model.to("meta")
    with pytest.raises(RuntimeError, match="was on the meta device, where its numbers are lost"):
        model.to_empty(device="cpu")


def test_complex_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64))
    for rule in ("fa", "usf", "kp", "adafa", "dfa"):
        assert all("complex weights" in problem for problem in falign.check(model, rule))
    assert len(falign.check(model, "fa")) == 2


@pytest.mark.parametrize("rule", RULES)
def test_layers_without_inputs_or_outputs(rule):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of initialising nothing
        model = nn.Sequential(nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 6), nn.Tanh(), nn.Linear(6, 3))
    own = rule_class(rule)
    for family in FAMILIES if own.draws else (None,):
        if family in ("low-rank", "sparse"):
            family += "(2)"
        if family == "shared" and (own.learned or own.adapts):
            continue
        falign.convert(model, rule, feedback=family, example=torch.randn(2, 4))
        step(model, torch.randn(5, 4), torch.randint(3, (5,)))
        falign.revert(model)


@pytest.mark.parametrize("seed", [None, 3.0, True, "0"])
def test_seeds_that_are_no_whole_numbers(seed):
    with pytest.raises(
        (falign.ConversionError, TypeError) if seed in (True,) else Exception, match=r"seed|Integral|int"
    ):
        falign.convert(net(), "fa", seed=seed)


@pytest.mark.unchecked
def test_numbers_of_numpy_are_numbers():
    one = falign.convert(net(), "fa", seed=np.int64(3), scale=np.float32(0.5))
    other = falign.convert(net(), "fa", seed=3, scale=0.5)
    assert relative(falign.feedback_state(one), falign.feedback_state(other)) == 0


@pytest.mark.parametrize("scale", [1e39, 1e-46, float("inf"), -2.0, 0.0])
def test_scales_that_cannot_be_held(scale):
    (problem,) = falign.check(net(), "fa", scale=scale)
    assert f"scale is {scale!r}" in problem


def test_scales_that_the_layers_type_cannot_hold():
    for scale in (1e30, 1e-12):
        with pytest.raises(ValueError, match="cannot hold numbers of size"):
            falign.convert(net().half(), "fa", scale=scale)
    falign.convert(net(), "fa", scale=1e30)


@pytest.mark.parametrize(
    ("rule", "value", "words"),
    [
        ("fa", torch.full((8, 8), 1e300, dtype=torch.float64), "too large for float32"),
        ("fa", torch.full((8, 8), 1e-300, dtype=torch.float64), "nothing but zeros once rounded to float32"),
        ("fa", torch.ones(8, 8, dtype=torch.complex64), "complex numbers"),
        ("fa", torch.full((8, 8), float("nan")), "not finite"),
        ("frsf", -torch.ones(8, 8), "negative numbers, expected magnitudes"),
        ("brsf", -torch.ones(8, 8), "negative numbers, expected magnitudes"),
        ("usf", torch.tensor(-1.0), "negative numbers, expected magnitudes"),
    ],
)  # fmt: skip
def test_states_that_are_no_feedback(rule, value, words):
    model = falign.convert(net(), rule)
    before = falign.feedback_state(model)
    with pytest.raises(ValueError, match=words):
        falign.load_feedback_state(model, {**before, "2": value})
    assert relative(falign.feedback_state(model), before) == 0
    if rule == "fa":
        problems = falign.check(net(), rule, feedback={"2": value})
        assert any(words in problem for problem in problems)


# Learned feedback


@pytest.mark.parametrize("tie", ["shared", "frozen", "plain"])
def test_learned_feedback_moves_as_its_weight_does(tie):
    """|W − B| shrinks by (1 − ηλ) a step exactly, for one weight in two layers too; where W stands, B stands."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 5)
    ).double()
    if tie == "shared":
        model[4].weight = model[2].weight
    if tie == "frozen":
        model[2].weight.requires_grad_(False)
    falign.convert(model, "kp")
    x, y = data()
    x = x.double()
    rate, decay = 0.1, 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    layer = model[2]
    first = (layer.weight - layer.feedback.B).detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    shrunk = 1.0 if tie == "frozen" else (1 - rate * decay) ** 20
    assert torch.allclose(layer.weight - layer.feedback.B, first * shrunk, rtol=1e-9, atol=1e-12)
    assert (model[4].feedback.B is layer.feedback.B) == (tie == "shared")


def test_an_optimizer_that_will_not_bring_feedback_closer_is_told():
    x, y = data()
    for make, words in (
        (
            lambda: lambda m: (torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1), falign.convert(m, "kp"))[0],
            "make the optimizer after",
        ),
        (lambda: lambda m: torch.optim.Adam(falign.convert(m, "kp").parameters(), lr=0.1), "give weight_decay"),
    ):
        model = net()
        optimizer = make()(model)
        loss_of(model(x), y).backward()
        with pytest.warns(UserWarning, match=words):
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    good = falign.convert(net(), "kp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = torch.optim.SGD(good.parameters(), lr=0.1, weight_decay=0.1)
        loss_of(good(x), y).backward()
        optimizer.step()


def test_passes_of_fresh_signs_are_in_the_state():
    """An ordinary checkpoint goes on with the magnitudes that come next."""
    x, y = data()
    model = falign.convert(net(), "brsf")
    for _ in range(4):
        model.zero_grad()
        loss_of(model(x), y).backward()
    resumed = falign.convert(net(), "brsf")
    resumed.load_state_dict(model.state_dict())
    assert relative(gradients(resumed, x, y), gradients(model, x, y)) == 0


# Copies, wrappers, generators


class Forwarding(nn.Module):
    """Hands what it does not know on to what it wraps, as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_modules_that_forward_their_attributes_are_reverted(rule):
    (x, y), plain = data(), net()
    plain[2], plain[0] = Forwarding(plain[2]), Forwarding(Forwarding(plain[0]))
    model = falign.convert(copy.deepcopy(plain), rule, example=x)
    assert falign.verify(model, x, lambda output: loss_of(output, y))
    falign.revert(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Keeping(nn.Module):
    """Keeps its activations, and draws from Python's and NumPy's generators."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(9, 8), nn.Linear(8, 5), []

    def forward(self, x):
        h = torch.tanh(self.a(x)) * random.random() + float(np.random.rand())  # noqa: NPY002
        self.kept, self.last = [h, {"h": h}], h
        return self.b(h)


@pytest.mark.unchecked  # checking annotations draws from Python's generator
@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_verify_of_models_that_keep_and_draw(rule):
    x, y = data()
    model = falign.convert(Keeping(), rule)
    loss_of(model(x), y).backward()
    before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert falign.verify(model, x, lambda output: loss_of(output, y))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "dfa"])
@pytest.mark.parametrize("way", ["pruned", "weight norm"])
def test_verify_of_weights_that_hooks_compute(rule, way):
    x, y = data()
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weight_norm is old, and still in many a model
        prune.l1_unstructured(model[2], "weight", 0.4) if way == "pruned" else nn.utils.weight_norm(model[2])
    falign.convert(model, rule, example=x)
    loss_of(model(x), y).backward()
    assert falign.verify(model, x, lambda output: loss_of(output, y))


@pytest.mark.parametrize("rule", LAYERWISE)
def test_keywords_of_a_transposed_convolution(rule):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.ConvTranspose2d(3, 2, 3, 2), nn.Conv2d(2, 1, 3)

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)), output_size=[8, 8])))

    x = torch.randn(2, 1, 5, 5).double()
    model = falign.convert(Up().double(), rule)
    assert falign.verify(model, x, lambda output: output.square().sum())


def test_a_lazy_model_is_refused_before_it_runs():
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.LazyLinear(5))
    for _ in range(2):
        (problem,) = falign.check(model, "dfa", example=data()[0])
        assert "has no shape yet" in problem
    assert isinstance(model[2], nn.LazyLinear)


@pytest.mark.parametrize("rule", RULES)
def test_jagged_sequences(rule):
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 1, 4)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    if rule in DIRECT:
        (problem,) = falign.check(model, rule, example=x)
        assert "nested tensor, of which a direct rule does not know the positions" in problem
        falign.convert(model, rule)
        with falign.targets(model, torch.zeros(3)), pytest.raises(RuntimeError, match="nested tensor"):
            model(x)
        return
    falign.convert(model, rule)
    twin = copy.deepcopy(model)
    model(x).values().square().sum().backward()
    twin(torch.cat(rows)).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-12), name


def test_every_rule_with_every_way_of_being_run_again():
    """Convert, revert and convert again, many times, leaves nothing behind."""
    x, y = batch("mlp")
    model = build("mlp")
    for rule in (*RULES, *RULES):
        falign.convert(model, rule, example=x)
        anew = build("mlp", rule)
        if follows(rule):
            falign.load_feedback_state(model, falign.feedback_state(anew))
        assert relative(gradients(model, x, y), gradients(anew, x, y)) <= 1e-13
        falign.revert(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_weights_of_another_graph(rule):
    """An inner step of meta-learning: functional_call with weights that are no leaves."""
    (x, y), model = data(), falign.convert(net(), rule)
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss_of(model(x), y), list(weights.values()), create_graph=False, allow_unused=True)
    ahead = {name: w - 0.1 * g if g is not None else w for (name, w), g in zip(weights.items(), slopes, strict=True)}
    loss_of(torch.func.functional_call(model, ahead, (x,)), y).backward()
    assert all(p.grad is not None for name, p in weights.items())
