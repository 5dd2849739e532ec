"""Attention and recurrent networks in plain tensor algebra, every product of a weight by a function that is given.

``product(name, x, weight, bias)`` is x Wᵀ + b with whatever error it delivers to x; ``name`` is that of the product
within its module: "q", "k", "v", "out", or "ih_l0", "hh_l0_reverse", "hr_l1", and "ih", "hh" of a cell.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Product = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]


def attention(
    module: nn.MultiheadAttention,
    product: Product,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward of ``nn.MultiheadAttention``."""
    alone = query.dim() == 2
    if alone:
        query, key, value = (t[None] for t in (query, key, value))
    elif not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    size, heads = module.embed_dim, module.num_heads
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.split(size)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(size)
    inputs = zip(("q", "k", "v"), (query, key, value), weights, biases, strict=True)
    q, k, v = (product(name, x, weight, bias) for name, x, weight, bias in inputs)
    count, sources = k.shape[:2]
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.expand(count, 1, size)], 1)
        v = torch.cat([v, module.bias_v.expand(count, 1, size)], 1)
    if module.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(count, 1, size)], 1) for t in (k, v))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / (size // heads) ** 0.5
    more = k.shape[2] - sources
    for mask, shape in ((attn_mask, (-1, heads)), (key_padding_mask, (-1, 1, 1))):
        if mask is not None:
            if not mask.is_floating_point():
                mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(mask, float("-inf"))
            if shape[1] == 1:
                mask = mask.reshape(-1, 1, 1, sources)
            elif mask.dim() == 3:
                mask = mask.unflatten(0, shape)
            scores = scores + F.pad(mask, (0, more))
    probabilities = F.dropout(scores.softmax(-1), module.dropout, module.training)
    y = product("out", (probabilities @ v).transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    seen = (probabilities.mean(1) if average_attn_weights else probabilities) if need_weights else None
    if alone:
        return y[0], seen if seen is None else seen[0]
    return y if module.batch_first else y.transpose(0, 1), seen


def step(kind: str, given: Tensor, h: Tensor, c: Tensor | None, recurrent: Callable[[Tensor], Tensor]):
    """(h, c) after one step; ``given`` is what the input contributes."""
    fed = recurrent(h)
    if kind == "LSTM":
        i, f, g, o = (given + fed).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "GRU":
        (r, z, n), (rh, zh, nh) = given.chunk(3, -1), fed.chunk(3, -1)
        z = (z + zh).sigmoid()
        return (1 - z) * (n + (r + rh).sigmoid() * nh).tanh() + z * h, None
    return (given + fed).tanh() if kind == "RNN_TANH" else (given + fed).relu(), None


def recurrent(module: nn.RNNBase, product: Product, x: Any, state: Any = None):
    """The forward of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``; packed sequences too, step by step."""
    packed = x if isinstance(x, PackedSequence) else None
    if packed is not None:
        x, lengths = pad_packed_sequence(packed)
    else:
        alone = x.dim() == 2
        x = x[:, None] if alone else x.transpose(0, 1) if module.batch_first else x
        lengths = torch.full((x.shape[1],), len(x))
    ways, lstm = 1 + module.bidirectional, module.mode == "LSTM"
    count, bias = x.shape[1], module.bias
    if state is None:
        outer = module.proj_size or module.hidden_size
        state = [x.new_zeros(module.num_layers * ways, count, size) for size in (outer, module.hidden_size)]
    else:
        state = list(state) if lstm else [state, state]
        if packed is None and alone:
            state = [s[:, None] for s in state]
    hs, cs = [], []
    for layer in range(module.num_layers):
        sides = []
        for way in range(ways):
            tail = f"l{layer}{'_reverse' if way else ''}"
            index = layer * ways + way
            h, c = state[0][index], state[1][index] if lstm else None

            def times(part: str, t: Tensor, tail: str = tail) -> Tensor:
                b = getattr(module, f"bias_{part}_{tail}") if bias and part != "hr" else None
                return product(f"{part}_{tail}", t, getattr(module, f"weight_{part}_{tail}"), b)

            given, ys = times("ih", x), [None] * len(x)
            for at in reversed(range(len(x))) if way else range(len(x)):
                runs = (at < lengths)[:, None]
                # Behind the end of a sequence there is no state that could receive an error.
                later, cell = step(module.mode, given[at], h, c, lambda h, runs=runs: times("hh", h * runs))
                if module.proj_size:
                    later = times("hr", later)
                h = torch.where(runs, later, h)
                c = torch.where(runs, cell, c) if lstm else None
                ys[at] = torch.where(runs, h, torch.zeros_like(h))
            sides.append(torch.stack(ys))
            hs.append(h)
            cs.append(c)
        x = torch.cat(sides, -1)
        if layer < module.num_layers - 1:
            x = F.dropout(x, module.dropout, module.training)
    h, c = torch.stack(hs), torch.stack(cs) if lstm else None
    if packed is not None:
        y = pack_padded_sequence(x, lengths, enforce_sorted=packed.sorted_indices is None)
    elif alone:
        y, h, c = x[:, 0], h[:, 0], c if c is None else c[:, 0]
    else:
        y = x.transpose(0, 1) if module.batch_first else x
    return (y, (h, c)) if lstm else (y, h)


def cell(module: nn.RNNCellBase, product: Product, x: Tensor, state: Any = None):
    """The forward of ``nn.RNNCell``, ``nn.GRUCell`` and ``nn.LSTMCell``, of batches."""
    kind = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}.get(type(module)) or f"RNN_{module.nonlinearity.upper()}"
    if state is None:
        state = x.new_zeros(len(x), module.hidden_size)
        state = (state, state) if kind == "LSTM" else state
    h, c = state if kind == "LSTM" else (state, None)
    given = product("ih", x, module.weight_ih, module.bias_ih)
    h, c = step(kind, given, h, c, lambda h: product("hh", h, module.weight_hh, module.bias_hh))
    return (h, c) if kind == "LSTM" else h


def unroll(net: nn.Module, product: Callable[..., Tensor], names: list[str] | None = None) -> None:
    """Let attention and recurrent modules of a network run by this module's functions.

    Args:
        net: the network.
        product: (name of the module, and then as everywhere here).
        names: of the modules; None: all.
    """
    for name, module in net.named_modules():
        if names is not None and name not in names:
            continue
        for base, function in ((nn.MultiheadAttention, attention), (nn.RNNBase, recurrent), (nn.RNNCellBase, cell)):
            if isinstance(module, base):
                module.forward = partial(function, module, partial(product, name))
