"""Transforms of the error: what each makes of it, and what reaches the layers."""

import numpy as np
import pytest
import torch
from torch import nn

import falign
from cases import batch, build, gradients, loss_of, relative
from falign.transforms import TRANSFORMS, Centred, Noisy, Quantised, Signs, Ternary, Whitened, transforms

ERROR = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


def rms(e):
    return np.sqrt(np.mean(e**2))


ORACLES = {
    Centred(): lambda e: e - e.reshape(-1, 4).mean(0),
    Centred(gate=0.1): lambda e: e - e.reshape(-1, 4).mean(0),
    Centred(gate=0.9): lambda e: e,
    Signs(): lambda e: rms(e) * np.sign(e),
    Ternary(): lambda e: np.sign(e) * (np.abs(e) > 0.5 * rms(e)) * rms(e) / np.sqrt(np.mean(np.abs(e) > 0.5 * rms(e))),
    Quantised(): lambda e: np.round(e * 7 / np.abs(e).max()) * np.abs(e).max() / 7,
    Quantised(bits=2): lambda e: np.round(e / np.abs(e).max()) * np.abs(e).max(),
    Whitened(ridge=0.5): lambda e: e / 1.5,
}


@pytest.mark.parametrize("transform", ORACLES, ids=str)
def test_each_is_what_it_says(transform):
    np.testing.assert_allclose(transform(ERROR).numpy(), ORACLES[transform](ERROR.numpy()), rtol=1e-13)


@pytest.mark.parametrize("transform", [*ORACLES, Noisy(0.3)], ids=str)
@pytest.mark.parametrize("factor", [2.0**16, 2.0**-20])
def test_a_loss_scale_passes_through(transform, factor):
    def made(error):
        torch.manual_seed(0)
        return transform(error)

    assert torch.equal(made(factor * ERROR), factor * made(ERROR))


@pytest.mark.parametrize("transform", [make() for make in TRANSFORMS.values()], ids=str)
def test_no_error_stays_none(transform):
    assert torch.equal(transform(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_noise_has_its_size_and_ternary_keeps_the_norm():
    error = torch.randn(4000, 10, dtype=torch.float64)
    noise = Noisy(0.3)(error) - error
    assert float(noise.std() / error.std()) == pytest.approx(0.3, rel=0.02)
    assert float(Ternary(0.7)(error).norm() / error.norm()) == pytest.approx(1, rel=1e-12)
    assert len(Ternary(0.7)(error).unique()) == 3
    assert len(Quantised(3)(error).unique()) == 7


def test_names_stand_for_values():
    named = ("centred", "centred(0.2)", "signs", "ternary:0.3", "quantised(5)", "noisy(0.01)", "whitened(0.2)")
    values = (Centred(), Centred(gate=0.2), Signs(), Ternary(0.3), Quantised(5), Noisy(0.01), Whitened(0.2))
    assert transforms(named) == transforms(list(values)) == values
    assert [str(one) for one in values] == [name.replace(":", "(") + ")" * (":" in name) for name in named]
    assert transforms(None) == ()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("central", "unknown transform 'central': choose of centred, centred(GATE), signs"),
        ("signs(3)", "unknown transform 'signs(3)'"),
        ("quantised(1)", "quantised: bits is 1, expected a whole number from 2 to 16 (1: signs)"),
        ("quantised(2.5)", "quantised: bits is 2.5, expected a whole number"),
        ("centred(1)", "centred: the gate is 1.0, expected a share of the error's power, from 0 to 1"),
        ("whitened(0)", "whitened: the ridge is 0.0, expected a number above 0"),
        ("noisy(-1)", "noisy: the size is -1.0, expected a number from 0 on"),
        (("signs", 3), "a transform is a int, expected a name or a callable"),
    ],
)
def test_what_is_none_is_said(given, said):
    (line,) = falign.check(build("mlp"), "fa", transform=given)
    assert said in line


@pytest.mark.parametrize("rule", ["bp", "frozen"])
def test_rules_without_feedback_take_none(rule):
    (line,) = falign.check(build("mlp"), rule, transform="signs")
    assert line == f"transform= is for rules with feedback, {rule!r} has none: leave it out"


def turned_about(error):
    return error.flip(0)


@pytest.mark.parametrize(
    "transform", ["signs", ("centred", "quantised(3)"), turned_about, "whitened"], ids=["one", "two", "own", "memory"]
)
@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "pfa", "dfa", "drtp", "dkp", "probe", "ebd", "ldfa"])
@pytest.mark.parametrize("case", ["mlp", "conv", "sequence"])
def test_the_layers_receive_it(rule, case, transform):
    model, (x, y) = build(case), batch(case)
    falign.convert(model, rule, example=x, transform=transform)
    with falign.targets(model, y):
        assert falign.verify(model, x, lambda output: loss_of(output, y), target=y)
    plain = falign.convert(build(case), rule, example=x)
    assert relative(gradients(plain, x, y), gradients(model, x, y)) > 1e-3


def test_the_first_is_applied_first_and_the_last_layer_keeps_its_error():
    x, y = batch("mlp")
    seen = {}
    for several in (("centred", "signs"), ("signs", "centred"), None):
        model = falign.convert(build("mlp"), "dfa", example=x, transform=several)
        seen[several] = gradients(model, x, y)
    assert relative(seen["centred", "signs"], seen["signs", "centred"]) > 1e-3
    assert all(torch.equal(taken["6.weight"], seen[None]["6.weight"]) for taken in seen.values())
    e = (torch.softmax(model(x), -1) - nn.functional.one_hot(y, 7)).detach().numpy() / len(y)
    centred = e - e.mean(0)
    model = falign.convert(build("mlp"), "dfa", example=x, transform=("centred", "signs"))
    received = {}
    model[5].register_full_backward_hook(lambda module, into, out: received.update(e=out[0]))
    gradients(model, x, y)
    expected = rms(centred) * np.sign(centred) @ falign.feedback_state(model)["6"].numpy()
    np.testing.assert_allclose(received["e"].numpy(), expected, rtol=1e-10)


def moment(sigma, e, forgetting):
    """The running second moment of errors, of mean diagonal 1."""
    e = e.reshape(-1, e.shape[-1])
    return forgetting * sigma + (1 - forgetting) * e.T @ e / np.mean(np.sum(e**2, 1)) / len(e) * e.shape[1]


def test_whitened_errors_are_those_of_the_running_moment():
    x, y = batch("mlp")
    model = falign.convert(build("mlp"), "dfa", example=x, transform=Whitened(ridge=0.2, forgetting=0.8))
    e = (torch.softmax(model(x), -1) - nn.functional.one_hot(y, 7)).detach().numpy() / len(y)
    received = {}
    model[5].register_full_backward_hook(lambda module, into, out: received.update(e=out[0]))
    sigma = np.eye(7)
    for scale in (1.0, 2.0**16, 1e-3):  # a loss scale reaches the layers, and not the moment
        model.zero_grad()
        (scale * loss_of(model(x), y)).backward()
        sigma = moment(sigma, e, 0.8)
        expected = scale * e @ np.linalg.inv(sigma + 0.2 * np.eye(7)) @ falign.feedback_state(model)["6"].numpy()
        np.testing.assert_allclose(received["e"].numpy(), expected, rtol=1e-10, atol=1e-15 * scale)
    np.testing.assert_allclose(model[6].feedback.transform0_0.numpy(), sigma, rtol=1e-12, atol=1e-14)
    assert np.trace(sigma) == pytest.approx(7)


def memories(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "transform" in name}


@pytest.mark.parametrize("rule", ["fa", "dfa", "kp"])
def test_what_is_remembered_moves_in_training_alone_and_resumes(rule):
    x, y = batch("mlp")
    several = ("centred", Whitened(forgetting=0.5))
    model = falign.convert(build("mlp"), rule, example=x, transform=several)
    before = memories(model)
    assert set(before) == {f"{i}.feedback.transform1_0" for i in ((6,) if rule == "dfa" else (0, 2, 4, 6))}
    loss_of(model(x), y).backward()
    moved = memories(model)
    assert relative(moved, before) > 0.1
    (float("inf") * loss_of(model(x), y)).backward()
    falign.measure.alignment(model, loss_of, x, y)
    with falign.backprop(model):
        loss_of(model(x), y).backward()
    loss_of(model.eval()(x), y).backward()
    assert relative(memories(model.train()), moved) == 0
    resumed = falign.convert(build("mlp"), rule, example=x, transform=several, seed=0)
    resumed.load_state_dict(model.state_dict())
    assert relative(gradients(resumed, x, y), gradients(model, x, y)) == 0
    assert relative(memories(resumed), memories(model)) == 0
    falign.revert(resumed)
    assert not memories(resumed)


def test_every_output_has_a_memory_of_its_own_error():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(9, 3)

        def forward(self, x):
            z = torch.tanh(self.body(x))
            return self.a(z), self.b(z)

    x = torch.randn(7, 6, dtype=torch.float64)
    model = falign.convert(Heads().double(), "dfa", example=x, output=(0, 1), transform="whitened")
    assert {name: len(value) for name, value in memories(model).items()} == {
        "a.feedback.transform0_0": 4,
        "b.feedback.transform0_1": 3,
    }
    assert falign.verify(model, x, lambda out: out[0].square().mean() + out[1].exp().mean())


def test_kolen_pollack_still_meets_its_weights():
    """B takes the gradient of W, not that of the changed error."""
    x, y = batch("mlp")
    model = falign.convert(build("mlp"), "kp", example=x, transform="signs")
    layers = [layer for layer in model if hasattr(layer, "feedback")]
    before = [(layer.weight - layer.feedback.B).detach().clone() for layer in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    for layer, start in zip(layers, before, strict=True):
        torch.testing.assert_close((layer.weight - layer.feedback.B).detach(), 0.95**20 * start, rtol=1e-10, atol=1e-14)


def test_what_changes_the_shape_is_refused_in_the_backward():
    x, y = batch("mlp")
    for rule in ("fa", "dfa"):
        model = falign.convert(build("mlp"), rule, example=x, transform=lambda error: error[:-1])
        with pytest.raises(RuntimeError, match=r"returned \(15, \d+\) of torch.float64, expected an error \(16, \d+\)"):
            gradients(model, x, y)


def test_what_needs_the_batch_is_refused_where_it_is_hidden():
    x, _ = batch("mlp")
    for rule, how in (("fa", {"transform": "centred"}), ("dfa", {"transform": "centred"}), ("probe", {})):
        model = falign.convert(build("mlp"), rule, example=x, **how)
        with pytest.raises(RuntimeError, match=r"take gradients by loss\.backward"):
            torch.vmap(lambda one, model=model: model(one[None])[0])(x)


def test_products_by_hand_cannot_take_it():
    model = nn.Sequential(nn.GRU(4, 5, batch_first=True))
    (line,) = falign.check(model, "fa", example=torch.randn(2, 3, 4), transform="signs")
    assert "transform= cannot reach the errors that autograd itself carries through '0.weight_ih_l0'" in line
    assert "make it an nn.Linear, or use a direct rule" in line
