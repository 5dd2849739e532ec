"""Recurrent networks and transformers of --model: what they compute, and what is said of sizes that do not fit."""

import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import falign
from falign import ALL_RULES
from falign.lab import _models
from falign.lab._batches import label_loss
from falign.lab._models import CharacterTransformer, Recurrent, VisionTransformer, build
from falign.lab._trust import ask
from falign.lab._validate import sizes
from falign.lab.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES, TEXT = (3, 8, 4), (12,)
CLASSES = 7


def made(model: str, shape: tuple[int, ...], **options) -> nn.Module:
    return build(model, shape=shape, classes=CLASSES, **{"seed": 0, **options})


def batch(shape: tuple[int, ...], number: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        return torch.randint(CLASSES, (number, *shape), generator=generator)
    return torch.randn(number, *shape, generator=generator)


#: Every model on the data that suit it.
FITTING = [
    *((f"{kind}:hidden=6,layers=2", shape) for kind in ("gru", "lstm") for shape in (IMAGES, TEXT)),
    ("vit:width=8,blocks=2,heads=2", IMAGES),
    ("gpt:width=8,blocks=2,heads=2", TEXT),
]


@pytest.mark.parametrize(("model", "shape"), FITTING)
def test_shapes_and_gradients(model: str, shape: tuple[int, ...]) -> None:
    network = made(model, shape)
    output = network(batch(shape))
    assert output.shape == ((2, CLASSES) if shape == IMAGES else (2, *TEXT, CLASSES))
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(("model", "shape"), FITTING)
def test_weights_depend_on_the_seed_alone(model: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    one, after = made(model, shape).state_dict(), torch.rand(1)
    torch.manual_seed(2)
    other, third = made(model, shape).state_dict(), made(model, shape, seed=1).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "the caller's generator is left alone"


def test_an_image_is_read_row_by_row() -> None:
    network, x = made("gru:hidden=6", IMAGES).double(), batch(IMAGES).double()
    assert isinstance(network, Recurrent)
    state = torch.zeros(2, 6, dtype=torch.float64)
    cell = nn.GRUCell(12, 6).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in network.rnn.state_dict().items()})
    for row in range(8):
        state = cell(torch.cat([x[:, channel, row] for channel in range(3)], 1), state)
    torch.testing.assert_close(network(x), network.head(state))


def written_out(block: nn.Module, x: Tensor, *, causal: bool) -> Tensor:
    """A block of two heads, by its definition: softmax(q kᵀ / √d) v position by position."""
    y, attention = block.norm1(x), block.attention
    mixed = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (layer(y)[..., part] for layer in (attention.query, attention.key, attention.value))
        scores = q @ k.mT / 2
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        mixed.append(scores.softmax(-1) @ v)
    x = x + attention.out(torch.cat(mixed, -1))
    return x + block.fc2(nn.functional.gelu(block.fc1(block.norm2(x))))


def test_the_transformer_of_images_by_its_definition() -> None:
    network, x = (
        made("vit:width=8,blocks=2,heads=2,patch=2", IMAGES, activation="gelu").double(),
        batch(IMAGES).double(),
    )
    assert isinstance(network, VisionTransformer)
    weight = network.patches.weight.flatten(1)
    patches = [
        x[:, :, row : row + 2, column : column + 2].flatten(1) @ weight.mT + network.patches.bias
        for row in range(0, 8, 2)
        for column in range(0, 4, 2)
    ]
    expected = torch.stack(patches, 1) + network.positions.embedding.weight
    for block in network.blocks:
        expected = written_out(block, expected, causal=False)
    torch.testing.assert_close(network(x), network.head(network.norm(expected).mean(1)))


def test_the_transformer_of_texts_by_its_definition() -> None:
    network, x = made("gpt:width=8,blocks=2,heads=2", TEXT, activation="gelu").double(), batch(TEXT)
    assert isinstance(network, CharacterTransformer)
    expected = network.characters.weight[x] + network.positions.embedding.weight
    for block in network.blocks:
        expected = written_out(block, expected, causal=True)
    torch.testing.assert_close(network(x), network.head(network.norm(expected)))


@pytest.mark.parametrize("model", ["gru:hidden=6", "lstm:hidden=6", "gpt:width=8,heads=2"])
def test_no_character_is_seen_before_its_time(model: str) -> None:
    network, x = made(model, TEXT).eval(), batch(TEXT)
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % CLASSES
    before, after = network(x), network(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize(
    ("sides", "patch"), [((8, 8), 2), ((28, 28), 7), ((32, 32), 8), ((29, 29), 1), ((3, 3), 1), ((12, 8), 2)]
)
def test_the_usual_patch_covers_the_image_by_four_times_four_or_more(sides: tuple[int, int], patch: int) -> None:
    assert made("vit:width=4,blocks=1,heads=1", (1, *sides)).get_submodule("patches").kernel_size == (patch, patch)


@pytest.mark.parametrize("rule", [name for name, rule in ALL_RULES.items() if rule.trained_layers is None])
@pytest.mark.parametrize(("model", "shape"), FITTING)
def test_every_rule_has_the_gradients_of_its_definition(model: str, shape: tuple[int, ...], rule: str) -> None:
    network, x = made(model, shape).double(), batch(shape)
    x = x.double() if shape == IMAGES else x
    if ALL_RULES[rule].answers_noise and model.startswith(("gru", "lstm")):
        assert "gives noise to layers" in falign.check(network, rule, example=x)[0]
        return
    falign.convert(network, rule, example=x)
    y = torch.zeros(x.shape if shape == TEXT else len(x), dtype=torch.int64)
    with falign.targets(network, y):
        label_loss(network(x), y).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert falign.verify(network, x, lambda output: label_loss(output, y), target=y)


@pytest.mark.parametrize(
    ("model", "shape"), [*FITTING, ("gru:hidden=9", IMAGES), ("lstm:hidden=9", TEXT), ("vit:patch=4,width=8", IMAGES)]
)
def test_sizes_are_refused_by_the_number_of_weights_that_there_would_be(
    model: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(parameter.numel() for parameter in made(model, shape).parameters())
    monkeypatch.setattr(_models, "available", lambda: 0)
    with pytest.raises(ConfigError, match=r"has ([0-9,]+) weights, for which a run needs") as caught:
        made(model, shape)
    said = int(re.findall(r"has ([0-9,]+) weights", str(caught.value))[0].replace(",", ""))
    assert 0.8 * weights <= said <= weights


def test_sizes_that_are_not_given_are_the_defaults() -> None:
    assert sizes("gpt") == {"width": 64, "blocks": 4, "heads": 4}
    assert sizes("gpt:heads=2,width=6") == {"width": 6, "blocks": 4, "heads": 2}
    assert sizes("lstm:layers=3") == {"hidden": 64, "layers": 3}


REFUSED = {
    "gru:": "'gru:', expected gru, or sizes like gru:hidden=64,layers=1",
    "gru:64": "expected gru, or sizes like",
    "gru:hidden=0": "whole number of at least 1",
    "gru:hidden=-3": "whole number",
    "gru:hidden=1.5": "whole number",
    "gru:hidden=٣": "whole number",
    "lstm:hidden=8,hidden=9": "given once or left out",
    "lstm:hidden=8,": "expected lstm, or sizes like lstm:hidden=64,layers=1",
    "lstm: hidden=8": "expected lstm",
    "lstm:layers=1001": "has 1,001 layers, expected at most 1,000: use fewer",
    "lstm:hidden=" + "9" * 13: "no memory holds that",
    "vit:depth=3": "sizes like vit:patch=4,width=64,blocks=4,heads=4",
    "vit:width=30": "has a width of 30 for 4 heads, which share it: use a multiple of 4",
    "vit:patch=3": "patches of 3×3 pixels, of which no whole number covers images of 8×4: use a patch that",
    "vit:patch=8": "patches of 8×8 pixels",
    "vit:blocks=" + "9" * 12: "expected at most 1,000",
    "vit:width=" + "4" * 11: "weights, for which a run needs",
    "gpt": "is for text, and the data are images: use vit, gru or lstm",
    "gpt:context=3": "sizes like gpt:width=64,blocks=4,heads=4",
    "GRU": "expected mlp:SIZES, lenet, lenet-average, lenet-norm, resnet8, resnet20, residual, gru, lstm, vit, gpt or "
    "package.module:factory",
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_cannot_be_built_is_refused(model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(model, IMAGES)
    assert REFUSED[model] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["mlp:12-7", "lenet", "resnet20", "vit:width=8"])
def test_networks_for_images_are_refused_for_texts(model: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--model {model} is for images, and the data are a text: use gpt, gru or lstm"
    ):
        made(model, TEXT)


@pytest.fixture
def own() -> Iterator[ModuleType]:
    module = ModuleType("gpt")
    sys.modules["gpt"] = module
    yield module
    del sys.modules["gpt"]


def test_a_module_of_the_users_may_be_called_gpt(own: ModuleType, tmp_path) -> None:
    own.make = lambda shape, classes: nn.Embedding(classes, *shape)  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(made("gpt:make", TEXT), nn.Embedding)
    ask("gpt:width=8", None, tmp_path)  # falign's own code needs no permission
    with pytest.raises(Exception, match="names code to run, gpt:make"):
        ask("gpt:make", None, tmp_path)
