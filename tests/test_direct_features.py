"""One table: every kind of cut of the direct rules against everything that is done to a converted model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import falign
from cases import relative
from direct_networks import NETWORKS, build, feedback_of, loss_of, taken


class Products(nn.Module):
    """A module with products of its own, two inputs of it, and a container that is cut as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 5), nn.Linear(8, 6)
        self.product = nn.Bilinear(5, 6, 7)
        self.tail = nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(7, 6)), nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(
            self.tail(
                self.product(self.one(x).tanh(), other=self.other(x).tanh())
                if False
                else self.product(self.one(x).tanh(), self.other(x).tanh())
            )
        )


def products():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Products().double()


ROWS = (torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double(),)

#: Name -> (makes the network, its input, how it is converted).
CUTS = {
    "attention, pooled": (lambda: build("encoder, pooled"), NETWORKS["encoder, pooled"][1](5), {}),
    "attention, other positions": (lambda: build("decoder"), NETWORKS["decoder"][1](5), {}),
    "lstm both ways": (lambda: build("lstm both ways, all"), NETWORKS["lstm both ways, all"][1](5), {}),
    "gru, last": (lambda: build("gru of two layers, last"), NETWORKS["gru of two layers, last"][1](5), {}),
    "cell": (lambda: build("LSTMCell"), NETWORKS["LSTMCell"][1](5), {}),
    "blocks": (lambda: build("gpt"), NETWORKS["gpt"][1](5), {"cut": "blocks"}),
    "layers and blocks": (lambda: build("gpt"), NETWORKS["gpt"][1](5), {"cut": ("layers", "blocks")}),
    "arguments": (lambda: build("translator"), NETWORKS["translator"][1](5), {"cut": "net.decoder.layers.*"}),
    "error inside": (lambda: build("gpt"), NETWORKS["gpt"][1](5), {"error_at": "ln_f"}),
    "products": (products, ROWS, {}),
    "containers": (products, ROWS, {"cut": "tail.*"}),
    "full maps": (lambda: build("encoder, pooled"), NETWORKS["encoder, pooled"][1](5), {"positions": "all"}),
}  # fmt: skip


def converted(name, model=None, **more):
    make, x, how = CUTS[name]
    options = {key: value for key, value in how.items() if key != "positions"}
    rule = falign.ALL_RULES["dfa"](**{key: value for key, value in how.items() if key == "positions"})
    return falign.convert(make() if model is None else model, rule, example=x, **options, **more), x


@pytest.fixture(params=CUTS)
def case(request):
    model, x = converted(request.param)
    return model, x, taken(model, x)


def test_the_definition_holds_and_parameters_learn(case):
    model, x, gradients = case
    assert falign.verify(model, x, loss_of).worst.error <= 1e-12
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_copies_and_pickles_go_on_alike(case):
    model, x, gradients = case
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert relative(taken(twin, x), gradients) == 0
        assert feedback_of(twin).keys() == feedback_of(model).keys()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert relative(taken(model, x), gradients) == 0, "the copies share nothing"


@pytest.mark.parametrize("name", CUTS)
def test_state_is_that_of_the_plain_model_and_feedback_of_the_seed(name):
    (model, x), plain = converted(name), CUTS[name][0]()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    again, other = converted(name)[0], converted(name, seed=1)[0]
    assert relative(feedback_of(again), feedback_of(model)) == 0
    assert all(not torch.equal(b, feedback_of(other)[key]) for key, b in feedback_of(model).items())
    falign.load_feedback_state(other, feedback_of(model))
    assert relative(taken(other, x), taken(model, x)) <= 1e-15
    given = converted(name, feedback=feedback_of(model), seed=7)[0]
    assert relative(taken(given, x), taken(model, x)) <= 1e-15


@pytest.mark.parametrize("name", CUTS)
def test_revert_gives_the_plain_network_and_it_converts_again(name):
    (model, x), plain = converted(name), CUTS[name][0]()
    gradients = taken(model, x)
    falign.revert(model)
    assert [(key, type(module)) for key, module in model.named_modules()] == [
        (key, type(module)) for key, module in plain.named_modules()
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert relative(taken(model, x), taken(plain, x)) == 0
    assert relative(taken(converted(name, model=model)[0], x), gradients) <= 1e-13


def test_without_gradients_it_is_the_plain_network(case):
    model, x, _ = case
    plain = falign.revert(copy.deepcopy(model))
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(model(*x), plain(*x))
    with falign.backprop(model):
        assert relative(taken(model, x), taken(plain, x)) <= 1e-13


def test_micro_batches_add_up_and_two_forwards_do(case):
    model, x, gradients = case
    model.zero_grad()
    outputs = [model(*x), model(*x)]
    sum(0.5 * loss_of(output) for output in outputs).backward()
    assert relative({name: p.grad for name, p in model.named_parameters()}, gradients) <= 1e-12


def test_checkpointing_changes_nothing(case):
    model, x, gradients = case
    # Within the model: of the modules that run first.
    for module in model.modules():
        if type(module).__name__ in ("Block", "TransformerEncoderLayer", "TransformerDecoderLayer"):
            plain = type(module).forward

            def forward(self, *args, plain=plain, **kwargs):
                return checkpoint(lambda *given: plain(self, *given, **kwargs), *args, use_reentrant=False)

            module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
    assert relative(taken(model, x), gradients) <= 1e-13


def test_functional_call_takes_the_parameters_that_it_is_given(case):
    model, x, gradients = case
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = loss_of(functional_call(model, parameters, x))
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert relative(found, gradients) <= 1e-13


def test_alignment_measures_and_leaves_no_trace(case):
    model, x, gradients = case
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = falign.measure.alignment(model, lambda output, y: loss_of(output), x, None)
    assert len(report.layers) > 0
    assert all(row.gradient_angle is not None for row in report.layers if row.gradient_norm)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert relative(taken(model, x), gradients) == 0
    plain = falign.revert(copy.deepcopy(model))
    true = taken(plain, x)
    total = sum(float((true[name] * gradients[name]).sum()) for name in true)
    assert report.descent == pytest.approx(total, rel=1e-9)


def test_autocast_runs_and_no_weight_carries_an_error(case):
    model, x, gradients = case
    if any(isinstance(module, nn.Bilinear) for module in model.modules()):
        pytest.skip("autocast does not take nn.Bilinear, converted or not")
    model = model.float()
    x = tuple(each.float() if each.is_floating_point() else each for each in x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            falign.revert(copy.deepcopy(model))(*x)
        except RuntimeError as error:
            if "could not create a primitive" not in str(error):
                raise
            pytest.skip("oneDNN has no LSTM in bfloat16 for this processor, converted or not")
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(*x))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        large = gradients[name].norm()
        assert float((p.grad - gradients[name]).norm()) <= 0.2 * max(float(large), 1e-3), name


FAMILIES = ("uniform", "orthogonal", "shared", "sparse(2)")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(name, family, marks=() if place % len(FAMILIES) == each else pytest.mark.slow)
        for place, name in enumerate(CUTS)
        for each, family in enumerate(FAMILIES)
    ],
)
def test_a_feedback_family_is_drawn_for_every_cut(name, family):
    """All of them in the slow suite, one of each cut in the fast one."""
    model, x = converted(name, feedback=family)
    assert falign.verify(model, x, loss_of).worst.error <= 1e-12


@pytest.mark.parametrize("name", CUTS)
def test_the_size_of_what_is_delivered_is_that_of_backpropagation(name):
    """|e B| over all positions and calls is about half of what backpropagation delivers, times a power of two."""
    model, x = converted(name)
    angles = falign.measure.alignment(model, lambda output, y: loss_of(output), x, None)
    sizes = [row.taken_norm / row.gradient_norm for row in angles.layers if row.gradient_norm]
    assert all(0.02 < size < 50 for size in sizes), sizes


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if at % 3 else ()) for at, name in enumerate(CUTS)]
)
def test_compiled_it_takes_the_same_gradients(name):
    """In one graph; recurrent modules and parameters multiplied by hand, which Dynamo does not take, between graphs."""
    torch._dynamo.reset()
    model, x = converted(name)
    expected = taken(model, x)
    whole = (
        not any(isinstance(module, (nn.RNNBase, nn.Bilinear)) for module in model.modules()) or "cut" in CUTS[name][2]
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
    model.zero_grad()
    loss_of(compiled(*x)).backward()
    assert relative({key: p.grad for key, p in model.named_parameters()}, expected) <= 1e-13


class Routed(nn.Module):
    """Experts of which an example reaches some, in the order of the tokens or sorted; and a layer that never runs."""

    def __init__(self, ordered):
        super().__init__()
        self.ordered, self.first, self.last = ordered, nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.never, self.chosen, self.runs = nn.Linear(5, 5), [0, 1], False

    def forward(self, x):
        h = torch.tanh(self.first(x))
        rows = h.flatten(0, 1)
        order = torch.arange(len(rows)) if self.ordered else torch.arange(len(rows)).flip(0)
        for number in self.chosen:
            rows = rows.index_add(0, order, torch.tanh(self.experts[number](rows[order])))
        h = rows.view_as(h)
        return self.last(h + self.never(h[..., :5]).sum() if self.runs else h)


def test_experts_that_the_example_does_not_reach_take_after_their_siblings():
    torch.manual_seed(0)
    model, x = Routed(True).double(), torch.randn(4, 7, 6, dtype=torch.float64)
    problems = falign.check(model, "dfa", example=x)
    assert problems == []
    assert {"never.weight", "experts.3.weight"} <= set(problems.untrained)
    falign.convert(model, "dfa", example=x)
    assert set(falign.feedback_state(model)) == {"first", "last", *(f"experts.{number}" for number in range(4))}
    model.chosen = [2, 3]
    assert falign.verify(model, x, lambda output: output.square().mean())
    model.runs = True
    with pytest.raises(RuntimeError, match="a layer runs that the example did not reach"):
        model(x)
    falign.revert(model)(x)


def test_rows_in_another_order_than_the_output_are_refused():
    torch.manual_seed(0)
    model, x = Routed(False).double(), torch.randn(4, 7, 6, dtype=torch.float64)
    problems = falign.check(model, "dfa", example=x)
    assert [f"layer 'experts.{number}' works on rows that are not those of the output" in line for number, line in
            enumerate(problems)] == [True, True]  # fmt: skip
    falign.convert(model, "dfa", example=x, skip="experts")
