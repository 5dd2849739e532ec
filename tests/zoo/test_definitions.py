"""The definition by replaced operands is that of attention and recurrent networks written out by hand."""

import pytest
import torch
from definitions import ByFeedback, layerwise, through, weight_of
from entries import gradients_of, relative, wanting
from made_networks import ENTRIES
from torch import nn
from torch.nn import functional as F
from unrolled import unroll

pytestmark = pytest.mark.unchecked
BY_HAND = [
    entry
    for entry in ENTRIES
    if entry.family in ("attention", "recurrent")
    if not any(word in entry.name for word in ("kernel", "dropout"))
]


def parts_of(net: nn.Module) -> dict[str, tuple[str, slice]]:
    """{name of a product of ``unrolled``: (its parameter, its rows)}."""
    parts = {}
    for name, module in net.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            size = module.embed_dim
            for number, key in enumerate("qkv"):
                rows = slice(number * size, (number + 1) * size)
                fused = module.in_proj_weight is not None
                parts[dot + key] = (f"{dot}in_proj_weight", rows) if fused else (f"{dot}{key}_proj_weight", slice(None))
            parts[f"{dot}out"] = f"{dot}out_proj.weight", slice(None)
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            for key, _ in module.named_parameters(recurse=False):
                if key.startswith("weight"):
                    parts[dot + key.removeprefix("weight_")] = dot + key, slice(None)
    return parts


def feedback_of(net: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    return {n: 0.4 * torch.randn(weight_of(net, n).shape, generator=random, dtype=torch.float64) for n in names}


def own(net: nn.Module) -> list[str]:
    """Names of the parameters and layers that multiply."""
    inside = {name.rpartition(".weight")[0] for name, _ in parts_of(net).values()}
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and n not in inside]
    return [*dict.fromkeys(name for name, _ in parts_of(net).values()), *layers]


@pytest.mark.parametrize("entry", BY_HAND, ids=str)
def test_replaced_operands_are_the_products_by_hand(entry):
    net, x = entry.build()
    carriers = feedback_of(net, own(net))
    x = wanting(x, entry)
    _, loss, mode = layerwise(net, lambda net: entry.run(net, x), carriers)
    assert mode.carried == {}
    assert mode.used == {name for name in carriers if "weight" in name}
    came = gradients_of(net, x)

    net, x = entry.build()
    parts, x = parts_of(net), wanting(x, entry)

    def product(name, part, t, weight, bias):
        key, rows = parts[f"{name}.{part}".lstrip(".")]
        return through(F.linear(t.detach(), weight, bias), F.linear(t, carriers[key][rows]))

    unroll(net, product)
    layers = {name: matrix for name, matrix in carriers.items() if "weight" not in name}
    _, by_hand, mode = layerwise(net, lambda net: entry.run(net, x), layers)
    assert mode.carried == {}
    assert torch.allclose(loss, by_hand, rtol=1e-12, atol=0)
    error, where = relative(gradients_of(net, x), came)
    assert error <= 1e-12, (error, where)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_the_plain_gradient_is_that_of_weights_as_feedback(entry):
    net, x = entry.build()
    x = wanting(x, entry)
    entry.run(net, x).backward()
    came = gradients_of(net, x)
    net, _ = entry.build()
    inputs = wanting(x, entry)
    names = [n for n, p in net.named_parameters() if p.dim() > 1]
    mode = ByFeedback(net, {n: net.get_parameter(n).detach().clone() for n in names})
    with mode:
        loss = entry.run(net, inputs)
        mode.backward = True
        loss.backward()
    error, where = relative(gradients_of(net, inputs), came)
    assert error <= 1e-15, (error, where)
