"""The networks of --model: sizes, shapes, weights, and what is said of those that do not fit."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import falign
from falign.lab._models import ACTIVATIONS, ResidualBlock, ResNet, build
from falign.lab.config import ConfigError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(model: str, shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, **options) -> nn.Module:
    return build(model, shape=shape, classes=classes, **{"seed": 0, **options})


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_perceptron() -> None:
    model = made("mlp:784-30-20-10", activation="tanh")
    assert [name for name, _ in model.named_children()] == ["flatten", "fc1", "act1", "fc2", "act2", "fc3"]
    assert weights(model) == 785 * 30 + 31 * 20 + 21 * 10
    x = torch.randn(5, 1, 28, 28)
    state = model.state_dict()
    hidden = x.flatten(1)
    for number in (1, 2):
        hidden = torch.tanh(hidden @ state[f"fc{number}.weight"].mT + state[f"fc{number}.bias"])
    expected = hidden @ state["fc3.weight"].mT + state["fc3.bias"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    found = made("mlp:784-8-10", activation=activation).get_submodule("act1")
    assert isinstance(found, ACTIVATIONS[activation]().__class__)


def test_lenet_is_lenet_5() -> None:
    model = made("lenet")
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (6, 1, 5, 5),
        "conv2.weight": (16, 6, 5, 5),
        "fc1.weight": (120, 400),
        "fc2.weight": (84, 120),
        "fc3.weight": (10, 84),
    }
    assert weights(model) == 61_706


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        *(("lenet", shape) for shape in [(1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 16, 20), (1, 17, 12)]),
        *((name, shape) for name in ("resnet8", "resnet20", "residual:width=8") for shape in [(3, 32, 32), (1, 9, 5)]),
        *((name, (1, 28, 28)) for name in ("lenet-average", "lenet-norm")),
    ],
)
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_any_size_of_images(model: str, shape: tuple[int, int, int], rule: str) -> None:
    network, x = made(model, shape, classes=7), torch.randn(2, *shape)
    falign.convert(network, rule, example=x)
    output = network(x)
    assert output.shape == (2, 7)
    nn.functional.cross_entropy(output, torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_resnet_20_has_the_layers_and_weights_of_the_paper() -> None:
    model = made("resnet20", (3, 32, 32))
    layers = [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 20
    assert weights(model) == 269_722  # "0.27M" in table 6, batch norm included
    deviation = model.get_parameter("stage3.2.conv2.weight").std().item()
    assert deviation == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)


def test_the_shortcut_halves_by_leaving_out_pixels_and_widens_by_zeros() -> None:
    block = ResidualBlock(2, 4).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 6, 6)
    expected = torch.zeros(1, 4, 3, 3)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("model", ["mlp:784-16-10", "lenet", "resnet20"])
def test_weights_depend_on_the_seed_alone(model: str) -> None:
    torch.manual_seed(1)
    one = made(model)
    after = torch.rand(1)
    torch.manual_seed(2)
    other, third = made(model), made(model, seed=1)
    states = [network.state_dict() for network in (one, other, third)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "the caller's generator is left alone"


@pytest.fixture
def own() -> Iterator[ModuleType]:
    module = ModuleType("own_networks")
    sys.modules["own_networks"] = module
    yield module
    del sys.modules["own_networks"]


def test_own_factories_are_called_with_what_they_take(own: ModuleType) -> None:
    calls: list[dict] = []

    def both(shape: tuple[int, int, int], classes: int) -> nn.Module:
        calls.append({"shape": shape, "classes": classes})
        return nn.Flatten()

    def one(classes: int, width: int = 5) -> nn.Module:
        calls.append({"classes": classes, "width": width})
        return nn.Flatten()

    def none() -> nn.Module:
        calls.append({})
        return nn.Flatten()

    def any_of_them(**given: object) -> nn.Module:
        calls.append(given)
        return nn.Flatten()

    for factory in (both, one, none, any_of_them):
        setattr(own, factory.__name__, factory)
        made(f"own_networks:{factory.__name__}")
    full = {"shape": (1, 28, 28), "classes": 10}
    assert calls == [full, {"classes": 10, "width": 5}, {}, full]


def test_own_classes_and_nested_names_serve_as_factories(own: ModuleType) -> None:
    own.networks = type("networks", (), {"Net": ResNet})  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"own_networks:networks.Net cannot be called .*'channels'"):
        made("own_networks:networks.Net")
    own.networks.Net = nn.Identity
    assert isinstance(made("own_networks:networks.Net"), nn.Identity)


def test_own_modules_are_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "network_of_this_folder.py").write_text("from torch.nn import Flatten as network")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert isinstance(made("network_of_this_folder:network"), nn.Flatten)
    assert sys.path == path
    del sys.modules["network_of_this_folder"]


REFUSED = {
    "mlp:784-100-11": "to 11, but the data are 1×28×28 = 784 pixels in 10 classes: use mlp:784-100-10",
    "mlp:64-10": "use mlp:784-10",
    "mlp:784": "expected sizes like mlp:784-1000-10",
    "mlp:784-0-10": "expected sizes like",
    "mlp:784-x-10": "expected sizes like",
    "mlp:": "expected sizes like",
    "resnet18": "expected mlp:SIZES, lenet, lenet-average, lenet-norm, resnet8, resnet20, residual, gru, lstm, vit, "
    "gpt or package.module:factory",
    "": "expected mlp:SIZES",
    "no_such_module:make": "cannot be imported: ModuleNotFoundError",
    "math:no_such_function": "cannot be imported: AttributeError",
    "math:pi": "is a float, expected a function or class",
    "math:floor": "cannot be called with shape= and classes=, or without arguments",
    "own_networks:number": "returned a float, expected a torch.nn.Module",
    "own_networks:fails": "failed: ZeroDivisionError",
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_cannot_be_built_is_refused(model: str, own: ModuleType) -> None:
    own.fails = lambda: 1 // 0  # pyright: ignore[reportAttributeAccessIssue]
    own.number = lambda: 1.5  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError) as caught:
        made(model)
    assert REFUSED[model] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_too_small_for_lenet() -> None:
    with pytest.raises(ConfigError, match="at least 12×12, the data are 8×8"):
        made("lenet", (1, 8, 8))
