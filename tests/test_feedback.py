"""Families, scale, and that B depends on nothing but (seed, layer name, family)."""

import contextlib
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import falign
from falign.feedback import FAMILIES, LowRank, Normal, Orthogonal, Shared, Sparse, Uniform, draw, family, generator

TEXTS = ["normal", "uniform", "orthogonal", "low-rank(3)", "sparse(2)"]


def net(width=40, depth=3):
    layers = [nn.Linear(20, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (10, 500)])
def test_entries_have_mean_zero_and_variance_one(text, shape):
    drawn = torch.stack([family(text)(shape, generator(seed, "layer", text)) for seed in range(8)])
    count = min(shape) if text in ("orthogonal", "low-rank(3)") else drawn[0].numel()
    spread = 5 / (8 * count) ** 0.5
    assert abs(float(drawn.mean())) < spread
    assert float(drawn.square().mean()) == pytest.approx(1, abs=max(5 * spread, 0.35 if "low" in text else 0))


def test_structure_of_the_families():
    random = generator(0, "layer", "test")
    assert Uniform()((50, 50), random).abs().max() <= 3**0.5
    wide = Orthogonal()((20, 50), random)
    assert torch.allclose(wide @ wide.T, 50 * torch.eye(20), atol=1e-3)
    tall = Orthogonal()((50, 20), random)
    assert torch.allclose(tall.T @ tall, 50 * torch.eye(20), atol=1e-3)
    assert torch.linalg.matrix_rank(LowRank(4)((30, 20), random)) == 4
    assert (Sparse(3)((30, 20), random) != 0).sum(0).tolist() == [3] * 20
    assert (Sparse(99)((5, 20), random) != 0).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40), name=st.text(max_size=8), rows=st.integers(1, 9), columns=st.integers(1, 9),
    text=st.sampled_from(TEXTS),
)  # fmt: skip
def test_pure_function_of_seed_name_and_family(seed, name, rows, columns, text):
    def drawn():
        return draw(family(text), (rows, columns), seed=seed, name=name, deviation=0.5)

    before = torch.random.get_rng_state()
    first = drawn()
    torch.rand(3)
    torch.random.set_rng_state(before)
    assert torch.equal(first, drawn())
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator is not touched"
    assert first.shape == (rows, columns)


def test_seeds_names_and_families_differ():
    base = {"seed": 0, "name": "a", "deviation": 1.0}
    first = draw(Normal(), (9, 9), **base)
    assert not torch.equal(first, draw(Normal(), (9, 9), **{**base, "seed": 1}))
    assert not torch.equal(first, draw(Normal(), (9, 9), **{**base, "name": "b"}))
    assert not torch.allclose(first.abs().sort().values, draw(Uniform(), (9, 9), **base).abs().sort().values)


@pytest.mark.parametrize("text", [*TEXTS, "shared"])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_layers_of_equal_width_get_different_feedback(rule, text):
    state = falign.feedback_state(falign.convert(net(depth=5), rule, feedback=text))
    hidden = [state[name] for name in ("2", "4", "6")]
    for one in range(3):
        for other in range(one):
            cosine = torch.cosine_similarity(hidden[one].flatten(), hidden[other].flatten(), dim=0)
            assert abs(float(cosine)) < 0.2


@pytest.mark.parametrize("text", [*TEXTS, "shared"])
def test_same_numbers_in_every_dtype(text):
    single = falign.feedback_state(falign.convert(net(), "fa", feedback=text))
    double = falign.feedback_state(falign.convert(net().double(), "fa", feedback=text))
    for name in single:
        assert torch.allclose(single[name].double(), double[name], rtol=1e-6)
        if text != "shared":
            assert torch.equal(single[name].double(), double[name])


@pytest.mark.parametrize("rule", ["fa", "dfa", "frsf", "brsf", "drtp"])
def test_shared_memory_is_that_of_the_largest(rule):
    model = falign.convert(net(width=600, depth=6), rule, feedback="shared")

    def stored(model):
        return {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in model.buffers()}

    largest = max(b.numel() for b in falign.feedback_state(model).values()) * 4
    room = max(1 << 16, largest // 4 // 16) * 4
    assert sum(stored(model).values()) <= largest + room + 1000
    model.double().float()
    assert sum(stored(model).values()) <= largest + room + 1000, "moving the model keeps the sharing"
    import copy

    twin = copy.deepcopy(model)
    assert sum(stored(twin).values()) <= largest + room + 1000
    assert stored(twin).keys().isdisjoint(stored(model))


def test_shared_feedback_does_not_depend_on_the_other_layers():
    small = falign.feedback_state(falign.convert(net(), "fa", feedback="shared"))
    larger = nn.Sequential(*net(), nn.Linear(10, 3000))
    state = falign.feedback_state(falign.convert(larger, "fa", feedback="shared"))
    assert all(torch.equal(small[name], state[name]) for name in small)


def test_scale_and_default():
    one = falign.feedback_state(falign.convert(net(), "fa", scale=1.0))
    three = falign.feedback_state(falign.convert(net(), "fa", scale=3.0))
    for name in one:
        assert torch.allclose(three[name], 3 * one[name])
        assert float(one[name].std()) == pytest.approx(one[name].shape[1] ** -0.5, rel=0.15)


@pytest.mark.parametrize("factor", [1, 0.25, 4, 0.0])
@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "adafa"])
def test_the_default_size_is_that_of_the_weights(factor, rule):
    """Within a fourth root of two of W's own, and PyTorch's own where W is nothing."""
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    falign.convert(model, rule)
    for layer in (model[0], model[2]):
        size = layer.feedback.feedback_matrix(torch.ones_like(layer.weight)).square().mean().sqrt()
        wanted = factor * (3 * layer.in_features) ** -0.5 or (3 * layer.in_features) ** -0.5
        assert float(size.detach()) == pytest.approx(wanted * falign.ALL_RULES[rule].size, rel=0.1)


def test_the_default_size_does_not_hang_on_the_draw_of_the_weights():
    """A network made anew, to go on from a checkpoint, gets the same feedback, whatever its first weights are."""
    for rule in ("fa", "frsf", "dfa"):
        one = falign.feedback_state(falign.convert(net(), rule))
        other = falign.feedback_state(falign.convert(net().double(), rule))
        assert all(torch.allclose(one[name].double(), other[name]) for name in one)


@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
@pytest.mark.parametrize("feedback", [None, "shared"])
def test_the_size_travels_with_the_state(rule, feedback):
    """Feedback has the size that it had in the run that is gone on with, not that of the weights trained meanwhile."""
    if rule == "usf" and feedback:
        return
    first = falign.convert(net(), rule, feedback=feedback)
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(8)
    grown = net()
    grown.load_state_dict(dict(first.state_dict()))
    falign.convert(grown, rule, feedback=feedback)
    before = falign.feedback_state(first)
    assert not torch.allclose(falign.feedback_state(grown)["0"], before["0"])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    grown.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.allclose(value, before[name]) for name, value in falign.feedback_state(grown).items())


def test_a_direct_rule_delivers_errors_of_the_size_of_the_true_ones():
    """Half their size at every layer of a deep network, however small its weights are."""
    for factor in (1.0, 0.3):
        torch.manual_seed(0)
        model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(40, 40), nn.Tanh())), nn.Linear(40, 9))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(factor)
        x, y = torch.randn(64, 40), torch.randint(9, (64,))
        falign.convert(model, "dfa", example=x)
        taken = {}
        for true in (False, True):
            model.zero_grad()
            with falign.backprop(model) if true else contextlib.nullcontext():
                nn.functional.cross_entropy(model(x), y).backward()
            taken[true] = [float(model[index].weight.grad.norm()) for index in range(0, 12, 2)]
        assert all(0.1 < one / other < 1 for one, other in zip(taken[False], taken[True], strict=True))


def test_a_callable_and_given_tensors():
    def ones(shape, random):
        return torch.ones(shape)

    model = falign.convert(net(), "fa", feedback=ones, scale=2.0)
    assert torch.allclose(falign.feedback_state(model)["2"], torch.full((40, 40), 2 / 40**0.5))
    given = torch.randn(40, 40)
    model = falign.convert(net(), "fa", feedback={"2": given})
    state = falign.feedback_state(model)
    assert torch.equal(state["2"], given)
    assert torch.equal(state["4"], falign.feedback_state(falign.convert(net(), "fa"))["4"])
    given.zero_()
    assert state["2"].abs().sum() > 0
    assert falign.feedback_state(model)["2"].abs().sum() > 0, "a copy is kept"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gaussian", "unknown feedback family 'gaussian': choose one of normal, uniform"),
        ("low-rank", "needs a number"),
        ("normal(3)", "takes no number"),
        ("sparse(0)", "at least 1 entry"),
        ("low-rank(-1)", "a rank of at least 1"),
    ],
)
def test_wrong_families(text, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        family(text)
    with pytest.raises(falign.ConversionError, match=words.replace("(", r"\(")):
        falign.convert(net(), "fa", feedback=text)


def test_names_round_trip():
    for text in [*TEXTS, "shared"]:
        assert str(family(text)) == text
    assert family("low-rank:3") == LowRank(3)
    assert set(FAMILIES) == {"normal", "uniform", "orthogonal", "low-rank", "sparse", "shared"}
    assert family("shared") == Shared()
