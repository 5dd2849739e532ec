"""Recurrent modules as layers: RNN, GRU and LSTM of all layers and directions, and their cells, for direct rules.

A rule cuts the input x_t and the state h_{t-1} in front of their products; gates, cell state and the leak of a GRU are
walked back exactly. So the products see given states, and *time is no loop*: torch's fused kernel gives the values of
the states, both products then run over all times at once, and what is left of the recursion is a linear scan (LSTM: c,
GRU: h). True gradients, where a measurement asks for them layer by layer, need the loop.
"""

from typing import Any

import torch
from torch import _VF, Tensor, nn  # type: ignore[attr-defined]
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from falign._attached import Feedback
from falign._delivery import transformed
from falign._expand import Expanded, expands


def _gates(mode: str, inputs: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn both products into (kept, added, out): the state is kept ⊙ state + added, and h = out ⊙ tanh(state).

    Of a plain RNN h itself is what is added; of a GRU the state is h. All have shape (..., hidden).
    """
    if mode == "LSTM":
        i, f, g, o = (inputs + states).chunk(4, -1)
        return torch.sigmoid(f), torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(o)
    if mode == "GRU":
        (ri, zi, ni), (rh, zh, nh) = inputs.chunk(3, -1), states.chunk(3, -1)
        z = torch.sigmoid(zi + zh)
        return z, (1 - z) * torch.tanh(ni + torch.sigmoid(ri + rh) * nh), None
    h = torch.tanh(inputs + states) if mode == "RNN_TANH" else torch.relu(inputs + states)
    return torch.zeros_like(h), h, None


def _scan(kept: Tensor, added: Tensor, start: Tensor, axis: int, backwards: bool) -> Tensor:
    """Run ``s_t = kept_t ⊙ s_{t-1} + added_t`` over an axis."""
    keeps, adds, states = kept.unbind(axis), added.unbind(axis), []
    for t in range(len(adds))[:: -1 if backwards else 1]:
        start = torch.addcmul(adds[t], keeps[t], start)
        states.append(start)
    return torch.stack(states[:: -1 if backwards else 1], axis)


def _error_shown(states: Tensor, layer: Any) -> Tensor:
    """Detach the input of a layer, and let a measurement see the error at it nevertheless.

    Autograd computes an error only where a gradient is asked for: what is detached stands as if nothing of the layer's
    weight were added to it.
    """
    states = states.detach() + layer.weight.flatten()[:0].sum()
    return states if states.requires_grad else states.requires_grad_()


class _Steps:
    """One layer and direction of a recurrent module, over all times.

    Attributes:
        axis: of the times, 1 where the batch is first, else 0.
        valid: which steps are part of their sequence, (batch, time, 1) or (time, batch, 1); None: all.
    """

    def __init__(self, module: Any, tail: str, axis: int, valid: Tensor | None) -> None:
        children = module._modules
        self.mode, self.axis, self.valid, self.backwards = module.mode, axis, valid, tail.endswith("_reverse")
        self.ih, self.hh, self.hr = children[f"ih_{tail}"], children[f"hh_{tail}"], children.get(f"hr_{tail}")

    def before(self, h: Tensor, start: Tensor) -> Tensor:
        """Give the state in front of every step: h one step earlier, at the beginning of a sequence the start."""
        start = start.unsqueeze(self.axis)
        count = h.shape[self.axis] - 1
        if not self.backwards:
            return torch.cat([start, h.narrow(self.axis, 0, count)], self.axis)
        later = torch.cat([h.narrow(self.axis, 1, count), start], self.axis)
        if self.valid is None:
            return later
        follows = self.valid.narrow(self.axis, 1, count)
        follows = torch.cat([follows, torch.zeros_like(follows.narrow(self.axis, 0, 1))], self.axis)
        return torch.where(follows, later, start)

    def by_rule(self, x: Tensor, values: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run all times at once, given the values of the states: (h_t, c_t), c of an LSTM alone."""
        known, part = self.before(values, h).detach(), self.hh._modules.get("feedback")
        if isinstance(part, Feedback) and part.wiring.state.measured and self.valid is None:
            known = _error_shown(known, self.hh)
        inputs, states = self.ih(x), self.hh(known)
        y, cells = self._combine(inputs, states, h, c)
        if isinstance(part, Feedback):
            entering = self.before(y, h)
            # Steps behind the end of a sequence are none of it: they hand its last state no error.
            part.note_later(entering if self.valid is None else torch.where(self.valid, entering, 0.0))
        return y, cells

    def _combine(self, inputs: Tensor, states: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        kept, added, out = _gates(self.mode, inputs, states)
        if self.valid is not None:
            kept, added = torch.where(self.valid, kept, 1.0), torch.where(self.valid, added, 0.0)
        if out is None:
            recurses = self.mode == "GRU" or self.valid is not None
            y = _scan(kept, added, h, self.axis, self.backwards) if recurses else added
            return y, y
        assert c is not None
        cells = _scan(kept, added, c, self.axis, self.backwards)
        y = out * torch.tanh(cells)
        y = y if self.hr is None else self.hr(y)
        return (y if self.valid is None else torch.where(self.valid, y, 0.0)), cells

    def in_a_loop(self, x: Tensor, h: Tensor, c: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run step by step, truly: every product carries the error through its weight.

        Args:
            x: (batch, time, in) or (time, batch, in).
            h: first state, (batch, hidden).
            c: first cell state of an LSTM.
            values: with the values of all h_t, each product is one call of its layer all the same: it adds to the
                steps, which run on the bare weights, a zero that has its gradient. None: without gradients.
        """
        inputs = self.ih(x).unbind(self.axis) if values is not None else F.linear(x, self.ih.weight, self.ih.bias)
        inputs = inputs if isinstance(inputs, tuple) else inputs.unbind(self.axis)
        states, projected = None, None
        if values is not None:
            entering = _error_shown(self.before(values, h), self.hh)
            states = self.hh(entering).unbind(self.axis)
            if self.hr is not None:
                kept, added, out = _gates(self.mode, torch.stack(inputs, self.axis), torch.stack(states, self.axis))
                raw = out * torch.tanh(_scan(kept, added, c, self.axis, self.backwards))  # type: ignore[operator, arg-type]
                projected = self.hr(_error_shown(raw, self.hr)).unbind(self.axis)
        weight, ys, cells = self.hh.weight.detach(), [], []
        for t in range(len(inputs))[:: -1 if self.backwards else 1]:
            through = F.linear(h, weight)
            if states is None:
                gate_states = through if self.hh.bias is None else through + self.hh.bias
            else:
                gate_states = states[t] + (through - through.detach())
            kept, added, out = _gates(self.mode, inputs[t], gate_states)
            state = torch.addcmul(added, kept, h if c is None else c)
            new = state if out is None else out * torch.tanh(state)
            if self.hr is not None:
                through = F.linear(new, self.hr.weight.detach())
                new = through if projected is None else projected[t] + (through - through.detach())
            if self.valid is not None:
                at = self.valid.select(self.axis, t)
                new, state = torch.where(at, new, h), torch.where(at, state, h if c is None else c)
            h, c = new, None if c is None else state
            ys.append(h)
            cells.append(h if c is None else c)
        turned = slice(None, None, -1 if self.backwards else 1)
        return torch.stack(ys[turned], self.axis), torch.stack(cells[turned], self.axis)


@expands(nn.RNNBase)
class ExpandedRecurrent(Expanded):
    """RNN, GRU or LSTM whose products, of every layer and direction, are layers."""

    @staticmethod
    def products(module: Any) -> dict[str, tuple[str, str | None, tuple[int, int] | None]]:
        """Give the products of inputs, of states and, with ``proj_size``, of projections."""
        parts = ("ih", "hh", "hr") if module.proj_size else ("ih", "hh")
        return {
            f"{part}_{tail}": (
                f"weight_{part}_{tail}", f"bias_{part}_{tail}" if module.bias and part != "hr" else None, None
            )
            for tail in _tails(module)
            for part in parts
        }  # fmt: skip

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        """Run as the module's own class does."""
        part = self.feedback_part()
        true = torch.is_grad_enabled() if part is None else not part.is_on()
        if part is not None and (not torch.is_grad_enabled() or (true and not part.wiring.state.measured)):
            return self.plain_forward(input, hx)
        lengths = valid = None
        axis, x = (1 if self.batch_first else 0), input
        if isinstance(input, PackedSequence):
            if self.proj_size:
                raise RuntimeError(
                    "a direct rule takes no packed sequences in an nn.LSTM with proj_size: pad them, or project by an "
                    "nn.Linear behind an nn.LSTM without"
                )
            x, lengths = pad_packed_sequence(input, batch_first=self.batch_first)
            valid = torch.arange(x.shape[axis], device=x.device) < lengths.to(x.device).unsqueeze(1)
            valid = (valid if self.batch_first else valid.mT).unsqueeze(-1)
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1 - axis)
            hx = None if hx is None else tuple(s.unsqueeze(1) for s in hx) if self.mode == "LSTM" else hx.unsqueeze(1)
        hs, cs = self._starts(x, hx, axis)
        self.check_forward_args(x, (hs, cs) if self.mode == "LSTM" else hs, None)
        last_h, last_c, ways = [], [], 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            rows = slice(layer * ways, (layer + 1) * ways)
            values = self._values(layer, x.detach(), hs[rows].detach(), cs[rows].detach(), axis, lengths, valid)
            outputs = []
            for way, tail in enumerate(_tails(self)[rows]):
                steps = _Steps(self, tail, axis, valid)
                h, c = hs[rows][way], cs[rows][way] if self.mode == "LSTM" else None
                run = steps.in_a_loop(x, h, c, values[way]) if true else steps.by_rule(x, values[way], h, c)
                for state, states in zip((last_h, last_c), run, strict=True):
                    state.append(_last(states, axis, way == 1, lengths))
                outputs.append(run[0] if valid is None else torch.where(valid, run[0], 0.0))
            x = torch.cat(outputs, -1)
            if layer < self.num_layers - 1 and self.dropout > 0 and self.training:
                x = self._dropped(x, input, lengths)
        h, c = torch.stack(last_h), torch.stack(last_c)
        if not batched:
            x, h, c = x.squeeze(1 - axis), h.squeeze(1), c.squeeze(1)
        y = x if lengths is None else _packed_like(input, x, lengths, self.batch_first)
        return (y, (h, c)) if self.mode == "LSTM" else (y, h)

    def _starts(self: Any, x: Tensor, hx: Any, axis: int) -> tuple[Tensor, Tensor]:
        """Give the first states, (layers · directions, batch, hidden), zero where none are given."""
        if hx is not None:
            return hx if self.mode == "LSTM" else (hx, hx)
        count = len(_tails(self)), x.shape[1 - axis]
        c = x.new_zeros(*count, self.hidden_size)
        return (x.new_zeros(*count, self.proj_size) if self.proj_size else c), c

    def _dropped(self: Any, x: Tensor, input: Any, lengths: Tensor | None) -> Tensor:
        """Drop elements between two layers, in torch's order of them, so that a seed means the same mask."""
        if lengths is not None:
            packed = _packed_like(input, x, lengths, self.batch_first)
            packed = packed._replace(data=F.dropout(packed.data, self.dropout))
            return pad_packed_sequence(packed, batch_first=self.batch_first)[0]
        if self.batch_first:
            return F.dropout(x.transpose(0, 1).contiguous(), self.dropout).transpose(0, 1)
        return F.dropout(x, self.dropout)

    @torch.no_grad()
    def _values(
        self: Any, layer: int, x: Tensor, h: Tensor, c: Tensor, axis: int, lengths: Tensor | None, valid: Tensor | None
    ) -> list[Tensor]:
        """Compute the values of one layer's states, direction by direction, by torch's kernel where there is one."""
        ways = 2 if self.bidirectional else 1
        tails = _tails(self)[layer * ways : (layer + 1) * ways]
        if torch.compiler.is_compiling() or transformed():
            lstm = self.mode == "LSTM"
            return [
                _Steps(self, tail, axis, valid).in_a_loop(x, h[way], c[way] if lstm else None, None)[0]
                for way, tail in enumerate(tails)
            ]
        names = [name for name in self._flat_weights_names if any(name.endswith(f"_{tail}") for tail in tails)]
        weights = [getattr(self, name).detach() for name in names]
        kernel = getattr(_VF, self.mode.lower())
        options = (weights, self.bias, 1, 0.0, self.training, self.bidirectional)
        if lengths is None:
            y = kernel(x, (h, c) if self.mode == "LSTM" else h, *options, self.batch_first)[0]
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)
            order = packed.sorted_indices
            start = (h[:, order], c[:, order]) if self.mode == "LSTM" else h[:, order]
            y = packed._replace(data=kernel(packed.data, packed.batch_sizes, start, *options)[0])
            y = pad_packed_sequence(y, batch_first=self.batch_first, total_length=x.shape[axis])[0]
        return list(y.chunk(ways, -1))


def _tails(module: Any) -> list[str]:
    """List the ends of the parameters' names, one a layer and direction."""
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{way}" for layer in range(module.num_layers) for way in ways]


def _last(states: Tensor, axis: int, backwards: bool, lengths: Tensor | None) -> Tensor:
    """Give the state behind the last step of every sequence, (batch, hidden)."""
    if backwards or lengths is None:
        return states.select(axis, 0 if backwards else states.shape[axis] - 1)
    last = lengths.to(states.device) - 1
    last = last.reshape(-1, 1, 1) if axis else last.reshape(1, -1, 1)
    shape = [*states.shape]
    shape[axis] = 1
    return states.gather(axis, last.expand(shape)).squeeze(axis)


def _packed_like(packed: PackedSequence, padded: Tensor, lengths: Tensor, batch_first: bool) -> PackedSequence:
    """Pack a padded tensor in the order of another packed sequence."""
    if packed.sorted_indices is not None:
        padded = padded.index_select(0 if batch_first else 1, packed.sorted_indices)
        lengths = lengths[packed.sorted_indices.cpu()]
    return packed._replace(data=pack_padded_sequence(padded, lengths, batch_first=batch_first).data)


@expands(nn.RNNCellBase)
class ExpandedCell(Expanded):
    """A cell whose two products are layers; a loop of the user's calls it once a step."""

    @staticmethod
    def products(module: Any) -> dict[str, tuple[str, str | None, tuple[int, int] | None]]:
        """Give the products of the input and of the state."""
        return {part: (f"weight_{part}", f"bias_{part}" if module.bias else None, None) for part in ("ih", "hh")}

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """Run a step as the cell's own class does."""
        if self.feedback_part() is not None and not torch.is_grad_enabled():
            return self.plain_forward(input, hx)
        mode = "LSTM" if isinstance(self, nn.LSTMCell) else "GRU" if isinstance(self, nn.GRUCell) else None
        mode = mode or f"RNN_{getattr(self, 'nonlinearity', '').upper()}"
        zeros: Tensor = input.new_zeros((*input.shape[:-1], self.hidden_size))
        h, c = ((zeros, zeros) if hx is None else hx) if mode == "LSTM" else (zeros if hx is None else hx, None)
        ih, hh = self._modules["ih"], self._modules["hh"]
        assert ih is not None
        assert hh is not None
        kept, added, out = _gates(mode, ih(input), hh(h))
        state = added if mode.startswith("RNN") else torch.addcmul(added, kept, h if c is None else c)
        return state if out is None else (out * torch.tanh(state), state)
