"""Initial weights under the conservation law: guarantees on real images, in nets as users build them."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import falign
import falign.measure
from falign import init
from falign._preserve import DrawOnCPU
from falign.measure.law import ConservationLaw

RULES = ["fa", "kp", "dfa", "usf", "frsf", "brsf", "adafa"]


@cache
def digits(binary=False, size=300):
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).double() / 16, torch.from_numpy(labels)
    if binary:
        x, y = x[y < 2], y[y < 2].double()
    return x[:size], y[:size]


def mlp(rule="fa", outputs=10, depth=2, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), *hidden, nn.Linear(32, outputs)).to(dtype)
    return falign.convert(model, rule, seed=1, scale=None if rule == "bp" else 0.6)


def conv(rule="fa", norm=True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        *([nn.BatchNorm2d(6)] if norm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).double()
    return falign.convert(model, rule, seed=1, example=torch.zeros(2, 64, dtype=torch.float64))


def law_of(model, x):
    law = ConservationLaw(model, torch.optim.SGD(model.parameters(), lr=1.0), example=x)
    law.detach()
    return law


def train(model, loss_fn, x, y, rate, steps, batch=None):
    """Losses before each step, and the law."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    law, losses = ConservationLaw(model, optimizer, example=x), []
    for step in range(steps):
        points = slice(None) if batch is None else torch.arange(step * batch, (step + 1) * batch) % len(x)
        loss = loss_fn(model(x[points]), y[points])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, law


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("rule", RULES)
def test_dominant_aligns_every_neuron_under_the_law(rule, make):
    x, _ = digits()
    model = init.dominant(make(rule), example=x)
    found = init.aligned_forever(model, example=x)
    values = law_of(model, x).value()
    for name, forever in found.items():
        assert (values[name] < 0).all()
        assert forever.all() == (rule != "adafa")
    expected = {mlp: {"fa": {"0", "2"}, "dfa": {"2"}}, conv: {"fa": {"2", "5"}, "dfa": {"5"}}}[make]
    assert set(found) == expected.get(rule, expected["fa"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_bound_is_met_at_share_one(dtype):
    x, _ = digits()
    model = init.dominant(mlp(dtype=dtype), example=x.to(dtype), share=1.0)
    for value in law_of(model, x.to(dtype)).value().values():
        assert float(value.max()) < 1e-7


def test_generic_neurons_are_rarely_aligned_for_ever():
    x, _ = digits()
    model = init.generic(mlp(depth=3))
    shares = [float(forever.double().mean()) for forever in init.aligned_forever(model, example=x).values()]
    assert max(shares) < 0.5


def test_with_one_output_the_loss_never_rises_from_a_dominant_start():
    x, y = digits(binary=True)
    loss_fn = nn.BCEWithLogitsLoss()
    model = init.dominant(mlp(outputs=1, depth=1), example=x)
    losses, _ = train(model, lambda f, y: loss_fn(f[:, 0], y), x, y, 0.02, 150)
    assert all(later <= earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("make", [mlp, lambda: conv(norm=False)])
def test_alignment_stays_above_its_bound_throughout_training(make):
    x, y = digits()
    model = init.dominant(make(), example=x)
    C = {name: value.clone() for name, value in law_of(model, x).value().items()}
    for _ in range(2):
        _, law = train(model, nn.CrossEntropyLoss(), x, y, 0.05, 50, batch=50)
        assert law.report().holds
        gained, now = law.drift(), law_of(model, x).value()
        for name, forever in init.aligned_forever(model, example=x).items():
            assert forever.all(), name  # ⟨B, w_out⟩ ≥ ½|w_in|² + ½b² still
            assert (gained[name] >= 0).all()
            torch.testing.assert_close(now[name], C[name] + gained[name], rtol=0, atol=1e-12)
            C[name] = now[name]


def test_anti_raises_the_loss_at_first_which_recovers():
    x, y = digits()
    model = init.anti(mlp(depth=1), example=x)
    assert torch.equal(model[2].weight, -model[2].feedback.B)
    assert not any(forever.any() for forever in init.aligned_forever(model, example=x).values())
    losses, _ = train(model, nn.CrossEntropyLoss(), x, y, 0.1, 500)
    assert max(losses[:50]) > losses[0] + 0.005
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("depth", "dominates"), [(1, False), (2, True)])
def test_the_signs_of_two_anti_layers_cancel(depth, dominates):
    x, y = digits()
    model = init.anti(mlp(depth=depth), example=x)
    dominance = falign.measure.alignment(model, nn.CrossEntropyLoss(), x, y).dominance
    assert (dominance > 0) == dominates


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_alignment_dominates_from_a_dominant_start_on_real_images(depth):
    x, y = digits()
    model = init.dominant(mlp(depth=depth), example=x)
    assert falign.measure.alignment(model, nn.CrossEntropyLoss(), x, y).dominance > 0
    losses, _ = train(model, nn.CrossEntropyLoss(), x, y, 0.05, 100)
    assert all(later <= earlier for earlier, later in pairwise(losses))


def test_small_starts_at_zero_output_and_ends_aligned():
    x, y = digits()
    model = init.small(mlp(depth=2), example=x)
    assert (model(x) == 0).all()
    assert all(float(value.abs().max()) < 1e-2 for value in law_of(model, x).value().values())
    losses, _ = train(model, nn.CrossEntropyLoss(), x, y, 0.1, 400)
    assert losses[-1] < 0.5 * losses[0]
    for name, target in (("0", "2"), ("2", "4")):
        layer = model.get_submodule(target)
        aligned = (layer.feedback.B * layer.weight).sum(0).detach()
        assert float(aligned.min()) > -1e-3, name
        assert float((aligned > 0.01).double().mean()) > 0.5, name


@pytest.mark.parametrize("scheme", init.SCHEMES)
def test_a_seed_means_the_same_weights_and_moves_no_generator(scheme):
    x, _ = digits()
    before = torch.get_rng_state()
    one, other = (init.SCHEMES[scheme](mlp(), example=x, seed=5) for _ in range(2))
    different = init.SCHEMES[scheme](mlp(), example=x, seed=6)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    mlp()
    assert torch.equal(torch.get_rng_state(), state)
    assert before.shape == state.shape
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert any(not torch.equal(value, different.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.training


def test_what_is_drawn_for_another_device_is_what_the_cpu_draws():
    """In place, as a new tensor, like another; ``benchmarks/gpu.py`` compares the schemes' weights on a GPU."""

    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [
            nn.Conv2d(3, 4, 3).weight,
            nn.MultiheadAttention(4, 2).in_proj_weight,
            nn.init.orthogonal_(torch.empty(4, 4)),
            nn.init.trunc_normal_(torch.empty(5)),
            torch.empty(4).exponential_(),
            torch.randn(3, dtype=torch.float64, device="cpu"),
            torch.rand_like(torch.ones(3)),
            torch.randperm(9),
            torch.bernoulli(torch.full((7,), 0.5)),
        ]

    expected = drawn()
    with DrawOnCPU():
        found = drawn()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_signs_leave_magnitudes_and_zero_feedback_alone():
    x, _ = digits()
    model = falign.convert(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), feedback="sparse(2)")
    generic = init.generic(model, seed=3)[2].weight.detach().clone()
    weight, B = init.dominant(model, example=x.float(), seed=3)[2].weight, model[2].feedback.B
    assert torch.equal(weight.abs(), generic.abs())
    assert torch.equal(weight[B == 0], generic[B == 0])
    assert (weight * B >= 0).all()


def test_convolutions_are_scaled_channel_by_channel():
    x, _ = digits()
    generic = init.generic(conv(norm=False), seed=2)[4].weight.detach().clone()
    weight = init.dominant(conv(norm=False), example=x, seed=2)[4].weight.detach()
    ratios = (weight.abs() / generic.abs()).flatten(1)
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))
    assert (ratios <= 1 + 1e-12).all()
    assert ratios[:, 0].unique().numel() > 1


def test_transposed_convolutions_are_scaled_too():
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(60, 5)).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    init.dominant(falign.convert(model, "fa", example=x), example=x)
    assert all((value < 0).all() for value in law_of(model, x).value().values())


@pytest.mark.parametrize("scheme", init.SCHEMES)
def test_a_model_that_is_not_converted_is_refused(scheme):
    with pytest.raises(ValueError, match="is not converted"):
        init.SCHEMES[scheme](nn.Linear(4, 2), example=torch.zeros(1, 4))


@pytest.mark.parametrize("size", [0.0, -1.0, float("inf"), float("nan")])
def test_sizes_that_mean_nothing_are_refused(size):
    x, _ = digits()
    with pytest.raises(ValueError, match="size is"):
        init.small(mlp(), example=x, size=size)
    with pytest.raises(ValueError, match="share is"):
        init.dominant(mlp(), example=x, share=size if size != float("inf") else 1.5)


@pytest.mark.parametrize("tiny", [1e-300, 1e-170])
def test_factors_that_round_to_zero_are_refused_before_a_weight_is_drawn(tiny):
    model = mlp(dtype=torch.float32)
    before, x = model[0].weight.detach().clone(), digits()[0].float()
    with pytest.raises(ValueError, match=f"size is {tiny}, expected at least"):
        init.small(model, example=x, size=tiny)
    with pytest.raises(ValueError, match=f"share is {tiny}, expected at least"):
        init.dominant(model, example=x, share=tiny)
    assert torch.equal(model[0].weight, before)
    assert init.small(model, example=x, size=1e-15)[0].weight.count_nonzero() == before.numel()


@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", ["a", None, True, 1j])
def test_factors_that_are_no_numbers_are_refused(wrong):
    x, _ = digits()
    with pytest.raises(ValueError, match="size is"):
        init.small(mlp(), example=x, size=wrong)
    with pytest.raises(ValueError, match="share is"):
        init.dominant(mlp(), example=x, share=wrong)


def test_why_nothing_can_be_aligned_is_said():
    model = falign.convert(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)))
    before = model[0].weight.detach().clone()
    for scheme in (init.dominant, init.small, init.anti):
        with pytest.raises(ValueError, match=r"layer '0': .*tanh.*nothing can be aligned"):
            scheme(model, example=torch.zeros(2, 64))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("rule", ["usf", "frsf", "brsf", "bp"])
def test_feedback_with_the_weights_signs_has_nothing_against_it(rule):
    x, _ = digits()
    with pytest.raises(ValueError, match="free of the weights' signs"):
        init.anti(mlp(rule), example=x)


def test_an_example_that_does_not_run_is_refused():
    with pytest.raises(ValueError, match="does not run on the example"):
        init.dominant(mlp(), example=torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("scheme", falign.init.SCHEMES)
def test_what_a_model_has_learned_does_not_matter_as_the_docs_say(scheme):
    """Every scheme draws anew: a trained model and a new one end with the same weights."""
    found = []
    for trained in (False, True):
        torch.manual_seed(3)
        model = falign.convert(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)), "fa")
        if trained:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            for _ in range(3):
                model(torch.ones(5, 4)).square().mean().backward()
                optimizer.step()
        falign.init.SCHEMES[scheme](model, example=torch.ones(2, 4), seed=5)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.unchecked
@pytest.mark.parametrize("seed", [None, 1.0, True, "1", 2**70, -(2**70)])
def test_a_seed_of_no_use_is_refused(seed):
    model = falign.convert(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)), "fa")
    with pytest.raises(ValueError, match=r"seed is .*, expected a whole number"):
        falign.init.generic(model, seed=seed)
