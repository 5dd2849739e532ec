"""The mirroring phase of weight mirrors: layers are given noise, and their feedback learns from their answers."""

import torch
from torch import Tensor, nn

from falign._validation import whole_number
from falign._wiring import converted, feedbacks
from falign.layers import KINDS, Layer
from falign.rules import WeightMirror


def mirror(
    model: nn.Module, *, passes: int = 1, batch: int = 256, generator: torch.Generator | None = None
) -> nn.Module:
    """Turn the feedback of a model under ``wm`` towards its weights, by their answers to noise.

    Every layer by itself: ``B ← (1 - rate) B + rate · mean(y xᵀ)`` with x ~ N(0, 1) and y its answer without bias.
    Nothing but B changes: weights, gradients, running statistics and modes stay.

    Args:
        model: converted to ``wm``, or a part of such a model.
        passes: how often.
        batch: samples of noise in a pass; a convolution is given images that its kernel just covers a few times.
        generator: of the noise, on the weights' device; PyTorch's own by default. Processes that train together pass
            generators of one seed, or their feedback differs.

    Returns:
        The model.

    Raises:
        ValueError: the model is not converted to ``wm``, or a number is out of range.
    """
    rules = {wiring.rule.name: wiring.rule for wiring in converted(model)}
    if not all(isinstance(rule, WeightMirror) for rule in rules.values()):
        raise ValueError(f"mirror is for rule 'wm', the model is converted to {', '.join(map(repr, rules))}")
    for name, value in (("passes", passes), ("batch", batch)):
        if whole_number(name, value) < 1:
            raise ValueError(f"{name} is {value}, expected a whole number of at least 1")
    for name, part in feedbacks(model).items():
        layer = model.get_submodule(name)
        rule = part.wiring.rule
        assert isinstance(rule, WeightMirror)
        for _ in range(passes):
            with torch.no_grad():
                part.matrix.lerp_(_answer(layer, part.kind, batch, generator).to(part.matrix.dtype), rule.rate)
    return model


def _answer(layer: Layer, kind: str, batch: int, generator: torch.Generator | None) -> Tensor:
    """Correlate a layer's answer to noise with the noise: W on average, of its shape."""
    table, spec, weight = KINDS[kind], KINDS[kind].spec(layer), layer.weight
    shape: tuple[int, ...] = (batch, getattr(layer, "in_features", 0))
    if table.channel_first:
        sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        shape = (batch, layer.in_channels, *(size * dilation + 2 * stride for size, dilation, stride in sizes))
    x = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
    y = type(layer).forward(layer, x)  # without its hooks: nothing is cut or delivered
    if layer.bias is not None:
        y = y - (layer.bias.view(-1, *[1] * (y.dim() - 2)) if table.channel_first else layer.bias)
    # How many pairs of noise and answer each weight is between: at a border not all positions of a kernel are inside.
    pairs = table.gradient(torch.ones_like(y), weight, torch.ones_like(x), spec)
    return table.gradient(y, weight, x, spec) / pairs.clamp(min=1)
