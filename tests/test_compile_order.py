"""Code of a plain model never runs in the place of a converted one, in whatever order they are compiled."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import falign
from cases import batch, build, gradients, loss_of, relative

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.xdist_group("compiled"),  # the compiler takes seconds to import
    pytest.mark.filterwarnings("ignore"),
]

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def network(rule=None):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    return model if rule is None else falign.convert(model, rule, example=data()[0])


def data(count=6):
    random = torch.Generator().manual_seed(5)
    return torch.randn(count, 9, generator=random).double(), torch.randint(5, (count,), generator=random)


def learns_by(rule, model, compiled, x, y):
    """Whether a compiled model's gradients are those of a fresh eager one of the rule."""
    if rule != "bp":
        return relative(gradients(model, x, y, compiled), gradients(network(rule), x, y)) <= 1e-12
    twin = network()
    for net, run in ((model, compiled), (twin, twin)):
        net.zero_grad()
        loss_of(run(x), y).backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return all(torch.allclose(one.grad, other.grad, rtol=1e-10, atol=1e-14) for one, other in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plain_twin_first(backend):
    x, y = data()
    plain = network()
    assert learns_by("bp", plain, torch.compile(plain, backend=backend), x, y)
    for rule in ("fa", "dfa") if backend == "inductor" else ("fa", "usf", "dfa", "kp", "drtp"):
        model = network(rule)
        assert learns_by(rule, model, torch.compile(model, backend=backend), x, y), rule
        other = network()
        assert learns_by("bp", other, torch.compile(other, backend=backend), x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_model_through_rules_in_one_wrapper(backend):
    """Compiled plain, converted, reverted, converted to another rule: always by the rule it has."""
    x, y = data()
    model = network()
    compiled = torch.compile(model, backend=backend)
    assert learns_by("bp", model, compiled, x, y)
    for rule in ("fa", "dfa") if backend == "inductor" else ("fa", "dfa", "usf", "adafa"):
        falign.convert(model, rule, example=x)
        assert learns_by(rule, model, compiled, x, y), rule
        falign.revert(model)
        assert learns_by("bp", model, compiled, x, y)


def test_two_rules_side_by_side():
    """Steps of two models of one class by turns, each by its own rule, and a third by backpropagation."""
    x, y = data()
    models = {rule: network(rule) for rule in ("fa", "dfa", "usf", "bp")}  # bp: converted, with nothing hung on it
    compiled = {rule: torch.compile(model, backend="aot_eager", fullgraph=True) for rule, model in models.items()}
    for _ in range(3):
        for rule, model in models.items():
            expected = gradients(network(rule), x, y)
            assert relative(gradients(model, x, y, compiled[rule]), expected) <= 1e-12


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"dynamic": True, "backend": "aot_eager"}])
def test_modes_and_dynamic_shapes(options):
    plain = network()
    torch.compile(plain, **options)(data()[0]).sum().backward()
    for rule in ("fa", "dfa"):
        model = network(rule)
        compiled = torch.compile(model, **options)
        for count in (6, 3, 11) if "dynamic" in options else (6,):
            assert learns_by(rule, model, compiled, *data(count))


def test_a_copy_and_a_part_that_is_compiled():
    x, y = data()
    plain = network()
    plain.compile(backend="aot_eager")
    plain(x).sum().backward()
    model = network("fa")
    twin = copy.deepcopy(model)
    twin.compile(backend="aot_eager")
    assert learns_by("fa", twin, None, x, y)
    inside = network()
    inside[2].compile(backend="aot_eager")  # a layer compiled by itself, before
    inside(x).sum().backward()
    falign.convert(inside, "fa")
    assert learns_by("fa", inside, None, x, y)
    assert falign.verify(inside, x, lambda output: loss_of(output, y))


def test_layers_that_share_their_input_make_a_full_graph():
    class Query(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.q, self.k, self.o = nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            h = self.a(x).relu()
            return self.o(self.q(h) * self.k(h).tanh())

    x, y = data()
    model = falign.convert(Query().double(), "dfa", example=x)
    eager = gradients(copy.deepcopy(model), x, y)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(gradients(model, x, y, compiled), eager) <= 1e-12
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_a_layer_that_comes_to_a_compiled_model_is_named():
    x, y = data()
    model = network("fa")
    compiled = torch.compile(model, backend="aot_eager")
    gradients(model, x, y, compiled)
    model[2] = nn.Linear(8, 8).double()
    with pytest.raises(Exception, match="changed after falign"):
        compiled(x)
    spared = falign.convert(network(), "fa", skip=("2",))
    loss_of(torch.compile(spared, backend="aot_eager")(x), y).backward()


FRESH = """
import sys, torch
from torch import nn
import falign
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
def gradient(model, run):
    model.zero_grad()
    nn.functional.cross_entropy(run(x), y).backward()
    return model[0].weight.grad.clone()
rule = sys.argv[1]
model = falign.convert(network(), rule)
expected = gradient(model, model)
assert "torch._dynamo" not in sys.modules, "nothing was compiled, and the compiler was not imported"
plain = network()
gradient(plain, torch.compile(plain, backend="aot_eager"))
found = gradient(model, torch.compile(model, backend="aot_eager"))
assert torch.allclose(found, expected, atol=1e-6), (found - expected).norm() / expected.norm()
"""


@pytest.mark.parametrize("rule", ["dfa"])
def test_the_converted_model_is_there_before_the_compiler_is_imported(rule):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, rule], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stale_code_is_refused_even_where_dynamo_looks_at_no_hooks():
    """The last line of defence: whatever ran in the model's place, its gradient is refused at that step."""
    x, y = batch("mlp")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        plain = build("mlp")
        loss_of(torch.compile(plain, backend="aot_eager")(x), y).backward()
        model = build("mlp", "fa")
        torch._dynamo.config.skip_nnmodule_hook_guards = True
        other = build("mlp")
        loss_of(torch.compile(other, backend="aot_eager")(x), y).backward()
        with pytest.raises(RuntimeError, match="the layer itself did not run"):
            loss_of(torch.compile(model, backend="aot_eager")(x), y).backward()
