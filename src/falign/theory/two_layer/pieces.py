"""How the neurons of a block of runs are laid out: chunks for a fast batched product, pieces that fit a cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.two_layer.activations import Form
from falign.theory.two_layer.reduced import Reduced

_CHUNK = 800
"""Neurons of one matrix of a batched product. For n = 50 and 12,800 neurons on two threads chunks of 400, 800 and 1600
took 366, 371 and 379 µs, 100 and 200 took 469 and 387, one product of either layout 419 to 493."""

_CACHED = 3 << 18
"""Preactivations of a piece: few enough to stay in a processor's last cache on the way of a step, with the two arrays
of that size beside them; smaller pieces only cost calls."""

_ON_A_GPU = 1 << 28
"""The same where a step is some kernels a piece and no cache would hold one: on an H100 fifty runs of 12,800 neurons in
fifty pieces took forty times as long as their matrix products alone."""


class Layout(NamedTuple):
    """What a piece has at most: runs, chunks of each, and the neurons of a chunk."""

    runs: int
    chunks: int
    neurons: int

    @property
    def whole(self) -> int:
        """Neurons that a piece has of each of its runs."""
        return self.chunks * self.neurons


def layout(n: int, p: int, runs: int, device: str = "cpu") -> Layout:
    """Equal chunks where a number of them divides p, an even one for two threads; pieces of about equal size."""
    least = -(-p // _CHUNK)
    least += least % 2 if least > 1 else 0
    chunks = min(p, next((m for m in range(least, 2 * least, 2) if p % m == 0), least))
    neurons = p // chunks
    most = max(1, (_CACHED if device == "cpu" else _ON_A_GPU) // (n * neurons))
    if most < chunks:
        return Layout(1, _even(chunks, most), neurons)
    return Layout(_even(runs, most // chunks), chunks, neurons)


def _even(count: int, most: int) -> int:
    """The size of equal parts, none above ``most``."""
    parts = -(-count // most)
    return -(-count // parts)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some neurons of some runs: what a step changes and nothing else touches meanwhile.

    Attributes:
        runs: Which of all runs.
        neurons: Which of each run.
        chunks: How many matrices each run has in it.
        U: What φ of the form is taken of, [runs·chunks n c].
        hidden: φ of it; the same tensor for the identity.
        beta: Output weights [runs·chunks 1 c].
        b: Feedback weights [runs·chunks 1 c].
    """

    runs: slice
    neurons: slice
    chunks: int
    U: Tensor
    hidden: Tensor
    beta: Tensor
    b: Tensor

    def origin(self, penalties: int) -> Tensor:
        """Which seed each run is of."""
        return torch.arange(self.runs.start, self.runs.stop, device=self.U.device) // penalties

    def part(self, tensor: Float[Tensor, "all *rest"]) -> Float[Tensor, "runs *rest"]:
        """What belongs to the runs, a view."""
        return tensor if self.runs.stop - self.runs.start == len(tensor) else tensor[self.runs]

    def spread(self, tensor: Float[Tensor, "all rows columns"]) -> Float[Tensor, "own rows columns"]:
        """What belongs to the runs, once for each chunk; no copy where one run or one chunk is in the piece."""
        own = self.part(tensor)
        if self.chunks == 1:
            return own
        if len(own) == 1:
            return own.expand(self.chunks, -1, -1)
        return own.unsqueeze(1).expand(-1, self.chunks, -1, -1).flatten(0, 1)

    def joined(self, tensor: Float[Tensor, "own rows c"]) -> Float[Tensor, "runs rows neurons"]:
        """A run's chunks side by side."""
        return tensor.unflatten(0, (-1, self.chunks)).movedim(1, 2).flatten(2)

    def step(
        self, form: Form, keep: Tensor, e: Tensor, gain: float, carry: Tensor, signal: Tensor
    ) -> Float[Tensor, "runs n"]:
        """Make a step and return ``ψ(U) β``.

        Args:
            form: How ψ is computed.
            keep: The decay of β, [runs 1 1] of all runs.
            e: Errors [runs 1 n] of all runs.
            gain: g.
            carry: ``g K`` times the diagonal matrix of e and the form's factor, [runs n n] of all runs.
            signal: Room for ``φ' ⊙ b``.
        """
        e = self.spread(e)
        form.inner.write_carried(self.b, self.U, self.hidden, signal)
        self.beta.mul_(self.spread(keep)).baddbmm_(e, self.hidden, alpha=gain * form.scale)
        if form.shift:
            self.beta.add_(e.sum(-1, keepdim=True), alpha=gain * form.shift)
        self.U.baddbmm_(self.spread(carry), signal)
        form.inner.write(self.U, self.hidden)
        return self.output(form)

    def output(self, form: Form) -> Float[Tensor, "runs n"]:
        """``ψ(U) β`` over the piece's neurons."""
        f = torch.bmm(self.beta, self.hidden.mT)
        if form.shift:
            f = f.mul_(form.scale).add_(self.beta.sum(-1, keepdim=True), alpha=form.shift)
        return f.squeeze(1) if self.chunks == 1 else f.view(-1, self.chunks, f.shape[-1]).sum(1)


def cut(start: Reduced, form: Form, penalties: int) -> Iterator[Piece]:
    """The pieces of one run per seed and penalty, the penalties within a seed."""
    seeds, n, p = start.U.shape
    count = seeds * penalties
    most = layout(n, p, count, start.U.device.type)
    end = p - p % most.neurons
    parts = [slice(left, min(left + most.whole, end)) for left in range(0, end, most.whole)]
    if end < p:
        parts.append(slice(end, p))
    for first in range(0, count, most.runs):
        runs = slice(first, min(first + most.runs, count))
        origin = torch.arange(runs.start, runs.stop, device=start.U.device) // penalties
        for part in parts:
            yield _piece(start, form, runs, origin, part, most.neurons)


def _piece(start: Reduced, form: Form, runs: slice, origin: Tensor, part: slice, neurons: int) -> Piece:
    chunks = max(1, (part.stop - part.start) // neurons)

    def own(tensor: Tensor) -> Tensor:
        return tensor[:, :, part][origin].unflatten(-1, (chunks, -1)).movedim(2, 1).flatten(0, 1).contiguous()

    U = own(start.U)
    U = U.mul_(form.stretch) if form.stretch != 1 else U
    hidden = U if form.inner.name == "identity" else torch.empty_like(U)
    form.inner.write(U, hidden)
    beta, b = (own(weights.unsqueeze(1)) for weights in (start.beta, start.b))
    return Piece(runs=runs, neurons=part, chunks=chunks, U=U, hidden=hidden, beta=beta, b=b)
