"""Networks written for the purpose: whatever multiplies by a weight, and what only adds or scales."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from entries import LAYERWISE, Entry
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

ENTRIES: list[Entry] = []
N, T, D = 3, 4, 6


def network(family: str, name: str, **options: Any) -> Callable:
    """Register a function that gives (network, example)."""

    def register(make: Callable) -> Callable:
        ENTRIES.append(Entry(name=name, family=family, make=make, **options))
        return make

    return register


class Middle(nn.Module):
    """Parts, and what is done with them."""

    def __init__(self, use: Callable, parts: dict[str, Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.use = use

    def forward(self, h: Tensor, *more: Tensor) -> Tensor:
        return self.use(self, h, *more)


class Between(nn.Module):
    """A layer, something in the middle, a layer."""

    def __init__(self, middle: nn.Module, last: int = D, start: int = 5) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(start, D), middle, nn.Linear(last, 3)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.first(x)), *more))


def between(family: str, name: str, use: Callable, *, last: int = D, refused: dict[str, str] | None = None,
            activities: tuple[str, ...] = (), vectors: tuple[str, ...] = (), steps: int = T, cut: tuple[str, ...] = (),
            padded: bool = False, **parts: Callable) -> None:  # fmt: skip
    """Register a network whose middle is ``use(middle, h)``; its parts are made when it is."""

    def make() -> tuple[nn.Module, Tensor]:
        net = (Padded if padded else Between)(Middle(use, {key: part() for key, part in parts.items()}), last)
        x = torch.randn(N, T, 5)
        return net, x * (torch.arange(T) < torch.tensor([2, 4, 3])[:, None])[..., None] if padded else x

    inside = {"activities": activities, "vectors": vectors}
    named = {key: tuple(f"middle.{each}" for each in names) for key, names in inside.items()}
    ENTRIES.append(Entry(name=name, family=family, make=make, refused=refused or {}, steps=steps, cut=cut, **named))


def weight(*shape: int, scale: float = 0.4) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(scale * torch.randn(*shape))


# --- attention --------------------------------------------------------------------------------------------------------


def attention(name: str, use: Callable, **options: Any) -> None:
    between("attention", name, use, part=lambda: shaken(nn.MultiheadAttention(D, 2, **options)))


def shaken(module: nn.Module) -> nn.Module:
    """With noise on what PyTorch initialises to zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def masked(length: int = T) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


PADDED = torch.tensor([[False] * T, [False] * 3 + [True], [False, False, True, True]])
BIASES = torch.linspace(0, 1, N * 2 * T * T, dtype=torch.float64).view(N * 2, T, T)
attention("self", lambda m, h: m.part(h, h, h)[0], batch_first=True)
attention("self, time first", lambda m, h: m.part(h, h, h)[0])
attention("no weights wanted", lambda m, h: m.part(h, h, h, need_weights=False)[0], batch_first=True)
attention("cross", lambda m, h: m.part(h[:, :2], h.relu(), h.sin())[0], batch_first=True)
attention("no bias", lambda m, h: m.part(h, h, h)[0], batch_first=True, bias=False)
attention("bias_k, bias_v", lambda m, h: m.part(h, h, h)[0], batch_first=True, add_bias_kv=True)
attention("add_zero_attn", lambda m, h: m.part(h, h, h)[0], batch_first=True, add_zero_attn=True)
attention(
    "sizes of their own", lambda m, h: m.part(h, h[..., :4], h[..., :5])[0], batch_first=True, kdim=4, vdim=5
)  # fmt: skip
attention(
    "masks", lambda m, h: m.part(h, h, h, key_padding_mask=PADDED, attn_mask=masked())[0], batch_first=True
)  # fmt: skip
attention(
    "a causal hint",
    lambda m, h: m.part(h, h, h, attn_mask=masked(), is_causal=True, need_weights=False)[0], batch_first=True,
)  # fmt: skip
attention(
    "a mask a head", lambda m, h: m.part(h, h, h, attn_mask=BIASES)[0],
    batch_first=True,
)  # fmt: skip
attention("its probabilities", lambda m, h: sum(m.part(h, h, h)[i].sum(-1, keepdim=True) for i in (0, 1)) * h,
          batch_first=True)  # fmt: skip
attention(
    "every head's probabilities",
    lambda m, h: m.part(h, h, h)[0] + m.part(h, h, h, average_attn_weights=False)[1].prod(1) @ h, batch_first=True,
)  # fmt: skip
attention("dropout", lambda m, h: m.part(h, h, h)[0], batch_first=True, dropout=0.3)
attention("called twice", lambda m, h: m.part(*3 * [m.part(h, h, h)[0]])[0], batch_first=True)
between("attention", "learned queries", lambda m, h: m.part(m.queries.expand(N, 2, D), h, h)[0],
        part=lambda: nn.MultiheadAttention(D, 2, batch_first=True), queries=weight(1, 2, D),
        activities=("queries",))  # fmt: skip


@network("attention", "alone, one sequence", output=0)
def _():
    return shaken(nn.MultiheadAttention(D, 2)), tuple(torch.randn(T, D) for _ in range(3))


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 7, **{"batch_first": True, "dropout": 0.0, **options})


between("attention", "encoder layer", lambda m, h: m.part(h), part=encoder)
between("attention", "encoder layer, norm first", lambda m, h: m.part(h, src_mask=masked(), is_causal=True),
        part=partial(encoder, norm_first=True, activation="gelu"))  # fmt: skip
between("attention", "encoder", lambda m, h: m.part(h, src_key_padding_mask=PADDED),
        part=lambda: nn.TransformerEncoder(encoder(), 2, nn.LayerNorm(D), enable_nested_tensor=False))  # fmt: skip
between("attention", "decoder layer", lambda m, h: m.part(h, h.sin(), tgt_mask=masked()),
        part=lambda: nn.TransformerDecoderLayer(D, 2, 7, batch_first=True, dropout=0.0))  # fmt: skip
between("attention", "nn.Transformer", lambda m, h: m.part(h, h[:, :2]),
        part=lambda: nn.Transformer(D, 2, 1, 1, 7, batch_first=True, dropout=0.0))  # fmt: skip
between("attention", "recomputed", lambda m, h: checkpoint(m.part, h, use_reentrant=False), part=encoder)
between("attention", "kernel of its own", lambda m, h: F.multi_head_attention_forward(
            h, h, h, D, 2, m.rows, m.bias, None, None, False, 0.0, m.out.weight, m.out.bias, need_weights=False)[0],
        rows=weight(3 * D, D), bias=weight(3 * D), out=lambda: nn.Linear(D, D))  # fmt: skip

between(
    "attention",
    "windows",
    lambda m, h: m.part(h.unflatten(1, (-1, 2)).flatten(0, 1)).reshape(len(h), -1, D).mean(1),
    part=encoder,
)


class Translator(nn.Module):
    """A sequence made from another."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.first, self.last = nn.Linear(7, D), nn.Linear(5, D), nn.Linear(D, 3)
        self.encode, self.decode = encoder(), nn.TransformerDecoderLayer(D, 2, 7, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return self.last(self.decode(self.first(x), self.encode(self.source(source))))


network("attention", "two inputs")(lambda: (Translator(), (torch.randn(N, T, 5), torch.randn(N, 2, 7))))

# --- recurrent --------------------------------------------------------------------------------------------------------


def memory(name: str, kind: type, use: Callable = lambda m, h: m.part(h)[0], *, last: int = D, steps: int = T,
           padded: bool = False, **options: Any) -> None:  # fmt: skip
    between("recurrent", name, use, last=last, steps=steps, padded=padded, part=lambda: kind(D, D, **options))


class Padded(Between):
    """A sequence ends where only zeros follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x.any(-1).sum(1))


def packed(m: nn.Module, h: Tensor, lengths: Tensor) -> Tensor:
    y, _ = m.part(pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(y, batch_first=True, total_length=h.shape[1])[0]


both = {"batch_first": True, "bidirectional": True}
for kind in (nn.RNN, nn.GRU, nn.LSTM):
    memory(kind.__name__, kind, batch_first=True)
    memory(f"{kind.__name__}, two layers both ways", kind, last=2 * D, num_layers=2, **both)
    memory(f"{kind.__name__}, no bias, time first", kind, bias=False, steps=N)
    memory(f"{kind.__name__}, packed", kind, packed, batch_first=True, padded=True)
memory("GRU, packed both ways", nn.GRU, packed, last=2 * D, padded=True, **both)
memory("RNN, relu", nn.RNN, batch_first=True, nonlinearity="relu")
memory("LSTM, projected", nn.LSTM, last=2 * 4, num_layers=2, proj_size=4, **both)
memory("LSTM, last state", nn.LSTM, lambda m, h: torch.cat(m.part(h)[1], -1)[0], last=2 * D, batch_first=True)
memory("GRU, last step", nn.GRU, lambda m, h: m.part(h)[0][:, -1], batch_first=True)
memory("GRU, mean of steps", nn.GRU, lambda m, h: m.part(h)[0].mean(1), batch_first=True)
memory("LSTM, called twice", nn.LSTM, lambda m, h: m.part(m.part(h)[0])[0], batch_first=True)
memory("GRU, dropout", nn.GRU, batch_first=True, num_layers=2, dropout=0.3)
between("recurrent", "LSTM, a learned start",
        lambda m, h: m.part(h, (m.h0.expand(1, N, D).contiguous(), h[:, :1].transpose(0, 1).contiguous()))[0],
        part=lambda: nn.LSTM(D, D, batch_first=True), h0=weight(1, 1, D), activities=("h0",))  # fmt: skip


@network("recurrent", "GRU alone", output=0)
def _():
    return nn.GRU(5, D, batch_first=True), torch.randn(N, T, 5)


class Loop(nn.Module):
    """A cell, step by step."""

    def __init__(self, cell: nn.Module, every: bool) -> None:
        super().__init__()
        self.first, self.cell, self.last, self.every = nn.Linear(5, D), cell, nn.Linear(cell.hidden_size, 3), every

    def forward(self, x: Tensor) -> Tensor:
        state, ys = None, []
        for given in torch.tanh(self.first(x)).unbind(1):
            state = self.cell(given, state)
            ys.append(state[0] if isinstance(state, tuple) else state)
        return self.last(torch.stack(ys, 1) if self.every else ys[-1])


for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
    for every in (True, False):
        network("recurrent", f"{kind.__name__}, {'every step' if every else 'last step'}")(
            lambda kind=kind, every=every: (Loop(kind(D, D + every, bias=every), every), torch.randn(N, T, 5))
        )

# --- products by hand -------------------------------------------------------------------------------------------------


def product(name: str, use: Callable, **parts: Callable) -> None:
    between("product", name, use, **parts)


def autoencoded(m: nn.Module, h: Tensor) -> Tensor:
    return F.linear(m.encode(h).tanh(), m.encode.weight.t())


product("x @ W", lambda m, h: h @ m.w, w=weight(D, D))
product("x @ W.t()", lambda m, h: h @ m.w.t() + m.b, w=weight(D, D), b=weight(D))
product("x @ W[:, 1:]", lambda m, h: h[..., :3] @ m.w[2:5, 1:], w=weight(8, 7))
product("F.linear", lambda m, h: F.linear(h, m.w, m.b), w=weight(D, D), b=weight(D))
product("einsum", lambda m, h: torch.einsum("nti,oi->nto", h, m.w), w=weight(D, D))
product("einsum of heads", lambda m, h: torch.einsum("nti,hoi->ntho", h, m.w).flatten(2), w=weight(2, 3, D))
product("einsum that copies", lambda m, h: torch.einsum("nti,hio->ntho", h, m.w).flatten(2), w=weight(2, D, 3))
product("tensordot", lambda m, h: torch.tensordot(h, m.w, ([2], [1])), w=weight(D, D))
product("bmm, a group a step", lambda m, h: torch.bmm(h.transpose(0, 1), m.w).transpose(0, 1), w=weight(T, D, D))
product("baddbmm", lambda m, h: torch.baddbmm(m.b, h, m.w), w=weight(N, D, D), b=weight(N, 1, D))
product("addmm", lambda m, h: torch.addmm(m.b, h.flatten(0, 1), m.w).view(N, T, D), w=weight(D, D), b=weight(D))
product("W @ x, over steps", lambda m, h: m.w @ h, w=weight(T, T))
product("x W yᵀ", lambda m, h: (h @ m.w @ h.mT).softmax(-1) @ h, w=weight(D, D))
product("a vector", lambda m, h: h * (h @ m.w)[..., None].sigmoid(), w=weight(D), vectors=("w",))
product("attention pooling", lambda m, h: (h @ m.w).softmax(1).transpose(1, 2) @ h, w=weight(D, 2))
product("broadcast, multiplied and summed", lambda m, h: (h[..., None, :] * m.w).sum(-1), w=weight(D, D))
product("Bilinear", lambda m, h: m.part(h, h.sin()), part=lambda: nn.Bilinear(D, D, D))
product("Bilinear of one input", lambda m, h: m.part(h, h), part=lambda: nn.Bilinear(D, D, D))
product("convolution by hand", lambda m, h: F.conv1d(h.mT, m.w, padding=1).mT, w=weight(D, D, 3))
product("transposed convolution by hand", lambda m, h: F.conv_transpose1d(h.mT, m.w, padding=1).mT, w=weight(D, D, 3))
product("grouped convolution by hand", lambda m, h: F.conv1d(h.mT, m.w, groups=3).mT, w=weight(D, 2, 1))
product("a layer's weight", lambda m, h: F.linear(h, m.part.weight), part=lambda: nn.Linear(D, D))
product("layer.forward", lambda m, h: m.part.forward(h), part=lambda: nn.Linear(D, D))
product("called, and its weight", lambda m, h: F.linear(m.part(h).tanh(), m.part.weight), part=lambda: nn.Linear(D, D))
product("tied autoencoder", autoencoded, encode=lambda: nn.Linear(D, 4))
product("used twice", lambda m, h: (h @ m.w).tanh() @ m.w.mT, w=weight(D, D))
product("in float32", lambda m, h: (h.to(torch.float32) @ m.w.to(torch.float32)).double(), w=weight(D, D))
product("chunks of one", lambda m, h: sum(h @ w for w in m.w.chunk(2, 1)).repeat(1, 1, 2), w=weight(D, D))
product("recomputed by its owner", lambda m, h: checkpoint(m.part, h, use_reentrant=False),
        part=lambda: Transposed(D, D))  # fmt: skip
product("recomputed in part", lambda m, h: checkpoint(lambda h: torch.tanh(h @ m.w), h, use_reentrant=False),
        w=weight(D, D), cut=("first", "middle", "last"),
        refused=dict.fromkeys(LAYERWISE, "activation checkpointing"))  # fmt: skip


class Functional(nn.Module):
    """A network that is called with parameters of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional_call(self.inner, dict(self.inner.named_parameters()), self.first(x).tanh())[0])


network("product", "functional_call within")(lambda: (Functional(), torch.randn(N, T, 5)))


class Fused(nn.Module):
    """Attention with one map for queries, keys and values, of a layer or of a parameter."""

    def __init__(self, raw: bool, causal: bool) -> None:
        super().__init__()
        self.first, self.norm, self.out, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        if raw:
            self.rows = nn.Parameter(0.4 * torch.randn(24, 8))
        else:
            self.qkv = nn.Linear(8, 24, bias=False)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        z = self.norm(h)
        z = self.qkv(z) if "qkv" in self._modules else F.linear(z, self.rows)
        q, k, v = z.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.last(h + self.out(y.transpose(1, 2).flatten(2)))


network("product", "fused qkv, a layer")(lambda: (Fused(False, True), torch.randn(N, T, 5)))
network("product", "fused qkv, a parameter")(lambda: (Fused(True, False), torch.randn(N, T, 5)))


class LanguageModel(nn.Module):
    """Embedding, positions, a block, and a head that is the embedding."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.rows, self.positions = how, nn.Embedding(9, D), nn.Parameter(torch.randn(T, D))
        self.block, self.norm = encoder(norm_first=True), nn.LayerNorm(D)
        if how == "layer":
            self.head = nn.Linear(D, 9, bias=False)
            self.head.weight = self.rows.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.block(self.rows(x) + self.positions, src_mask=masked(), is_causal=True))
        if self.how == "layer":
            return self.head(h)
        return F.linear(h, self.rows.weight) if self.how == "F.linear" else h @ self.rows.weight.T


for how in ("layer", "F.linear", "@"):
    network("product", f"tied head, {how}")(lambda how=how: (LanguageModel(how), torch.randint(9, (N, T))))


class Transposed(nn.Module):
    """GPT-2's Conv1D: x W + b."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.4 * torch.randn(inner, outer)), nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


product("a linear class of its own", lambda m, h: m.a(m.b(h).relu()),
        a=lambda: Transposed(7, D), b=lambda: Transposed(D, 7))  # fmt: skip


class Experts(nn.Module):
    """The best of several experts, weighted by their gates."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.gate = how, nn.Linear(D, 3)
        if how == "layers":
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 7), nn.ReLU(), nn.Linear(7, D)) for _ in range(3))
        else:
            self.up, self.down = nn.Parameter(torch.randn(3, D, 7) / 3), nn.Parameter(torch.randn(3, 7, D) / 3)

    def forward(self, h: Tensor) -> Tensor:
        x = h.flatten(0, 1)
        gates, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        if self.how == "gathered":
            hidden = torch.bmm(x[:, None], self.up[chosen[:, 0]]).relu()
            y = (hidden @ self.down[chosen[:, 0]])[:, 0] * gates[:, :1]
        elif self.how == "all":
            hidden = torch.einsum("si,eio->seo", x, self.up).relu()
            y = torch.einsum("seo,eoi,se->si", hidden, self.down, self.gate(x).softmax(-1))
        else:
            for expert in range(3):
                row, place = torch.where(chosen == expert)
                if self.how == "layers":
                    z = self.experts[expert](x[row])
                else:
                    z = (x[row] @ self.up[expert]).relu() @ self.down[expert]
                y = y.index_add(0, row, z * gates[row, place, None])
        return y.view_as(h)


for how in ("layers", "slices", "gathered", "all"):  # a direct rule cuts in front of the router
    product(f"experts, {how}", lambda m, h: h + m.part(h), part=lambda how=how: Experts(how))

# --- what adds or scales is never a reason to refuse ------------------------------------------------------------------


def elementwise(name: str, use: Callable, **parts: Callable) -> None:
    between("elementwise", name, use, activities=("w", "b"), **parts)


elementwise("positions", lambda m, h: h + m.w, w=weight(1, T, D))
elementwise("class token", lambda m, h: torch.cat([m.w.expand(N, 1, D), h], 1), w=weight(1, 1, D))
elementwise("layer scale", lambda m, h: h + m.w * h.sin(), w=weight(D))
elementwise("a gain a place", lambda m, h: h * m.w, w=weight(T, D))
elementwise("a shift and a gain of planes", lambda m, h: h[..., None, None] * m.w + m.b, last=7,
            w=weight(D, 1, 1), b=weight(D, 2, 7))  # fmt: skip
elementwise("a table of biases", lambda m, h: (h @ h.mT + m.w[torch.arange(T)[:, None] - torch.arange(T) + T, 0]
            ).softmax(-1) @ h, w=weight(2 * T + 1, 2))  # fmt: skip
elementwise("an index of biases in attention", lambda m, h: F.scaled_dot_product_attention(h, h, h, m.w),
            w=weight(T, T))  # fmt: skip
elementwise("normalisations", lambda m, h: m.c(m.b(m.a(h)).mT).mT, a=lambda: shaken(nn.LayerNorm(D)),
            b=lambda: shaken(nn.RMSNorm(D)), c=lambda: shaken(nn.GroupNorm(2, D)))  # fmt: skip
elementwise("a norm by hand", lambda m, h: m.w * h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() + m.b,
            w=weight(D), b=weight(D))  # fmt: skip
elementwise("PReLU", lambda m, h: m.part(h.mT).mT, part=lambda: nn.PReLU(D))
elementwise("mixed by softmax", lambda m, h: h.sin() * m.w.softmax(0)[0] + h * m.w.softmax(0)[1], w=weight(2))
elementwise("temperature", lambda m, h: h / m.w.exp(), w=weight(1))
for function in (F.softplus, F.elu, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.mish, F.glu,
                 F.softshrink, F.hardshrink, F.silu, F.gelu, F.softsign):  # fmt: skip
    elementwise(f"a gain by {function.__name__}", lambda m, h, f=function: h * f(m.w),
                w=weight(D * (1 + (function is F.glu)), scale=2.0))  # fmt: skip
elementwise("rotary", lambda m, h: h * m.w.cos() + h.roll(1, -1) * m.w.sin(), w=weight(T, D))
elementwise("rows of an embedding", lambda m, h: h * m.part(torch.arange(T)), part=lambda: nn.Embedding(9, D))

# --- convolutions -----------------------------------------------------------------------------------------------------


class Squeezed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Linear(2, channels)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        gate = self.up(self.down(y.mean((2, 3), keepdim=True)).relu().flatten(1)).sigmoid()
        return x + self.scale * y * gate[..., None, None]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.norm, self.up = nn.GroupNorm(2, 6), nn.ConvTranspose2d(6, 4, 2, 2)
        self.mix, self.last = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.a(x))
        b = F.silu(self.norm(self.b(a)))
        return self.last(F.silu(self.mix(torch.cat([a, self.up(b)], 1))))


def images(channels: int = 2) -> Tensor:
    return torch.randn(N, channels, 8, 10)


@network("convolution", "squeeze and excite")
def _():
    body = [nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), Squeezed(4), Squeezed(4), nn.Flatten(), nn.Linear(192, 3)]
    return nn.Sequential(*body), images()


network("convolution", "U-Net", channels=True)(lambda: (UNet(), images()))


@network("convolution", "separable, group norm")
def _():
    body = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Conv2d(4, 6, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]  # fmt: skip
    return nn.Sequential(*body), images()


# --- weights that are computed ----------------------------------------------------------------------------------------


class Standardised(nn.Conv1d):
    """A convolution whose weight is standardised before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, w / w.std((1, 2), keepdim=True), self.bias, self.stride, self.padding)


class LowRank(nn.Module):
    """The increment A B of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(2, D))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.a @ self.b


def computed(name: str, use: Callable, words: str = "", **parts: Callable) -> None:
    # A direct rule cuts the module as a whole, and inside of it weights may be anything.
    between("computed", name, use, refused=dict.fromkeys(LAYERWISE, words) if words else {}, **parts)


DERIVED = "is changed by"
for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
    computed(wrap.__name__, lambda m, h: m.part(h), part=lambda wrap=wrap: wrap(nn.Linear(D, D)).eval())
computed("LoRA beside", lambda m, h: m.part(h) + m.b(m.a(h)), part=lambda: nn.Linear(D, D),
         a=lambda: nn.Linear(D, 2, bias=False), b=lambda: nn.Linear(2, D, bias=False))  # fmt: skip
computed("LoRA of parameters beside", lambda m, h: m.part(h) + h @ m.a @ m.b, part=lambda: nn.Linear(D, D),
         a=weight(D, 2), b=weight(2, D))  # fmt: skip
computed("LoRA merged", lambda m, h: F.linear(h, m.part.weight + m.a @ m.b), DERIVED,
         part=lambda: nn.Linear(D, D), a=weight(D, 2), b=weight(2, D))  # fmt: skip
computed("standardised convolution", lambda m, h: m.part(h.mT).mT, DERIVED,
         part=lambda: Standardised(D, D, 3, padding=1))  # fmt: skip
computed("low rank, multiplied first", lambda m, h: h @ (m.a @ m.b), DERIVED, a=weight(D, 2), b=weight(2, D))
computed("masked", lambda m, h: h @ (m.w * torch.ones(D, D).tril()), DERIVED, w=weight(D, D))
computed("normalised rows", lambda m, h: F.linear(F.normalize(h, dim=-1), F.normalize(m.w, dim=-1)), DERIVED,
         w=weight(D, D))  # fmt: skip
computed("softmax of a matrix", lambda m, h: m.w.softmax(-1) @ h, DERIVED, w=weight(T, T))
computed("learned queries, multiplied by hand", lambda m, h: (m.queries @ m.w @ h.mT).softmax(-1) @ h, DERIVED,
         w=weight(D, D), queries=weight(2, D))  # fmt: skip
computed("halved", lambda m, h: h @ (m.w * 0.5), DERIVED, w=weight(D, D))
computed("gain times matrix", lambda m, h: F.linear(h, m.g[:, None] * m.w), DERIVED, w=weight(D, D), g=weight(D))
computed("scaled by an activity", lambda m, h: h @ (m.w * h.mean((1, 2), keepdim=True)), DERIVED, w=weight(D, D))
computed("both a product and computed", lambda m, h: (h @ m.w).tanh() @ m.w.exp(), DERIVED, w=weight(D, D))


@network("computed", "a parametrization of low rank")
def _():
    net = nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
    parametrize.register_parametrization(net[2], "weight", LowRank())
    return net, torch.randn(N, 5)


computed("weights from activity", lambda m, h: h @ m.maker(h.mean(1)).unflatten(-1, (D, D)) / D,
         maker=lambda: nn.Linear(D, D * D))  # fmt: skip
