"""torch.compile(fullgraph=True), with the default backend, for every rule; annotations must not be checked here."""

import copy

import pytest
import torch

import falign
from cases import DIRECT, RULES, batch, build, gradients, loss_of, observes, relative, step

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.xdist_group("compiled"),  # the compiler takes seconds to import
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


PATHS = ("fa", "kp", "dfa", "probe")
"""Rules of which the compiler meets each piece of code that others have as well."""


def seldom(rules):
    """Parameters of a test, of which all but the paths are slow."""
    return [pytest.param(rule, marks=() if rule in PATHS else pytest.mark.slow) for rule in rules]


@pytest.mark.parametrize(
    ("case", "rule"),
    [("mlp", rule) for rule in RULES] + [(case, rule) for case in ("conv", "sequence") for rule in PATHS],
)
def test_full_graph_gradients(rule, case):
    """Traced whole, through the partitioner that the default backend uses, three passes in a row."""
    model = build(case, rule)
    eager, x, y = copy.deepcopy(model), *batch(case)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    for _ in range(3):
        assert relative(gradients(model, x, y, compiled), gradients(eager, x, y)) <= 1e-12
    with falign.backprop(model), falign.backprop(eager):
        assert relative(gradients(model, x, y, compiled), gradients(eager, x, y)) <= 1e-12
    with torch.no_grad():
        assert torch.allclose(compiled(x), eager(x))


@pytest.mark.parametrize("rule", RULES)
def test_default_backend_trains_as_eager_does(rule):
    """Five steps of momentum SGD: what a rule keeps between passes follows too, and nothing recompiles."""
    model = build("mlp", rule)
    eager, (x, y) = copy.deepcopy(model), batch("mlp")
    compiled = torch.compile(model, fullgraph=True)
    pairs = [
        (m, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), f) for m, f in ((model, compiled), (eager, None))
    ]
    for count in range(5):
        with torch._dynamo.config.patch(error_on_recompile=count > 1):
            for trained, optimizer, forward in pairs:
                optimizer.zero_grad()
                step(trained, x, y, forward)
                optimizer.step()
    state, expected = dict(model.named_parameters()), dict(eager.named_parameters())
    assert relative(state, expected) <= 1e-10
    if rule != "bp":
        assert relative(falign.feedback_state(model), falign.feedback_state(eager)) <= 1e-10


@pytest.mark.parametrize("rule", seldom(["fa", "kp", *DIRECT]))
def test_compile_around_a_transform_is_right_or_refused(rule):
    """torch.compile drops the backward of autograd functions within vmap: never let that pass for a result."""
    members = [build("mlp", rule, seed=seed) for seed in range(3)]
    x, y = batch("mlp")
    for member in members if observes(rule) else ():
        gradients(member, x, y)
        member.eval().zero_grad()  # in training it asks for a whole batch
    base = copy.deepcopy(members[0])

    def outputs(parameters, buffers):
        return torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)

    for backend in ("eager", "aot_eager"):
        parameters, buffers = torch.func.stack_module_state(members)
        torch._dynamo.reset()
        with falign.targets(base, y):
            sum(
                loss_of(output, y) for output in torch.compile(outputs, backend=backend)(parameters, buffers)
            ).backward()
        for index, member in enumerate(members):
            expected = gradients(copy.deepcopy(member), x, y)
            assert relative({name: parameters[name].grad[index] for name in expected}, expected) <= 1e-12
    torch._dynamo.reset()
    with falign.targets(base, y), pytest.raises(Exception, match="compile"):
        torch.compile(outputs, backend="aot_eager", fullgraph=True)(parameters, buffers)
