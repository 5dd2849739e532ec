"""Which neurons are which inputs of the next layer, and what is said where that cannot be."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import falign
from falign.measure.law import follow


class Between(nn.Module):
    """A linear map of 12 neurons, something, and another; or two convolutions of 4 channels."""

    def __init__(self, what: Callable[[Tensor], Tensor], first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.what = first, second, what

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.what(self.first(x)))


def between(what: Callable[[Tensor], Tensor], features: int = 12) -> Between:
    return Between(what, nn.Linear(5, 12), nn.Linear(features, 3))


def maps(what: Callable[[Tensor], Tensor], channels: int = 4) -> Between:
    return Between(what, nn.Conv2d(2, 4, 3), nn.Conv2d(channels, 3, 1))


VECTOR, IMAGE = torch.randn(6, 5), torch.randn(3, 2, 8, 8)

HOMOGENEOUS = {
    "relu": F.relu,
    "relu in place": lambda z: F.relu_(z),
    "leaky relu": lambda z: F.leaky_relu(z, 0.2),
    "abs": torch.abs,
    "random slopes": lambda z: F.rrelu(z, training=True),
    "prelu": lambda z: F.prelu(z, torch.tensor([0.1])),
    "threshold at zero": lambda z: F.threshold(z, 0, 0),
    "clamp at zero": lambda z: z.clamp(min=0),
    "mask": lambda z: z * (z > 0.5),
    "where": lambda z: torch.where(z > 0, z, 0.1 * z),
    "where or zero": lambda z: torch.where(z > 0, z, 0.0),
    "masked fill": lambda z: z.masked_fill(z < 0, 0.0),
    "maximum of itself": lambda z: torch.maximum(z, 0.3 * z),
    "maximum with zero": lambda z: torch.maximum(z, torch.tensor(0.0)),
    "sum with itself": lambda z: 0.6 * z + 0.4 * z.abs(),
    "dropout": lambda z: F.dropout(z, 0.5),
    "scaled": lambda z: 3 * z / torch.rand(12),
    "cast": lambda z: z.half().float(),
    "logged": lambda z: z * (1 + 0 * z.detach().mean().item()),
    "reshaped": lambda z: z.view(6, 3, 4).permute(1, 0, 2).transpose(0, 1).flatten(1),
    "shape": lambda z: z.unsqueeze(0).expand(2, -1, -1)[1].clone().contiguous(),
    "in place on a view": lambda z: z[:, :3].mul_(2) is None or z,
}


@pytest.mark.parametrize("what", HOMOGENEOUS.values(), ids=list(HOMOGENEOUS))
def test_gates_keep_every_neuron(what):
    found = follow(between(what), VECTOR)
    assert found.reasons == {"second": "its output is an output of the model"}
    (connection,) = found.connections
    assert (connection.source, connection.target) == ("first", "second")
    assert connection.columns.dtype == torch.int64
    assert connection.columns.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("what", "columns"),
    [
        (lambda z: z.flip(1), list(range(11, -1, -1))),
        (lambda z: z[:, 2:7], [2, 3, 4, 5, 6]),
        (lambda z: torch.cat([z[:, 5:6], z[:, :2]], 1), [5, 0, 1]),
        (lambda z: z[:, torch.tensor([4, 4, 0])], [4, 4, 0]),
        (lambda z: z.chunk(3, 1)[1], [4, 5, 6, 7]),
        (lambda z: F.pad(z, (1, 2)), [-1, *range(12), -1, -1]),
        (lambda z: torch.cat([torch.ones(6, 2), z[:, :1]], 1), [-1, -1, 0]),
    ],
)
def test_what_moves_neurons_is_followed(what, columns):
    found = follow(between(what, len(columns)), VECTOR)
    assert found.connections[0].columns.tolist() == columns
    assert "first" not in found.reasons


@pytest.mark.parametrize(
    "what",
    [
        lambda z: F.max_pool2d(z, 2), lambda z: F.avg_pool2d(z, 3, 1, padding=1), lambda z: F.adaptive_avg_pool2d(z, 2),
        lambda z: F.adaptive_max_pool2d(z, 2), lambda z: F.dropout2d(z, 0.5), lambda z: F.interpolate(z, size=9),
        lambda z: F.interpolate(z, scale_factor=2, mode="bilinear"), lambda z: F.pad(z, (1, 1, 1, 1)),
        lambda z: F.pad(z, (1, 1, 1, 1), mode="reflect"), lambda z: z.to(memory_format=torch.channels_last).relu(),
        lambda z: z.mean((2, 3), keepdim=True), lambda z: z.amax((2, 3), keepdim=True), lambda z: z.roll(1, 2),
        lambda z: z[..., ::2],
    ],
)  # fmt: skip
def test_channels_stay_themselves_over_positions(what):
    found = follow(maps(what), IMAGE)
    assert found.connections[0].columns.tolist() == [0, 1, 2, 3]
    assert "first" not in found.reasons


def test_flattened_channels_are_several_features_each():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 3))
    assert follow(model, IMAGE).connections[0].columns.tolist() == [k for k in range(4) for _ in range(4)]
    shuffled = maps(lambda z: F.pixel_shuffle(z, 2), 1)
    assert "not the same inputs" in follow(shuffled, IMAGE).reasons["first"]


REASONS = {
    "tanh is not homogeneous": torch.tanh,
    "sigmoid is not homogeneous": torch.sigmoid,
    "gelu is not homogeneous": F.gelu,
    "softplus is not homogeneous": F.softplus,
    "silu (swish) is not homogeneous": F.silu,
    "elu (or selu, celu) is not homogeneous": F.elu,
    "a clipped activation (hardtanh, relu6) is not homogeneous": F.relu6,
    "a clipped activation (clamp) is not homogeneous": lambda z: z.clamp(0, 1),
    "threshold is not homogeneous": lambda z: F.threshold(z, 1, 0),
    "softmax is not homogeneous": lambda z: z.softmax(1),
    "layer normalisation is not homogeneous": lambda z: F.layer_norm(z, (12,)),
    "its output is added to another (residual connection)": lambda z: z.relu() + torch.randn(6, 12),
    "a number is added to its output": lambda z: z + 1,
    "it is multiplied by an activation of its own": lambda z: z * z.relu(),
    "div by it is not homogeneous": lambda z: torch.ones(6, 12) / z,
    "it is multiplied by a matrix outside the layers": lambda z: z @ torch.randn(12, 12),
    "it is written into another tensor": lambda z: torch.zeros(6, 12).copy_(z),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_are_said_in_words(reason):
    found = follow(between(REASONS[reason]), VECTOR)
    assert found.reasons["first"] == reason
    if "matrix" not in reason:  # the law is lost, but not the way of the neurons
        assert found.connections[0].columns.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("what", "features", "reason"),
    [
        (lambda z: z.sum(1, keepdim=True), 1, "sum mixes its neurons"),
        (lambda z: F.max_pool1d(z[:, None], 3)[:, 0], 4, "mixes its neurons"),
        (lambda z: z.cumsum(1), 12, "cumsum is not homogeneous"),
        (lambda z: torch.where(torch.rand(6, 12) > 0.5, z, 2.0), 12, "not the same inputs"),
        (lambda z: z.view(4, 18)[:, :12], 12, "not the same inputs"),
    ],
)
def test_mixed_neurons_are_not_followed(what, features, reason):
    assert reason in follow(between(what, features), VECTOR).reasons["first"]


def test_a_neuron_that_is_dead_on_the_example_is_followed():
    for what in (F.relu, lambda z: z.masked_fill(z < 0, 0), lambda z: torch.where(z < 0, 0, z)):
        model = between(what)
        with torch.no_grad():
            model.first.bias[3] = -100
        assert follow(model, VECTOR).connections[0].columns.tolist() == list(range(12))


def test_what_is_detached_feeds_nothing():
    found = follow(between(torch.Tensor.detach), VECTOR)
    assert found.connections == ()
    assert "first" not in found.reasons


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head, self.side = nn.Linear(8, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.one(x).relu()
        y = x + self.two(x)
        z = self.three(y.relu()).relu()
        return {"out": self.head(torch.cat([z, z], 1)), "side": self.side(z)}


def test_a_residual_network_with_two_heads():
    found = follow(Residual(), VECTOR)
    pairs = {(c.source, c.target): c.columns.tolist() for c in found.connections}
    assert pairs == {
        ("one", "two"): [0, 1, 2, 3],
        ("one", "three"): [0, 1, 2, 3],
        ("two", "three"): [0, 1, 2, 3],
        ("three", "head"): [0, 1, 2, 3, 0, 1, 2, 3],
        ("three", "side"): [0, 1, 2, 3],
    }
    assert [c.target for c in found.targets("three")] == ["head", "side"]
    assert "residual" in found.reasons["one"]
    assert "residual" in found.reasons["two"]
    assert "three" not in found.reasons
    assert found.outputs == {"head", "side"}
    assert found.neurons == {"one": 4, "two": 4, "three": 4, "head": 3, "side": 2}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.two(self.one(x).relu()).relu()).relu())


def test_layers_that_the_law_cannot_be_of():
    reasons = follow(Twice(), VECTOR).reasons
    assert reasons["two"] == "it runs twice in a pass"
    assert reasons["one"] == "layer 'two', which it feeds, runs twice in a pass"
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    reasons = follow(model, VECTOR).reasons
    assert reasons["0"] == "layer '2', which it feeds, has a parametrised weight"
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 7, bias=False))
    model[3].weight = model[0].weight
    reasons = follow(model, torch.zeros(2, 3, dtype=torch.int64)).reasons
    assert reasons["0"] in ("it shares a parameter with '3'", "it looks its input up")
    assert reasons["1"] == "layer '3', which it feeds, shares a parameter with '0'"


def test_batch_normalisation_is_a_target_and_a_source_in_training_alone():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    found = follow(model, IMAGE)
    assert [(c.source, c.target) for c in found.connections] == [("0", "1"), ("1", "4")]
    assert set(found.reasons) == {"4"}
    assert "running statistics" in follow(model.eval(), IMAGE).reasons["0"]


class Activated(nn.BatchNorm2d):
    """A normalisation with an activation in its forward, as of image libraries."""

    def __init__(self, channels: int, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__(channels)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(super().forward(x))


@pytest.mark.parametrize(("what", "reason"), [(F.relu, None), (F.hardswish, "hard-swish is not homogeneous")])
def test_an_activation_within_a_normalisation_is_looked_at(what, reason):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Activated(4, what), nn.Flatten(), nn.Linear(144, 3))
    found = follow(model, IMAGE)
    assert [(c.source, c.target) for c in found.connections] == [("0", "1"), ("1", "3")]
    assert found.reasons.get("1") == reason


def test_it_leaves_no_trace():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 3))
    falign.convert(model, "brsf")
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    passes = model[4].feedback.passes.clone()
    follow(model, VECTOR)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(passes, model[4].feedback.passes)
    assert model.training


def test_an_example_that_does_not_run_is_refused_and_leaves_no_hook():
    model = between(F.relu)
    with pytest.raises(ValueError, match="the model does not run on the example: RuntimeError"):
        follow(model, torch.randn(2, 3))
    assert not model.first._forward_hooks
    assert not model.first._forward_pre_hooks
