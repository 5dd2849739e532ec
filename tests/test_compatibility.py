"""Every rule with everything that PyTorch users do to a model. The reference is the converted model used plainly."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import falign
from cases import CASES, RULES, batch, build, gradients, loss_of, mlp, observes, relative, rule_class, step

pytestmark = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(params=["mlp", "conv", "sequence"])
def case(request):
    return request.param


def reference(case, rule, dtype=torch.float64):
    model = build(case, rule, dtype=dtype)
    return gradients(copy.deepcopy(model), *batch(case, dtype))


def test_functional_call(rule, case):
    model = build(case, rule)
    x, y = batch(case)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with falign.targets(model, y):
        loss_of(functional_call(model, (parameters, dict(model.named_buffers())), (x,)), y).backward()
    assert relative({name: p.grad for name, p in parameters.items()}, reference(case, rule)) <= 1e-14


def test_per_sample_gradients_by_vmap(rule, case):
    model = build(case, rule)
    x, y = batch(case)
    if observes(rule):
        step(model, x, y)
        model.eval()  # in training it asks for a whole batch
    trained = model.state_dict()

    def loss(parameters, buffers, x, y):
        with falign.targets(model, y[None]):
            return loss_of(functional_call(model, (parameters, buffers), (x[None],)), y[None])

    state = dict(model.named_parameters()), dict(model.named_buffers())
    taken = vmap(grad(loss), in_dims=(None, None, 0, 0))(*state, x, y)
    for index in range(0, len(x), 5):
        one = build(case, rule)
        if observes(rule):
            one.eval().load_state_dict(trained)
        expected = gradients(one, x[index : index + 1], y[index : index + 1])
        assert relative({name: taken[name][index] for name in expected}, expected) <= 1e-12


def _members(rule, case):
    """Three networks of the same weights, that differ in B if it is drawn; feedback that passes move has moved."""
    members = [build(case, rule, seed=seed) for seed in range(3)]
    for member in members if observes(rule) else ():
        step(member, *batch(case))
        member.eval().zero_grad()
    return members


def test_ensemble_by_vmap(rule, case):
    members = _members(rule, case)
    expected = [gradients(copy.deepcopy(member), *batch(case)) for member in members]
    x, y = batch(case)
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0])

    def loss(parameters, buffers):
        with falign.targets(base, y):
            return loss_of(functional_call(base, (parameters, buffers), (x,)), y)

    taken = vmap(grad(loss))(parameters, buffers)
    for member in range(3):
        assert relative({name: taken[name][member] for name in expected[member]}, expected[member]) <= 1e-12
    if rule not in ("bp", "usf", "probe", "fdfa"):  # whose feedback is drawn
        first = next(iter(expected[0]))
        assert relative({first: expected[0][first]}, {first: expected[1][first]}) > 0.1, "members differ in B"


def test_ensemble_with_the_backward_outside(rule, case):
    """vmap over the forward alone: the graph lies outside, where the tensors within do not show it."""
    members = _members(rule, case)
    x, y = batch(case)
    expected = [gradients(copy.deepcopy(member), x, y) for member in members]
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0])
    with falign.targets(base, y):
        outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    sum(loss_of(output, y) for output in outputs).backward()
    for member in range(3):
        taken = {name: parameters[name].grad[member] for name in expected[member]}
        assert relative(taken, expected[member]) <= 1e-12


def test_deepcopy(rule, case):
    model = build(case, rule)
    expected = reference(case, rule)
    twin = copy.deepcopy(model)
    assert relative(gradients(twin, *batch(case)), expected) == 0
    with torch.no_grad():
        for part in twin.modules():
            if type(part).__name__ == "Feedback":
                part.B.zero_()
    assert relative(gradients(model, *batch(case)), expected) == 0, "the copy has its own feedback"


def test_save_and_load_of_the_whole_model(rule, case):
    model = build(case, rule)
    step(model, *batch(case))  # after a forward no tensor of it may be left to be saved
    model.zero_grad()
    expected = gradients(copy.deepcopy(model), *batch(case))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert relative(gradients(loaded, *batch(case)), expected) == 0


def test_state_dict_is_that_of_the_plain_model(rule, case):
    model, plain = build(case, rule), build(case)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    state = model.state_dict()
    if rule in ("kp", "adafa", "brsf", "dkp", "pfa", "probe", "wm", "fdfa", "grape", "ebd", "ldfa", "afa"):
        assert set(state) > set(plain.state_dict())
        other = build(case, rule, seed=9)
        other.load_state_dict(state, strict=True)
        if rule == "brsf":  # it keeps how many passes there were; what it draws is a function of the seed
            falign.load_feedback_state(other, falign.feedback_state(model))
            other.load_state_dict(plain.state_dict() | state, strict=True)
            build(case, rule).load_state_dict(plain.state_dict(), strict=True)
        assert relative(gradients(other, *batch(case)), gradients(model, *batch(case))) == 0
        return
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    build(case, rule).load_state_dict(plain.state_dict(), strict=True)


def test_autocast(rule, case):
    x, y = batch(case, torch.float32)
    model = build(case, rule, dtype=torch.float32)
    exact = gradients(copy.deepcopy(model), x, y)
    with torch.autocast("cpu", torch.bfloat16), falign.targets(model, y):
        loss = loss_of(model(x), y)
    loss.backward()
    taken = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in taken.values())
    for name in exact:
        assert torch.cosine_similarity(taken[name].flatten(), exact[name].flatten(), dim=0) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(rule, case, dtype):
    if case == "sequence" and dtype == torch.bfloat16:
        pytest.skip("the mean over positions is kept in float64 by the case")
    x, y = batch(case, dtype)
    model = build(case, rule).to(dtype)
    taken = gradients(model, x, y)
    assert all(gradient.dtype == dtype for gradient in taken.values())
    exact = reference(case, rule)
    assert relative(taken, exact) < {torch.float64: 1e-14, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]


class Checkpointed(nn.Module):
    """The layers of a sequence in two recomputed halves."""

    def __init__(self, layers, reentrant):
        super().__init__()
        self.layers, self.reentrant = layers, reentrant

    def forward(self, x):
        half = 4  # an in-place operation must not come first in a recomputed part
        for part in (self.layers[:half], self.layers[half:]):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def test_activation_checkpointing(rule, case):
    x, y = batch(case)
    model = falign.convert(Checkpointed(build(case), False), rule, example=x)
    plain = falign.convert(Checkpointed(build(case), False), rule, example=x)
    plain.forward = plain.layers.forward
    for _ in range(2):  # a recomputation leaves nothing behind for the next step
        assert relative(gradients(model, x, y), gradients(plain, x, y)) == 0


def test_reentrant_checkpointing_is_exact_or_refused(rule):
    x, y = batch("mlp")
    x.requires_grad_()
    model = falign.convert(Checkpointed(build("mlp"), True), rule, example=x)
    plain = falign.convert(Checkpointed(build("mlp"), True), rule, example=x)
    plain.forward = plain.layers.forward
    if rule_class(rule).wiring == "direct":
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            gradients(model, x, y)
    else:
        assert relative(gradients(model, x, y), gradients(plain, x, y)) == 0


def test_gradient_accumulation(rule, case):
    """The mean over micro-batches is the whole batch's gradient, whatever the rule keeps between passes."""
    x, y = batch(case)
    x, y = x[:4], y[:4]
    model = build(case, rule)
    if rule == "brsf" or observes(rule):
        model.eval()  # feedback that every training pass changes is the rule; without that accumulation is exact
    expected = gradients(copy.deepcopy(model), x, y)
    model.zero_grad()
    for start in (0, 2):
        with falign.targets(model, y[start : start + 2]):
            (loss_of(model(x[start : start + 2]), y[start : start + 2]) / 2).backward()
    assert relative({name: p.grad for name, p in model.named_parameters()}, expected) <= 1e-12


def test_loss_scaling(rule, case):
    """A loss scaler multiplies the loss and divides the gradients: nothing must remain of it."""
    x, y = batch(case)
    model = build(case, rule)
    with falign.targets(model, y):
        (loss_of(model(x), y) * 2.0**10).backward()
    taken = {name: p.grad / 2.0**10 for name, p in model.named_parameters()}
    assert relative(taken, reference(case, rule)) <= 1e-12


def test_grad_scaler_object(rule):
    x, y = batch("mlp", torch.float32)
    model = build("mlp", rule, dtype=torch.float32)
    expected = reference("mlp", rule, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with falign.targets(model, y):
        scaler.scale(loss_of(model(x), y)).backward()
    scaler.unscale_(optimizer)
    assert relative({name: p.grad for name, p in model.named_parameters()}, expected) <= 1e-4
    scaler.step(optimizer)


def test_several_losses_and_two_forwards_before_one_backward(rule, case):
    x, y = batch(case)
    x, y = x[:4], y[:4]
    model = build(case, rule)
    if rule == "brsf" or observes(rule):
        model.eval()
    first = gradients(model, x[:2], y[:2])
    second = gradients(model, x[2:], y[2:])
    model.zero_grad()
    with falign.targets(model, y[:2]):
        one = loss_of(model(x[:2]), y[:2])
    with falign.targets(model, y[2:]):
        other = loss_of(model(x[2:]), y[2:])
    (0.3 * one + 0.7 * other).backward()
    taken = {name: p.grad for name, p in model.named_parameters()}
    assert relative(taken, {name: 0.3 * first[name] + 0.7 * second[name] for name in first}) <= 1e-12
    model.zero_grad()
    with falign.targets(model, y[:2]):
        output = model(x[:2])
    (0.3 * loss_of(output, y[:2]) + 0.7 * loss_of(output, y[:2])).backward()
    assert relative({name: p.grad for name, p in model.named_parameters()}, first) <= 1e-12


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.layer, self.outer = nn.Linear(20, 9), nn.Linear(9, 9), nn.Linear(9, 7)

    def forward(self, x):
        x = torch.tanh(self.inner(x))
        return self.outer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Unrolled(Twice):
    """The same with two layers."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(9, 9)

    def forward(self, x):
        x = torch.tanh(self.inner(x))
        return self.outer(torch.tanh(self.again(torch.tanh(self.layer(x)))))


def converted_pair(rule, tie):
    """(a network whose middle layer or weight is used twice, the same with two middle layers of equal feedback)."""
    torch.manual_seed(0)
    one = (Twice() if tie == "layer" else Unrolled()).double()
    torch.manual_seed(0)
    two = Unrolled().double()
    two.again.load_state_dict(two.layer.state_dict())
    if tie == "weight":
        one.again.load_state_dict(one.layer.state_dict())
        one.again.weight = one.layer.weight
    x, y = batch("mlp")
    for model in (one, two):
        falign.convert(model, rule, example=x)
    if rule == "brsf" or observes(rule):
        one.eval(), two.eval()
    if rule != "bp":
        state = falign.feedback_state(one)
        extra = {name.replace("layer", "again"): b for name, b in state.items() if name.startswith("layer")}
        falign.load_feedback_state(two, {**extra, **state} if tie == "layer" else state)
    return gradients(one, x, y), gradients(two, x, y)


@pytest.mark.parametrize("tie", ["layer", "weight"])
def test_layer_used_twice_and_weight_shared(rule, tie):
    one, two = converted_pair(rule, tie)
    summed = dict(two)
    summed["layer.weight"] = two["layer.weight"] + two["again.weight"]
    if tie == "weight" and rule in ("kp", "pfa"):  # one B a Parameter
        summed["layer.feedback.B"] = two["layer.feedback.B"] + two["again.feedback.B"]
    if tie == "layer":
        for key in ("bias", "feedback.B"):
            if f"layer.{key}" in two:
                summed[f"layer.{key}"] = two[f"layer.{key}"] + two[f"again.{key}"]
    assert relative(one, {name: summed[name] for name in one}) <= 1e-12


def test_frozen_layers(rule):
    x, y = batch("mlp")
    expected = reference("mlp", rule)
    model = build("mlp", rule)
    for p in (*model[2].parameters(recurse=False), *model[6].parameters(recurse=False)):
        p.requires_grad_(False)
    taken = gradients(model, x, y)
    still = {"2.weight", "2.bias", "6.weight", "6.bias"}
    assert set(expected) - set(taken) == still | ({"2.feedback.B", "6.feedback.B"} if rule in ("kp", "pfa") else set())
    assert relative(taken, {name: expected[name] for name in taken}) <= 1e-14
    for p in model.parameters():
        p.requires_grad_(False)
    with falign.targets(model, y):
        assert not model(x).requires_grad


def test_train_eval_and_no_grad(rule, case):
    x, y = batch(case)
    model, plain = build(case, rule), build(case)
    expected = plain(x)
    state = {name: b.clone() for name, b in falign.feedback_state(model).items()}
    random = torch.random.get_rng_state()
    model.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(x), expected)
    with falign.targets(model, y):
        assert torch.equal(model(x), expected)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(x), expected), "the forward pass is the plain model's, to the bit"
    assert torch.equal(random, torch.random.get_rng_state())
    if rule != "adafa":
        assert all(torch.equal(state[name], b) for name, b in falign.feedback_state(model).items())
    assert relative(gradients(model, x, y), reference(case, rule)) <= 1e-14


class Operations(TorchDispatchMode):
    """Keeps the name of every operation that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_evaluation_costs_nothing(rule):
    """Under no_grad a converted model runs the plain model's operations and no other."""
    x, _ = batch("conv")
    ran = []
    for model in (build("conv"), build("conv", rule)):
        with Operations() as operations, torch.no_grad():
            model(x)
        ran.append(operations.names)
    assert ran[0] == ran[1]


def test_true_gradient_on_the_same_weights(rule, case):
    x, y = batch(case)
    model = build(case, rule)
    own = gradients(copy.deepcopy(model), x, y)
    true = reference(case, "bp")
    with falign.backprop(model):
        taken = gradients(model, x, y)
    assert relative(taken, true) == 0
    if rule != "bp":
        assert any(relative({k: own[k]}, {k: true[k]}) > 0.1 for k in true)
    assert relative(gradients(model, x, y), own) == 0, "the context leaves no trace"


def test_revert(rule, case):
    x, y = batch(case)
    model = build(case, rule)
    step(model, x, y)
    falign.revert(model)
    plain = build(case)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    output = model(x)
    model.zero_grad()
    loss_of(output, y).backward()
    assert relative({name: p.grad for name, p in model.named_parameters()}, reference(case, "bp")) == 0
    falign.convert(model, "fa")


def test_gradient_of_the_input(rule, case):
    """The first layer's feedback reaches an input that asks for its gradient."""
    x, y = batch(case)
    if not x.is_floating_point():
        pytest.skip("indices have no gradient")
    model = build(case, rule)
    x.requires_grad_()
    step(model, x, y)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    if rule in ("fa", "dfa", "usf"):
        true = batch(case)[0].requires_grad_()
        with falign.backprop(model):
            step(model, true, y)
        assert float((x.grad - true.grad).norm() / true.grad.norm()) > 0.1


def test_hooks_of_the_user_stay(rule):
    seen = []
    model = mlp().double()
    model[2].register_forward_hook(lambda module, args, output: seen.append("mine"))
    falign.convert(model, rule, example=batch("mlp")[0])
    step(model, *batch("mlp"))
    falign.revert(model)
    model(batch("mlp")[0])
    assert seen.count("mine") >= 2


def test_all_cases_are_used(rule):
    assert set(CASES) == {"mlp", "conv", "residual", "sequence"}
