"""What carries the error is seen where it happens, by whatever operation a weight is used."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import falign
from cases import DIRECT, RULES, batch, build, loss_of


class Middle(nn.Module):
    """A layer, something in the middle, a layer; ``use`` says what."""

    def __init__(self, use):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.matrix, self.gain = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.queries = nn.Parameter(torch.randn(1, 8))
        self.pair, self.rows = nn.Bilinear(8, 8, 8), nn.EmbeddingBag(11, 8, mode="sum")
        self.memory, self.cell = nn.LSTM(8, 8, batch_first=True, num_layers=2), nn.GRUCell(8, 8)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.use = use

    def forward(self, x):
        return self.last(self.use(self, torch.tanh(self.first(x))))


PARTS = ("matrix", "gain", "queries", "pair", "rows", "memory", "cell", "attention")

CARRIED = {
    "a product": (lambda m, h: h @ m.matrix, {"matrix"}),
    "einsum": (lambda m, h: torch.einsum("ni,oi->no", h, m.matrix), {"matrix"}),
    "a functional layer": (lambda m, h: F.linear(h, m.inner.weight), {"inner.weight"}),
    "layer.forward": (lambda m, h: m.inner.forward(h), {"inner.weight"}),
    "a scaled weight": (lambda m, h: F.linear(h, 3 * m.inner.weight.double().float()), {"inner.weight"}),
    "a tied weight": (lambda m, h: F.linear(m.inner(h), m.inner.weight.T), {"inner.weight"}),
    "a merged weight": (lambda m, h: h @ (m.matrix + m.queries.T @ m.gain[None]), {"matrix", "queries", "gain"}),
    "a masked weight": (lambda m, h: h @ (m.matrix * torch.ones(8, 8).tril()), {"matrix"}),
    "a vector": (lambda m, h: h * (h @ m.gain)[:, None], set()),  # what a product with a number's error leaves
    "broadcast and sum": (lambda m, h: (h[:, None] * m.matrix).sum(-1), {"matrix"}),
    "broadcast and mean": (lambda m, h: (h[:, :, None] * m.matrix).mean(1), {"matrix"}),
    "bilinear": (lambda m, h: m.pair(h, h), {"pair.weight"}),
    "grouped": (lambda m, h: torch.bmm(h.view(2, -1, 8), m.matrix.expand(2, 8, 8)).view(-1, 8), {"matrix"}),
    "distances": (lambda m, h: torch.cdist(h, m.matrix), {"matrix"}),
    "a convolution": (lambda m, h: F.conv1d(h[:, None], m.matrix[:1, None, :3], padding=1)[:, 0], {"matrix"}),
    "fused recurrence": (lambda m, h: m.memory(h[:, None])[0][:, 0], {"memory.weight_ih_l1", "memory.weight_ih_l0"}),
    "a cell": (lambda m, h: m.cell(h), {"cell.weight_ih"}),
    "attention": (lambda m, h: m.attention(h[None], h[None], h[None])[0][0], {"attention.in_proj_weight"}),
}

EXACT = {
    "the layer itself": lambda m, h: m.inner(h),
    "recomputed": lambda m, h: checkpoint(m.inner, h, use_reentrant=False),
    "a gain and a shift": lambda m, h: h * m.gain + m.queries,
    "a normalisation": lambda m, h: m.norm(h),
    "one written by hand": lambda m, h: m.gain * (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True) + m.queries,
    "root mean square": lambda m, h: m.gain * (h * (h.square().mean(1, keepdim=True) + 1e-6).rsqrt()),
    "learned queries": lambda m, h: h + m.inner(m.norm(m.queries)),
    "mixing by softmax": lambda m, h: h * m.gain.softmax(0)[0] + h.relu() * m.gain.softmax(0)[1],
    "products of activities": lambda m, h: F.scaled_dot_product_attention(h[None], m.inner(h)[None], h[None])[0],
    "the rows of an embedding": lambda m, h: h + m.rows(torch.arange(len(h))[:, None] % 11),
}  # fmt: skip


def data(seed=5):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(6, 9, generator=random), torch.randint(5, (6,), generator=random)


def middle(use, rule=None):
    torch.manual_seed(1)
    model = Middle(use)
    if rule is not None:
        falign.convert(model, rule, skip=PARTS)
    return model


@pytest.mark.parametrize("rule", [None, "fa", "usf", "adafa"])
@pytest.mark.parametrize("name", CARRIED)
def test_what_carries_is_listed(name, rule):
    use, expected = CARRIED[name]
    x, y = data()
    model = middle(use, rule)
    found = falign.transport(model, x, lambda output: loss_of(output, y))
    assert set(found) >= expected, found
    if rule is not None:
        assert not {"first.weight", "last.weight"} & set(found)
        verified = falign.verify(model, x, lambda output: loss_of(output, y))
        allowed = any(part.split(".")[0] in PARTS for part in expected)  # skip= named them
        assert bool(verified) == (allowed or not expected)
        assert all(name in str(verified) for name in verified.transported)


@pytest.mark.parametrize("rule", ["fa", "kp", "brsf"])
@pytest.mark.parametrize("name", EXACT)
def test_what_passes_exactly_is_not(name, rule):
    x, y = data(6)
    model = middle(EXACT[name], rule)
    assert falign.transport(model, x, lambda output: loss_of(output, y)) == {}
    assert falign.verify(model, x, lambda output: loss_of(output, y))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["mlp", "conv", "residual", "sequence"])
def test_no_rule_carries_by_a_weight(case, rule):
    model, (x, y) = build(case, rule), batch(case)
    found = falign.transport(model, x, lambda output: loss_of(output, y), target=y)
    weights = {name for name, p in model.named_parameters() if p.dim() > 1 and "feedback" not in name}
    below = {"conv": "0.weight", "sequence": "0.weight"}.get(case, "0.weight")
    assert set(found) == (weights - {below} if rule == "bp" else set())
    assert str(found) == "no parameter carried the error" or "carried the error in" in str(found)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, orthogonal])
@pytest.mark.parametrize("rule", ["fa", "usf", "dfa"])
def test_what_a_weight_is_made_of_is_its_own_affair(wrap, rule):
    """From the gradient of a weight to the parameters that it is computed from there is no error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 5))
    x, y = data(7)
    falign.convert(model, rule, example=x)
    assert falign.transport(model, x, lambda output: loss_of(output, y)) == {}
    assert falign.verify(model, x, lambda output: loss_of(output, y))


def test_nothing_is_left_behind():
    model, (x, y) = build("mlp", "kp"), batch("mlp")
    loss_of(model(x), y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    random = torch.random.get_rng_state()
    falign.transport(model, x, lambda output: loss_of(output, y))
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters())
    assert torch.equal(random, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="expected one finite number"):
        falign.transport(model, x, lambda output: output)


@pytest.mark.parametrize("rule", ["fa", "kp", *DIRECT])
def test_parameters_that_share_memory_are_told_apart(rule):
    """Views of one flat buffer, as fused optimizers and recurrent kernels keep them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    x, y = data(8)
    assert set(falign.transport(model, x, lambda output: loss_of(output, y))) == {"2.weight", "4.weight"}
    falign.convert(model, rule, example=x)
    assert falign.transport(model, x, lambda output: loss_of(output, y), target=y) == {}
