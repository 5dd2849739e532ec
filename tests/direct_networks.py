"""Networks for the direct rules, each with its definition written out: a forward whose cuts are by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import falign

How = Callable[[Tensor, Tensor], Tensor]
"""(error at the output, B) -> error at a cut input."""


def same(e: Tensor, b: Tensor) -> Tensor:
    """The same positions: e B at each."""
    return e @ b


def at(step: int, axis: int = 1) -> How:
    """Of one position the error, for a call or a step."""
    return lambda e, b: e.select(axis, step) @ b


def everywhere(count: int, axis: int = 1) -> How:
    """No position of the output: the same at every one of the input."""
    return lambda e, b: (
        (e @ b / count**0.5).unsqueeze(axis).expand(*e.shape[:axis], count, *e.shape[axis:-1], b.shape[1])
    )


def summed(count: int) -> How:
    """Other positions: the sum of all errors, at every one of the input."""
    return lambda e, b: (e.sum(1) @ b / count**0.5).unsqueeze(1).expand(-1, count, -1)


def share(count: int) -> How:
    """One of many steps that the output does not have."""
    return lambda e, b: e @ b / count**0.5


@dataclass
class Cuts:
    """Inputs that were cut, with how the error gets to them."""

    noted: list[tuple[str, Tensor, How]] = field(default_factory=list)

    def __call__(self, name: str, x: Tensor, how: How) -> Tensor:
        self.noted.append((name, x, how))
        return x.detach()

    def backward(self, loss: Tensor, output: Tensor, feedback: dict[str, Tensor]) -> None:
        """The gradient of ⟨loss⟩ with the errors delivered."""
        (e,) = torch.autograd.grad(loss, output, retain_graph=True)
        total = loss
        for name, x, how in self.noted:
            if x.requires_grad and name in feedback:
                total = total + (how(e, feedback[name]) * x).sum()
        total.backward()


def attend(cut: Cuts, name: str, m: nn.MultiheadAttention, q: Tensor, k: Tensor, how_q: How, how_k: How, mask=None):
    """Attention with q, k, v and the output projection cut; batch first."""
    (wq, wk, wv), (bq, bk, bv) = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
    heads = [
        (cut(f"{name}.{letter}_proj", x, how) @ w.T + b).unflatten(-1, (m.num_heads, -1)).transpose(1, 2)
        for letter, x, how, w, b in (("q", q, how_q, wq, bq), ("k", k, how_k, wk, bk), ("v", k, how_k, wv, bv))
    ]
    scores = heads[0] @ heads[1].mT / m.head_dim**0.5
    mixed = (scores if mask is None else scores + mask).softmax(-1) @ heads[2]
    mixed = mixed.transpose(1, 2).flatten(2)
    return cut(f"{name}.out_proj", mixed, how_q) @ m.out_proj.weight.T + m.out_proj.bias


def linear(cut: Cuts, name: str, layer: nn.Linear, x: Tensor, how: How) -> Tensor:
    y = cut(name, x, how) @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias)


def encode(cut: Cuts, name: str, m: nn.TransformerEncoderLayer, x: Tensor, how: How) -> Tensor:
    x = norm(m.norm1, x + attend(cut, f"{name}.self_attn", m.self_attn, x, x, how, how))
    h = torch.relu(linear(cut, f"{name}.linear1", m.linear1, x, how))
    return norm(m.norm2, x + linear(cut, f"{name}.linear2", m.linear2, h, how))


def decode(cut: Cuts, name: str, m: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, how: How, source: How):
    x = norm(m.norm1, x + attend(cut, f"{name}.self_attn", m.self_attn, x, x, how, how))
    x = norm(m.norm2, x + attend(cut, f"{name}.multihead_attn", m.multihead_attn, x, memory, how, source))
    h = torch.relu(linear(cut, f"{name}.linear1", m.linear1, x, how))
    return norm(m.norm3, x + linear(cut, f"{name}.linear2", m.linear2, h, how))


def recur(cut: Cuts, name: str, m: nn.RNNBase, x: Tensor, how: Callable[[int], How], through_time: bool = True):
    """A recurrent module, step by step; batch first. Gives all outputs."""
    ways = 2 if m.bidirectional else 1
    for layer in range(m.num_layers):
        sides = []
        for way in range(ways):
            tail = f"l{layer}" + "_reverse" * way
            get = {p: getattr(m, f"{p}_{tail}") for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            h = x.new_zeros(len(x), m.proj_size or m.hidden_size)
            c = x.new_zeros(len(x), m.hidden_size)
            outputs = {}
            for t in range(x.shape[1])[:: -1 if way else 1]:
                inputs = cut(f"{name}.ih_{tail}", x[:, t], how(t)) @ get["weight_ih"].T + get["bias_ih"]
                before = cut(f"{name}.hh_{tail}", h, how(t)) if through_time else h.detach()
                states = before @ get["weight_hh"].T + get["bias_hh"]
                if m.mode == "LSTM":
                    i, f, g, o = (inputs + states).chunk(4, -1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    if m.proj_size:
                        h = cut(f"{name}.hr_{tail}", h, how(t)) @ getattr(m, f"weight_hr_{tail}").T
                elif m.mode == "GRU":
                    (ri, zi, ni), (rh, zh, nh) = inputs.chunk(3, -1), states.chunk(3, -1)
                    z = (zi + zh).sigmoid()
                    h = (1 - z) * (ni + (ri + rh).sigmoid() * nh).tanh() + z * h
                else:
                    h = (inputs + states).tanh()
                outputs[t] = h
            sides.append(torch.stack([outputs[t] for t in range(x.shape[1])], 1))
        x = torch.cat(sides, -1)
    return x


class Block(nn.Module):
    """A block of a transformer, pre-norm and causal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        h = self.first(x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.second(x))

    def written(self, cut: Cuts, name: str, x: Tensor, how: How) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        h = norm(self.first, x)
        x = x + attend(cut, f"{name}.attention", self.attention, h, h, how, how, mask)
        h = F.gelu(linear(cut, f"{name}.mlp.0", self.mlp[0], norm(self.second, x), how))
        return x + linear(cut, f"{name}.mlp.2", self.mlp[2], h, how)


class GPT(nn.Module):
    """A small language model with learned positions."""

    def __init__(self, vocabulary: int = 11, size: int = 8, count: int = 2, length: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, size)
        self.positions = nn.Parameter(torch.randn(length, size) / 4)
        self.blocks = nn.ModuleList(Block(size) for _ in range(count))
        self.ln_f, self.head = nn.LayerNorm(size), nn.Linear(size, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.ln_f(h))

    def written(self, cut: Cuts, x: Tensor) -> Tensor:
        h = self.words(x) + self.positions[: x.shape[1]]
        for number, block in enumerate(self.blocks):
            h = block.written(cut, f"blocks.{number}", h, same)
        return linear(cut, "head", self.head, norm(self.ln_f, h), same)


class Encoder(nn.Module):
    """One layer of a transformer, position by position, time first or pooled."""

    def __init__(self, pooled: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.head, self.pooled = nn.Linear(8, 5), pooled

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(h.mean(1) if self.pooled else h)

    def written(self, cut: Cuts, x: Tensor) -> Tensor:
        first = self.layer.self_attn.batch_first
        x = x if first else x.transpose(0, 1)

        def turned(e: Tensor, b: Tensor) -> Tensor:
            return e.transpose(0, 1) @ b

        how = everywhere(x.shape[1]) if self.pooled else same if first else turned
        h = encode(cut, "layer", self.layer, x, how)
        h = h.mean(1) if self.pooled else h if first else h.transpose(0, 1)
        return linear(cut, "head", self.head, h, same)


class Decoder(nn.Module):
    """One layer of a decoder: the memory has positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.layer(x, memory))

    def written(self, cut: Cuts, x: Tensor, memory: Tensor) -> Tensor:
        h = decode(cut, "layer", self.layer, x, memory, same, summed(memory.shape[1]))
        return linear(cut, "head", self.head, h, same)


class Translator(nn.Module):
    """``nn.Transformer``: an encoder of sources, a decoder of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(8, 2, 1, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.net(source, target))

    def written(self, cut: Cuts, source: Tensor, target: Tensor) -> Tensor:
        spread = summed(source.shape[1])
        encoder, decoder = self.net.encoder, self.net.decoder
        memory = norm(encoder.norm, encode(cut, "net.encoder.layers.0", encoder.layers[0], source, spread))
        h = target
        for number, layer in enumerate(decoder.layers):
            h = decode(cut, f"net.decoder.layers.{number}", layer, h, memory, same, spread)
        return linear(cut, "head", self.head, norm(decoder.norm, h), same)


class Recurrent(nn.Module):
    """A recurrent module and a readout: of every step, of the last, or of their mean."""

    def __init__(self, rnn: nn.RNNBase, how: str) -> None:
        super().__init__()
        self.rnn, self.how = rnn, how
        size = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.head = nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head({"all": lambda: y, "last": lambda: y[:, -1], "mean": lambda: y.mean(1)}[self.how]())

    def written(self, cut: Cuts, x: Tensor, through_time: bool = True) -> Tensor:
        how = at if self.how == "all" else lambda step: share(x.shape[1])
        y = recur(cut, "rnn", self.rnn, x, how, through_time)
        y = {"all": lambda: y, "last": lambda: y[:, -1], "mean": lambda: y.mean(1)}[self.how]()
        return linear(cut, "head", self.head, y, same)


class Loop(nn.Module):
    """A cell in a loop of the user's, with its first states learned."""

    def __init__(self, cell: nn.RNNCellBase, last: bool) -> None:
        super().__init__()
        self.cell, self.head, self.last = cell, nn.Linear(cell.hidden_size, 5), last
        self.start = nn.Parameter(torch.randn(2, cell.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.start[:, None].expand(-1, len(x), -1)
        outputs = []
        for t in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
            if not self.last:
                outputs.append(self.head(h))
        return self.head(h) if self.last else torch.stack(outputs, 1)

    def written(self, cut: Cuts, x: Tensor, through_time: bool = True) -> Tensor:
        h, c = self.start[:, None].expand(-1, len(x), -1)
        outputs, cell = [], self.cell
        for t in range(x.shape[1]):
            how = share(x.shape[1]) if self.last else at(t)
            inputs = cut("cell.ih", x[:, t], how) @ cell.weight_ih.T + cell.bias_ih
            before = cut("cell.hh", h, how) if through_time else h.detach()
            states = before @ cell.weight_hh.T + cell.bias_hh
            if isinstance(cell, nn.LSTMCell):
                i, f, g, o = (inputs + states).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif isinstance(cell, nn.GRUCell):
                (ri, zi, ni), (rh, zh, nh) = inputs.chunk(3, -1), states.chunk(3, -1)
                z = (zi + zh).sigmoid()
                h = (1 - z) * (ni + (ri + rh).sigmoid() * nh).tanh() + z * h
            else:
                h = (inputs + states).tanh()
            if not self.last:
                outputs.append(linear(cut, "head", self.head, h, at(t)))
        return linear(cut, "head", self.head, h, same) if self.last else torch.stack(outputs, 1)


def _recurrent(make: Callable[[], nn.RNNBase], how: str) -> Callable[[], nn.Module]:
    return lambda: Recurrent(make(), how)


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _words(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(sum(shape)))


#: Name -> (makes the network, makes its input from a length).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "gpt": (GPT, lambda length: (_words(3, length),)),
    "encoder": (Encoder, lambda length: (_x(3, length, 8),)),
    "encoder, time first": (lambda: Encoder(batch_first=False), lambda length: (_x(length, 3, 8),)),
    "encoder, pooled": (lambda: Encoder(pooled=True), lambda length: (_x(3, length, 8),)),
    "decoder": (Decoder, lambda length: (_x(3, length, 8), _x(3, 4, 8))),
    "translator": (Translator, lambda length: (_x(3, 4, 8), _x(3, length, 8))),
}
for _how in ("all", "last", "mean"):
    for _name, _make in {
        "rnn": lambda: nn.RNN(8, 6, batch_first=True),
        "gru of two layers": lambda: nn.GRU(8, 6, 2, batch_first=True),
        "lstm both ways": lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True),
        "lstm projected": lambda: nn.LSTM(8, 6, 2, batch_first=True, proj_size=4),
    }.items():
        NETWORKS[f"{_name}, {_how}"] = _recurrent(_make, _how), lambda length: (_x(3, length, 8),)
for _cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
    for _last in (False, True):
        NETWORKS[f"{_cell.__name__}{', last' * _last}"] = (
            lambda cell=_cell, last=_last: Loop(cell(8, 6), last),
            lambda length: (_x(3, length, 8),),
        )


def build(name: str) -> nn.Module:
    """The network of that name, in float64, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return NETWORKS[name][0]().double()


def loss_of(output: Tensor) -> Tensor:
    """A loss in which every output counts."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    return (weights * (output - 0.3).square()).sum() / len(output)


def defined(model: nn.Module, x: tuple[Tensor, ...], feedback: dict[str, Tensor], **how) -> dict[str, Tensor]:
    """{parameter: gradient} by the definition, on a plain copy of the model."""
    cut = Cuts()
    output = model.written(cut, *x, **how)
    model.zero_grad()
    cut.backward(loss_of(output), output, feedback)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def taken(model: nn.Module, x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """{parameter: gradient} that a converted model takes."""
    model.zero_grad()
    loss_of(model(*x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def feedback_of(model: nn.Module) -> dict[str, Tensor]:
    return falign.feedback_state(model)
