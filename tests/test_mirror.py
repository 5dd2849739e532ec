"""Weight mirrors: what noise teaches feedback of the weights."""

import pytest
import torch
from torch import nn

import falign
from cases import batch, build, step
from falign.rules import WeightMirror


def cosine(one, other):
    return float((one * other).sum() / one.norm() / other.norm())


LAYERS = {
    "linear": lambda: nn.Linear(20, 12),
    "conv1d": lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(2, 4, (2, 3, 1), bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_answers_to_noise_are_the_weights_on_average(kind):
    """The mean over passes is W to its standard error; each weight by itself is unbiased, at borders too."""
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    model = falign.convert(nn.Sequential(layer), WeightMirror(rate=1.0))
    answers = []
    for _ in range(60):
        falign.mirror(model, batch=100)
        answers.append(falign.feedback_state(model)["0"])
    drawn = torch.stack(answers)
    errors = (drawn.mean(0) - layer.weight.detach()) / (drawn.std(0) / 60**0.5)
    assert cosine(drawn.mean(0), layer.weight.detach()) > 0.99
    assert float(errors.square().mean()) == pytest.approx(1, abs=0.35)


def test_passes_turn_feedback_towards_the_weights_and_change_nothing_else():
    model, (x, y) = build("conv", "wm"), batch("conv")
    step(model, x, y)
    before = {name: value.clone() for name, value in model.state_dict().items() if "feedback" not in name}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    def angles():
        return [
            cosine(part, model.get_submodule(n).weight.detach()) for n, part in falign.feedback_state(model).items()
        ]

    start = angles()
    falign.mirror(model, passes=60)
    assert max(map(abs, start)) < 0.5
    assert min(angles()) > 0.95
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_a_pass_is_a_moving_mean():
    model = falign.convert(nn.Sequential(nn.Linear(5, 3)).double(), WeightMirror(rate=0.25))
    before, weight = falign.feedback_state(model)["0"], model[0].weight.detach()
    falign.mirror(model, batch=7, generator=torch.Generator().manual_seed(3))
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = 0.75 * before + 0.25 * (x @ weight.T).T @ x / 7
    torch.testing.assert_close(falign.feedback_state(model)["0"], expected, rtol=1e-12, atol=1e-14)


def test_it_is_in_the_state():
    model = falign.mirror(build("mlp", "wm"), passes=3)
    other = build("mlp", "wm", seed=4)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(b, falign.feedback_state(other)[name]) for name, b in falign.feedback_state(model).items())


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("make", "how", "said"),
    [
        (lambda: build("mlp"), {}, "is not converted"),
        (lambda: build("mlp", "fa"), {}, "mirror is for rule 'wm', the model is converted to 'fa'"),
        (lambda: build("mlp", "wm"), {"passes": 0}, "passes is 0, expected a whole number of at least 1"),
        (lambda: build("mlp", "wm"), {"batch": -3}, "batch is -3"),
    ],
)
def test_what_cannot_be_is_said(make, how, said):
    with pytest.raises(ValueError, match=said):
        falign.mirror(make(), **how)


def test_products_by_hand_do_not_answer_noise():
    (line,) = falign.check(nn.Sequential(nn.LSTM(3, 4)), "wm", example=torch.randn(5, 2, 3))
    assert "rule 'wm' gives noise to layers, and '0.weight_ih_l0' is multiplied outside one" in line
