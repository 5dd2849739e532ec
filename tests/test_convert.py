"""convert, check and their relatives: what they accept, what they refuse, and in which words."""

import copy
import time
from collections import namedtuple
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import falign
from cases import RULES, batch, build, conv, gradients, loss_of, mlp, relative
from falign.measure import gradient_angles

untyped = pytest.mark.unchecked


def net():
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 7))


class WithAttention(nn.Module):
    """Layers that no rule takes, beside two that it takes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.gain = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x) * self.gain + self.position
        x = x + self.attention(x, x, x)[0]
        return self.out(self.memory(x)[0])


class TiedHead(nn.Module):
    """A language model's output head: the embedding's weight, used outside its layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(torch.tanh(self.inner(self.embed(x))), self.embed.weight)


class Unused(nn.Module):
    """One layer that never runs, one whose weight is used without calling it."""

    def __init__(self):
        super().__init__()
        self.first, self.dead, self.borrowed = nn.Linear(20, 9), nn.Linear(9, 9), nn.Linear(9, 7)

    def forward(self, x):
        return torch.relu(self.first(x)) @ self.borrowed.weight.T + self.borrowed.bias


@pytest.mark.unchecked
def test_everything_that_stands_in_the_way_is_listed_at_once():
    problems = falign.check(WithAttention(), "fa", skip="embedding", scale=-1)
    assert len(problems) == 3
    for words in (
        "skip names 'embedding', which the model does not have",
        "layer '(root)' (WithAttention) uses parameters of its own (position 1x5x8",
        "scale is -1, expected a positive number",
    ):
        assert any(words in problem for problem in problems), problems
    with pytest.raises(falign.ConversionError) as raised:
        falign.convert(WithAttention(), "fa", skip="embedding", scale=-1)
    assert all(problem in str(raised.value) for problem in problems)
    assert falign.check(WithAttention(), "fa", example=torch.randn(2, 5, 6)) == []


@pytest.mark.parametrize("example", [None, torch.randn(4, 20)])
def test_backpropagation_has_nothing_to_convert(example):
    checked = falign.check(Unused(), "bp", example=example)
    assert (list(checked), checked.rows, checked.memory) == ([], (), 0)
    assert str(checked).startswith("nothing to convert, and nothing in the way") == (example is None)


def test_skip_is_the_explicit_way_to_backpropagation():
    model = WithAttention()
    falign.convert(model, "fa", skip=("attention", "memory", "position"))
    assert set(falign.feedback_state(model)) == {"embed", "out"}
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    falign.convert(plain, "fa", skip="2")
    assert set(falign.feedback_state(plain)) == {"0", "4"}


@pytest.mark.parametrize("rule", ["fa", "dfa", "usf"])
def test_a_transformer_with_its_attention_left_to_backpropagation(rule):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 11)).double()
    x, y = torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    names = ("1.layers.0.self_attn", "1.layers.1.self_attn")
    assert falign.check(model, rule, example=x) == []
    falign.convert(model, rule, skip=names, example=x)
    assert set(falign.feedback_state(model)) == {
        "1.layers.0.linear1", "1.layers.0.linear2", "1.layers.1.linear1", "1.layers.1.linear2", "2",
    }  # fmt: skip
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_an_empty_batch():
    model = falign.convert(build("mlp"), "dfa", example=batch("mlp")[0])
    model(torch.zeros(0, 20, dtype=torch.float64)).sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters())


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_layer_that_never_runs_is_listed_as_what_nobody_trains(rule):
    """No error can reach it, and none has to."""
    problems = falign.check(Unused(), rule, example=torch.randn(4, 20))
    assert problems == []
    assert {"dead.weight", "dead.bias"} <= set(problems.untrained)
    assert "trained by nobody: dead.weight, dead.bias" in str(problems)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize(
    ("model", "example"), [(Unused, torch.randn(4, 20).double()), (TiedHead, torch.randint(11, (4, 5)))]
)
def test_the_example_finds_what_would_fall_back_silently(rule, model, example):
    assert falign.check(model().double(), rule, example=example) == []
    converted = falign.convert(model().double(), rule, example=example)
    assert falign.verify(converted, example, lambda output: output.square().sum())


def test_the_example_leaves_no_trace():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[1].eval()
    example = torch.randn(1, 6)
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert falign.check(model, "dfa", example=example) == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert (model.training, model[1].training) == (True, False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_that_run_only_in_training_are_seen():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.side = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            h = torch.relu(self.body(x))
            return self.head(h) + self.side(h) if self.training else self.head(h)

    assert falign.check(Auxiliary(), "dfa", example=torch.randn(2, 6)) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "feedback"}, "unknown rule 'feedback': choose one of bp, fa, dfa, usf, frsf, brsf, drtp, kp, adafa"),
        pytest.param({"rule": 3}, "unknown rule 3", marks=untyped),
        ({"skip": ("3",)}, "skip names '3', which the model does not have; near it: "),
        ({"skip": ("linear",)}, "near it: 0, 1, 2"),
        ({"scale": -1.0}, "scale is -1.0, expected a positive number"),
        ({"scale": float("nan")}, "scale is nan"),
        pytest.param({"scale": 10**400}, "expected a number near 1", marks=untyped),
        pytest.param({"scale": True}, "scale is True, expected a positive number", marks=untyped),
        ({"feedback": {"2": torch.zeros(3, 3)}}, r"feedback of layer '2' has shape (3, 3), expected (7, 30)"),
        ({"feedback": {"9": torch.zeros(3, 3)}}, "feedback names '9', which takes no feedback; layers: 0, 2"),
        ({"feedback": {"2": torch.full((7, 30), float("inf"))}}, "holds numbers that are not finite"),
        pytest.param({"feedback": {"2": 3.0}}, "feedback of layer '2' is a float, expected a tensor", marks=untyped),
        pytest.param({"feedback": 3.0}, "feedback is a float, expected a family", marks=untyped),
        ({"rule": "bp", "scale": 2.0}, "rule 'bp' has no feedback: pass neither feedback= nor scale="),
        ({"rule": "usf", "feedback": "normal"}, "rule 'usf' makes its feedback from the weights"),
        ({"rule": "kp", "feedback": "shared"}, "the shared family cannot serve it"),
        ({"example": torch.zeros(4, 21)}, "the model does not run on the example: RuntimeError"),
        ({"rule": "dfa", "example": torch.zeros(4, 21)}, "the model does not run on the example: RuntimeError"),
        ({"skip": ("",)}, "nothing to convert"),
    ],
)
def test_wrong_arguments(arguments, words):
    problems = falign.check(net(), **arguments)
    assert len(problems) == 1
    assert words in problems[0]
    with pytest.raises(falign.ConversionError):
        falign.convert(net(), **arguments)


def test_models_that_cannot_be_converted():
    for model, words in (
        (nn.Sequential(nn.ReLU()), "nothing to convert"),
        (nn.DataParallel(net()), "wrapped in DataParallel: convert the plain model first"),
        (nn.Sequential(nn.LazyLinear(3)), "has no shape yet: run one batch through the model first"),
    ):
        (problem,) = falign.check(model, "fa")
        assert words in problem
    converted = falign.convert(net(), "fa")
    (problem,) = falign.check(converted, "dfa")
    assert "converted already, to rule 'fa': call falign.revert(model) first" in problem
    (problem,) = falign.check(nn.Sequential(converted), "dfa")
    assert "converted already" in problem


@untyped
def test_something_that_is_no_model():
    (problem,) = falign.check("net", "fa")
    assert problem == "expected a torch.nn.Module, got str"


def test_a_failed_conversion_changes_nothing():
    def broken(shape, random):
        return torch.ones(2, 2)

    model = net()
    with pytest.raises(
        ValueError, match=r"feedback of layer '0': the family returned \(2, 2\), expected a tensor \(30, 20\)"
    ):
        falign.convert(model, "fa", feedback=broken)
    assert list(model.state_dict()) == list(net().state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    falign.convert(model, "fa")


def test_a_direct_rule_without_the_example_that_it_needs():
    (problem,) = falign.check(conv(), "dfa")
    assert "rule 'dfa' needs an example: the size of the input of 0, 2, 4 cannot be read off the layer" in problem
    assert falign.check(mlp(), "dfa") == []
    with_example = falign.convert(build("mlp"), "dfa", example=batch("mlp")[0])
    without = falign.convert(build("mlp"), "dfa")
    assert relative(gradients(with_example, *batch("mlp")), gradients(without, *batch("mlp"))) == 0


def test_a_direct_rule_on_another_shape_than_the_example():
    model = falign.convert(build("conv"), "dfa", example=batch("conv")[0])
    wider = nn.Sequential(*list(model)[:6], nn.AdaptiveAvgPool2d((4, 6)), *list(model)[6:])
    with pytest.raises(RuntimeError, match="outside the forward of the converted model"):
        wider(batch("conv")[0])
    pooled = nn.Sequential(*list(build("conv"))[:6], nn.AdaptiveAvgPool2d((4, 6)), *list(build("conv"))[6:])
    falign.convert(pooled, "dfa", example=batch("conv")[0])
    with pytest.raises(
        RuntimeError, match=r"direct feedback of layer '2' is 5 x 216.*convert the model with an example"
    ):
        pooled(torch.randn(4, 3, 13, 14, dtype=torch.float64))


def test_batch_size_is_free_under_direct_rules():
    model = falign.convert(build("conv"), "dfa", example=batch("conv")[0][:1])
    x, y = batch("conv")
    assert gradients(model, x, y)


def test_direct_feedback_into_convolutions_is_a_full_map():
    """(outputs, C·H·W), not one matrix tiled over the positions: the error differs from pixel to pixel."""
    model = falign.convert(build("conv"), "dfa", example=batch("conv")[0])
    state = falign.feedback_state(model)
    assert state["2"].shape == (5, 6 * 6 * 6)
    route = falign._delivery.Route(("n", "k"), ("n", "c"))
    carried = falign._delivery.project(torch.randn(4, 5, dtype=torch.float64), state["2"], (4, 6, 6, 6), route)
    assert float(carried.std(dim=(2, 3)).mean() / carried.std()) > 0.8


def test_sequence_feedback_is_per_position_and_length_is_free():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    falign.convert(model, "dfa", example=torch.randn(2, 5, 6, dtype=torch.float64))
    assert falign.feedback_state(model)["2"].shape == (3, 8)
    x, y = torch.randn(4, 9, 6, dtype=torch.float64), torch.randint(3, (4, 9))
    assert falign.verify(model, x, lambda output: loss_of(output, y))


@pytest.mark.parametrize("rule", ["dfa", "drtp"])
def test_images_in_images_out_is_per_position(rule):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1)).double()
    x, y = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randint(4, (2, 5, 7))
    falign.convert(model, rule, example=x)
    assert falign.feedback_state(model)["2"].shape == (4, 6)
    assert falign.verify(model, x, lambda output: nn.functional.cross_entropy(output, y), target=y)


@pytest.mark.parametrize(("positions", "sizes"), [("each", (6, 8)), ("all", (30, 40))])
def test_pooled_sequences_get_one_vector_at_every_position_or_a_map_of_the_whole_sample(positions, sizes):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mid, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.mid(torch.tanh(self.inner(x)))).mean(1))

    model, x, y = Pooled().double(), torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(3, (4,))
    falign.convert(model, falign.ALL_RULES["dfa"](positions=positions), example=x)
    assert {name: tuple(b.shape) for name, b in falign.feedback_state(model).items()} == {
        "inner": (3, sizes[0]), "mid": (3, sizes[1]), "out": (3, 8),
    }  # fmt: skip
    assert falign.verify(model, x, lambda output: loss_of(output, y))


Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(
    ("structure", "output"),
    [
        (lambda a, b: {"logits": a, "hidden": b}, "logits"),
        (lambda a, b: (a, b), 0),
        (lambda a, b: [b, a], -1),
        (Pair, "logits"),
        (Answer, "logits"),
        (lambda a, b: {"inner": [b, (a,)]}, lambda result: result["inner"][1][0]),
    ],
)
def test_output_of_a_structure(structure, output):
    class Structured(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build("mlp")

        def forward(self, x):
            h = self.body[:6](x)
            return structure(self.body[6](h), h)

    x, y = batch("mlp")
    pick = (
        output
        if callable(output)
        else lambda result: (
            getattr(result, output) if isinstance(output, str) and not isinstance(result, dict) else result[output]
        )
    )
    model = falign.convert(Structured(), "dfa", example=x, output=output)
    assert type(model(x)) is type(structure(x, x))
    assert falign.verify(model, x, lambda result: loss_of(pick(result), y))
    (problem,) = falign.check(Structured(), "dfa", example=x)
    assert "pass output=" in problem
    (problem,) = falign.check(Structured(), "dfa", example=x, output="nothing")
    assert "output='nothing' does not pick one" in problem
    assert falign.check(Structured(), "fa", example=x) == []


def test_examples_of_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.out = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x, *, z):
            return self.out(torch.relu(self.left(x) + self.right(z)))

    example = {"x": torch.randn(3, 4), "z": torch.randn(3, 5)}
    assert falign.check(Two(), "dfa", example=example) == []
    assert "does not run" in falign.check(Two(), "dfa", example=(example["x"], example["z"]))[0]


def test_keyword_call_of_a_layer_is_refused():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(input=torch.relu(self.inner(x)))

    model = falign.convert(Keyword(), "fa")
    with pytest.raises(TypeError, match=r"layer 'out' was called with keyword arguments only"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "bp"])
def test_feedback_state_round_trip(rule):
    model, other = build("mlp", rule), build("mlp", rule, seed=7)
    gradients(model, *batch("mlp"))
    falign.load_feedback_state(other, falign.feedback_state(model))
    assert relative(gradients(copy.deepcopy(model), *batch("mlp")), gradients(other, *batch("mlp"))) == 0


def test_shared_feedback_can_be_loaded():
    model, other = (falign.convert(build("mlp"), "fa", feedback="shared", seed=seed) for seed in (0, 1))
    falign.load_feedback_state(other, falign.feedback_state(model))
    assert relative(gradients(model, *batch("mlp")), gradients(other, *batch("mlp"))) <= 1e-12
    third = falign.convert(build("mlp"), "fa", feedback="shared", seed=1)
    assert relative(gradients(third, *batch("mlp")), gradients(other, *batch("mlp"))) > 0.1


def test_feedback_of_another_network_is_refused():
    model = falign.convert(net(), "fa")
    before = falign.feedback_state(model)
    other = falign.feedback_state(
        falign.convert(nn.Sequential(nn.Linear(20, 31), nn.ReLU(), nn.Linear(31, 7), nn.Linear(7, 7)), "fa")
    )
    with pytest.raises(ValueError, match="feedback of another network, nothing was loaded") as raised:
        falign.load_feedback_state(model, other)
    assert "'2' has shape (7, 31), expected (7, 30)" in str(raised.value)
    assert "the state has '3', which takes no feedback here" in str(raised.value)
    with pytest.raises(ValueError, match="layer '0' has feedback here, but not in the state"):
        falign.load_feedback_state(model, {"2": before["2"]})
    with pytest.raises(ValueError, match="not finite"):
        falign.load_feedback_state(model, {**before, "0": before["0"] / 0})
    assert all(torch.equal(before[name], b) for name, b in falign.feedback_state(model).items())


@pytest.mark.parametrize(
    "call",
    [
        falign.revert,
        falign.feedback_state,
        lambda model: falign.load_feedback_state(model, {}),
        lambda model: falign.backprop(model).__enter__(),
        lambda model: falign.targets(model, torch.zeros(1)).__enter__(),
        lambda model: falign.verify(model, torch.zeros(1, 20), torch.sum),
        lambda model: gradient_angles(model, loss_of, torch.zeros(1, 20), torch.zeros(1, dtype=torch.long)),
    ],
)
def test_a_model_that_is_not_converted(call):
    with pytest.raises(ValueError, match=r"is not converted: call falign.convert"):
        call(net())


def test_targets_are_needed_and_must_fit():
    model = falign.convert(net(), "drtp")
    with pytest.raises(
        RuntimeError, match=r"rule 'drtp' needs the targets: run forward and loss within `with falign.targets"
    ):
        model(torch.randn(4, 20))
    with (
        pytest.raises(RuntimeError, match=r"targets \(4, 3\) of torch.int64 for an output \(4, 7\)"),
        falign.targets(model, torch.zeros(4, 3, dtype=torch.long)),
    ):
        model(torch.randn(4, 20))
    with torch.no_grad():
        model(torch.randn(4, 20))


@pytest.mark.parametrize("loss", [lambda output: output, lambda output: output.sum() * float("nan")])
def test_verify_wants_one_finite_number(loss):
    model = falign.convert(net(), "fa")
    with pytest.raises(ValueError, match="expected one finite number"):
        falign.verify(model, torch.randn(4, 20), loss)


def test_residual_what_arrives_at_a_cut_is_the_delivered_error_alone():
    """The branch hands back e B and nothing else; the skip path carries what later cuts received."""
    model, (x, y) = build("residual", "dfa"), batch("residual")
    state = falign.feedback_state(model)
    seen = {}
    first = model[0]
    handle = first.register_forward_hook(
        lambda m, args, out: out.register_hook(lambda g: seen.__setitem__("stream", g)) and None
    )
    output = model(x)
    output.retain_grad()
    loss_of(output, y).backward()
    handle.remove()
    e = output.grad
    with torch.no_grad():
        hidden = first(x)
        inner = model[1](hidden)
    own = (e @ state["1.inner.1"]) * (1 - torch.tanh(hidden) ** 2)
    later = (e @ state["2.inner.1"]) * (1 - torch.tanh(inner) ** 2)
    assert torch.allclose(seen["stream"], own + later + e @ state["3"], atol=1e-14)


def test_cost_of_convert_is_small():
    """A wide margin around the benchmark's millisecond a layer: this only catches a blunder."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    begin = time.process_time()
    falign.convert(model, "fa")
    assert time.process_time() - begin < 2


def test_printing_says_what_hangs_on_the_model():
    text = str(falign.convert(net(), "dfa"))
    assert "(feedback): Feedback(dfa, 7x30)" in text
    assert "one number a layer" in str(falign.convert(net(), "usf"))


def test_wrapped_models_are_found():
    inner = build("mlp", "fa")
    outer = nn.Sequential(inner)
    x, y = batch("mlp")
    with falign.backprop(outer):
        output = outer(x)
    loss_of(output, y).backward()
    true = gradients(build("mlp", "bp"), x, y)
    assert relative({name: p.grad for name, p in inner.named_parameters()}, true) == 0


def test_public_surface():
    assert sorted(falign.__all__) == [
        "ALL_RULES", "ConversionError", "Rule", "Transported", "Verification", "__version__", "backprop",
        "calibrate", "check", "convert", "feedback_state", "follow", "init", "load_feedback_state", "measure",
        "mirror", "revert", "targets", "transport", "verify",
    ]  # fmt: skip


@untyped
@pytest.mark.parametrize(
    ("seed", "scale"), [(np.int64(3), np.float32(0.5)), (np.uint8(3), np.float16(0.5)), (3, Fraction(1, 2))]
)
def test_numbers_of_other_kinds_are_numbers(seed, scale):
    def matrices(seed, scale):
        torch.manual_seed(0)
        return falign.feedback_state(
            falign.convert(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), seed=seed, scale=scale)
        )

    expected, found = matrices(3, 0.5), matrices(seed, scale)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@untyped
@pytest.mark.parametrize("seed", [3.0, True, np.bool_(True), "3", None, np.float64(3)])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(falign.ConversionError, match=r"seed must be an integer, got .*: write int\(seed\)"):
        falign.convert(net(), seed=seed)


@untyped
@pytest.mark.parametrize("name", ["rule", "seed", "scale", "feedback", "output", "skip"])
def test_a_number_too_long_for_a_text_is_refused_in_words(name):
    """Python writes no more than 4,300 digits."""
    with pytest.raises(falign.ConversionError, match=rf"(?s)cannot be converted:\n.*{name}"):
        falign.convert(net(), **{"rule": "dfa", "example": torch.ones(2, 20), name: 10**5000})
