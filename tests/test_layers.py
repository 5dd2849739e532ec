"""An error crosses every kind of layer as autograd carries it through that layer with B for its weight."""

import itertools

import pytest
import torch
from torch import nn

import falign
from falign.layers import KINDS, kind_of

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def crosses_as_autograd(layer, x, *args):
    """Compare error and gradient of the kind, taken with another weight, with autograd's on that weight."""
    layer, x = layer.double(), x.double().requires_grad_()
    matrix = torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    y = layer(x, *args)
    error = torch.randn_like(y)
    expected, weight_gradient = torch.autograd.grad(y, (x, layer.weight), error)
    kind = kind_of(layer)
    spec = kind.spec(layer)
    carried = kind.error(error, matrix, x.detach(), spec)
    assert carried.shape == x.shape
    assert torch.allclose(carried, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(kind.gradient(error, matrix, x.detach(), spec), weight_gradient, rtol=1e-11, atol=1e-11)

    # and through a converted model, where the layer keeps its weight and the error takes B
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(matrix))
    model = nn.ModuleDict({"layer": layer})
    model.forward = lambda x: model["layer"](x, *args)
    falign.convert(model, "fa", feedback={"layer": matrix})
    (delivered,) = torch.autograd.grad(model(x), x, error)
    assert torch.allclose(delivered, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 3, 4, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    crosses_as_autograd(nn.Linear(5, 3, bias=bias), torch.randn(shape))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [3, 2])
def test_convolution(dims, stride, padding, dilation, groups, kernel):
    if padding == "same" and stride > 1:
        pytest.skip("PyTorch has no strided convolution of the same size")
    layer = CONVOLUTIONS[dims](4, 6, kernel, stride, padding, dilation, groups)
    crosses_as_autograd(layer, torch.randn(2, 4, *(7, 6, 5)[:dims]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("padding", "stride", "kernel"), [(2, 2, 3), ("same", 1, 3), ("same", 1, 4), (0, 1, 3)])
def test_padding_modes(mode, dims, padding, stride, kernel):
    layer = CONVOLUTIONS[dims](2, 4, kernel, stride, padding, padding_mode=mode, groups=2)
    crosses_as_autograd(layer, torch.randn(2, 2, *(7, 6, 5)[:dims]))


def test_uneven_kernels_and_padding():
    crosses_as_autograd(nn.Conv2d(3, 4, (2, 5), (2, 1), (1, 3), (3, 1)), torch.randn(2, 3, 9, 8))
    crosses_as_autograd(nn.Conv2d(3, 4, (2, 5), padding=(1, 0), padding_mode="reflect"), torch.randn(2, 3, 9, 8))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("stride", "padding", "output_padding", "dilation"), [(1, 0, 0, 1), (2, 1, 1, 1), (3, 2, 2, 2), (1, 1, 1, 2)]
)
def test_transposed_convolution(dims, groups, stride, padding, output_padding, dilation):
    layer = TRANSPOSED[dims](4, 6, 3, stride, padding, output_padding, groups, dilation=dilation)
    crosses_as_autograd(layer, torch.randn(2, 4, *(5, 4, 3)[:dims]))


def test_transposed_convolution_with_an_output_size():
    crosses_as_autograd(nn.ConvTranspose2d(3, 4, 3, 2), torch.randn(2, 3, 5, 5), [12, 11])


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3, 2)])
def test_unbatched_images(layer):
    crosses_as_autograd(layer, torch.randn(3, 6, 6))


def test_channels_last_memory():
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    crosses_as_autograd(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), x)


@pytest.mark.parametrize("layer", [nn.Linear(40, 30), nn.Conv2d(40, 30, 3, groups=2), nn.ConvTranspose2d(40, 30, 4, 2)])
def test_scale_is_the_gain_of_the_errors_norm(layer):
    """E|error carried|² = scale² |error|², for every kind (borders aside)."""
    kind = kind_of(layer)
    x = torch.randn(8, 40, *(() if kind is KINDS["linear"] else (20, 20)))
    y = layer(x)
    error = torch.randn_like(y)
    gains = []
    for seed in range(10):
        model = falign.convert(nn.Sequential(layer), "fa", seed=seed, scale=2.0)
        carried = kind.error(error, falign.feedback_state(model)["0"], x, kind.spec(layer))
        gains.append(float(carried.square().sum() / error.square().sum()))
        falign.revert(model)
    assert sum(gains) / len(gains) == pytest.approx(4.0, rel=0.1)


def test_a_forward_of_its_own_is_no_known_kind():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert kind_of(Scaled(3, 3)) is None
    assert kind_of(Named(3, 3)) is KINDS["linear"]
    assert kind_of(nn.LayerNorm(3)) is None


def test_every_mode_of_the_layer_classes_is_covered():
    names = {cls.__name__ for kind in KINDS.values() for cls in kind.types}
    expected = {"Linear"} | {f"Conv{t}{d}d" for t, d in itertools.product(("", "Transpose"), (1, 2, 3))}
    assert names == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_sums_over_the_weights_of_each_neuron(transposed, groups):
    """⟨W, ∂z/∂W⟩ of one channel is its output, ⟨W, ·⟩ out of one channel what it adds to the whole output."""
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, groups=groups, bias=False).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    kind = kind_of(layer)
    error = torch.randn_like(layer(x))
    (gradient,) = torch.autograd.grad((layer(x) * error).sum(), layer.weight)
    product = layer.weight.detach() * gradient
    torch.testing.assert_close(kind.incoming(product, layer), (layer(x) * error).sum((0, 2, 3)).detach())
    alone = [
        float((layer(x * (torch.arange(4) == channel)[:, None, None]) * error).sum().detach()) for channel in range(4)
    ]
    torch.testing.assert_close(kind.outgoing(product, layer), torch.tensor(alone, dtype=torch.float64))
