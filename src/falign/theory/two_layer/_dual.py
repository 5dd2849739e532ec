"""Algorithm 1 on full batches in the space of the points: exact, without the first layer's weights."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_sizes, one_of, whole_between
from falign.theory._coerce import public, recording, typed
from falign.theory.two_layer._activations import AffineForm, fastest_form
from falign.theory.two_layer._activations import activation as activation_named
from falign.theory.two_layer._schedules import Penalty, checked, shrinkage
from falign.theory.two_layer._start import Reduced, Start, reduce
from falign.theory.two_layer._trajectory import ALWAYS, alignment, chosen, told_of_divergence

# The layout of neurons: chunks that make a batched product fast, tiles that fit a cache.

_CHUNK = 800
"""Neurons of one matrix of a batched product. For n = 50 and 12,800 neurons on two threads chunks of 400, 800 and 1600
took 366, 371 and 379 µs, 100 and 200 took 469 and 387, one product of either layout 419 to 493."""

_CACHED = 3 << 18
"""Preactivations of a tile: few enough to stay in a processor's last cache on the way of a step, with the two arrays
of that size beside them; smaller tiles only cost calls."""

_ON_A_GPU = 1 << 28
"""The same where a step is some kernels a tile and no cache would hold one: on an H100 fifty runs of 12,800 neurons in
fifty tiles took forty times as long as their matrix products alone."""


class Layout(NamedTuple):
    """The most that a tile has: runs, chunks of each, and neurons of a chunk."""

    runs: int
    chunks: int
    neurons: int

    @property
    def whole(self) -> int:
        """Neurons that a tile has of each of its runs."""
        return self.chunks * self.neurons


def layout(n: int, p: int, runs: int, device: str = "cpu") -> Layout:
    """Choose equal chunks where a number of them divides p, an even one for two threads; tiles of about equal size."""
    least = -(-p // _CHUNK)
    least += least % 2 if least > 1 else 0  # an odd number would leave the second thread idle for one chunk
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
class _Tile:
    """Some neurons of some runs: a step works through a tile while it lies in the cache, then goes to the next.

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
        """Index of each run's seed."""
        return torch.arange(self.runs.start, self.runs.stop, device=self.U.device) // penalties

    def part(self, tensor: Float[Tensor, "all *rest"]) -> Float[Tensor, "runs *rest"]:
        """Select what belongs to the tile's runs, as a view."""
        return tensor if self.runs.stop - self.runs.start == len(tensor) else tensor[self.runs]

    def per_chunk(self, tensor: Float[Tensor, "all rows columns"]) -> Float[Tensor, "matrices rows columns"]:
        """Select what belongs to the tile's runs, once a chunk; no copy where the tile has one run or one chunk."""
        part = self.part(tensor)
        if self.chunks == 1:
            return part
        if len(part) == 1:
            return part.expand(self.chunks, -1, -1)
        return part.unsqueeze(1).expand(-1, self.chunks, -1, -1).flatten(0, 1)

    def joined(self, tensor: Float[Tensor, "matrices rows c"]) -> Float[Tensor, "runs rows neurons"]:
        """Put a run's chunks side by side."""
        return tensor.unflatten(0, (-1, self.chunks)).movedim(1, 2).flatten(2)

    def step(
        self, form: AffineForm, keep: Tensor, e: Tensor, gain: float, carry: Tensor, signal: Tensor
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
        e = self.per_chunk(e)
        form.inner.write_carried(self.b, self.U, self.hidden, signal)
        # e weighs the small K and β's update, never the large ψ': each array of the tile's size is passed over once.
        self.beta.mul_(self.per_chunk(keep)).baddbmm_(e, self.hidden, alpha=gain * form.scale)
        if form.shift:
            self.beta.add_(e.sum(-1, keepdim=True), alpha=gain * form.shift)
        self.U.baddbmm_(self.per_chunk(carry), signal)
        form.inner.write(self.U, self.hidden)
        return self.output(form)

    def output(self, form: AffineForm) -> Float[Tensor, "runs n"]:
        """``ψ(U) β`` over the tile's neurons."""
        f = torch.bmm(self.beta, self.hidden.mT)
        if form.shift:
            f = f.mul_(form.scale).add_(self.beta.sum(-1, keepdim=True), alpha=form.shift)
        return f.squeeze(1) if self.chunks == 1 else f.view(-1, self.chunks, f.shape[-1]).sum(1)


def tiles(start: Reduced, form: AffineForm, penalties: int) -> Iterator[_Tile]:
    """Cut the neurons into tiles, of one run per seed and penalty, the penalties within a seed."""
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
            yield _tile(start, form, runs, origin, part, most.neurons)


def _tile(start: Reduced, form: AffineForm, runs: slice, origin: Tensor, part: slice, neurons: int) -> _Tile:
    chunks = max(1, (part.stop - part.start) // neurons)

    def chunked(tensor: Tensor) -> Tensor:
        return tensor[:, :, part][origin].unflatten(-1, (chunks, -1)).movedim(2, 1).flatten(0, 1).contiguous()

    U = chunked(start.U)
    U = U.mul_(form.stretch) if form.stretch != 1 else U
    hidden = U if form.inner.name == "identity" else torch.empty_like(U)
    form.inner.write(U, hidden)
    beta, b = (chunked(weights.unsqueeze(1)) for weights in (start.beta, start.b))
    return _Tile(runs=runs, neurons=part, chunks=chunks, U=U, hidden=hidden, beta=beta, b=b)


@typed
class Dual:
    """Feedback alignment of ``f = (1/√p) βᵀψ(Wx)``, scalar output, on ``U = X Wᵀ`` and β.

    ``U ← U + K (g e ⊙ ψ'(U)) ⊙ bᵀ``, ``β ← (1 - ηλ(t)) β + g ψ(U)ᵀ e`` with ``K = X Xᵀ`` and ``g = η/√p``: the rows
    of W - W(0) stay in the span of the inputs, so nothing is lost. A step costs p n² in place of 2 p n d, and
    its memory is p n. How far W has come is read off U - U(0) with X's pseudoinverse when it is measured, and so are
    the outputs at test points, which cost nothing on the way. Nearly dependent inputs (a large condition number of
    X) magnify the rounding of these numbers, not that of the run.

    The neurons of all runs are worked through in tiles that fit a processor's last cache, each one batched product of
    chunks; ψ and ψ' come from one evaluation, e is multiplied into the small K, not into the large ψ', and tanh is a
    sigmoid in float32 (see ``form``). There is no compiled step: torch.compile, which makes ψ, ψ' ⊙ b and ψ β one
    kernel, took 322 to 240 µs (tanh) and 122 to 121 µs (ReLU) of a step of 12,800 neurons here, under a tenth of it.

    Args:
        start: Data and weights, whole or reduced; they decide dtype and device.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        penalties: One run per seed and penalty.

    Raises:
        ValueError: more than one output, or a rate out of range.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), algorithm 1, as ``WeightSpace``; the reduction is exact for every ψ.
    """

    def __init__(
        self,
        start: Start | Reduced,
        *,
        activation: str = "identity",
        rate: float,
        penalties: Sequence[Penalty] = (Penalty(),),
    ) -> None:
        self.activation = activation_named(activation)
        self.rate, self.penalties = checked(rate, penalties)
        self.start = reduce(start) if isinstance(start, Start) else start
        seeds, _, p = self.start.U.shape
        self._runs = (seeds, len(self.penalties))
        self._root = sqrt(p)
        self.t = 0
        self._y = self._each(self.start.y)
        self._form = fastest_form(self.activation, self.start.U)
        factor = self.rate / self._root * self._form.scale * self._form.stretch**2
        self._gK = self._each(self.start.X @ self.start.X.mT * factor)
        self._tiles = list(tiles(self.start, self._form, self._runs[1]))
        self._scratch = torch.empty_like(max((tile.U for tile in self._tiles), key=torch.numel)).flatten()
        self._e = self._y.clone()
        for tile in self._tiles:
            tile.part(self._e).sub_(tile.output(self._form), alpha=1 / self._root)

    def _each(self, tensor: Tensor) -> Tensor:
        """One copy per run: [seeds …] to [runs …], the penalties within a seed."""
        return tensor.repeat_interleave(self._runs[1], 0)

    def _gather(self, name: str, rows: int) -> Tensor:
        """Put the tiles together, [seeds penalties rows p]."""
        whole = self.start.U.new_empty(self._y.shape[0], rows, self.start.U.shape[2])
        for tile in self._tiles:
            whole[tile.runs, :, tile.neurons] = tile.joined(getattr(tile, name))
        return whole.unflatten(0, self._runs)

    @property
    def beta(self) -> Float[Tensor, "seeds penalties p"]:
        """Output weights β."""
        return self._gather("beta", 1)[:, :, 0]

    @property
    def U(self) -> Float[Tensor, "seeds penalties n p"]:  # noqa: N802
        """``X Wᵀ``."""
        return self._gather("U", self._y.shape[1]) / self._form.stretch

    @public
    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Make that many steps."""
        for keep in shrinkage(self.penalties, self.rate, self.t, steps, self._e):
            self._step(keep.repeat(self._runs[0])[:, None, None])
            self.t += 1

    def _step(self, keep: Tensor) -> None:
        e = self._e.unsqueeze(1)
        carry = self._gK * e
        left = self._y.clone()
        for tile in self._tiles:
            signal = self._scratch[: tile.U.numel()].view_as(tile.U)
            f = tile.step(self._form, keep, e, self.rate / self._root, carry, signal)
            tile.part(left).sub_(f, alpha=1 / self._root)
        self._e = left

    @torch.no_grad()
    def error(self) -> Float[Tensor, "seeds penalties n"]:
        """``e = y - f`` at current weights."""
        return self._e.unflatten(0, self._runs).clone()

    @recording
    @torch.no_grad()
    def measure(self, names: Collection[str] | None = None) -> dict[str, Float[Tensor, "seeds penalties"]]:
        """Loss, alignment and how far the weights have come: the numbers of ``WeightSpace.measure``.

        Args:
            names: Which of them; None for all. The weights' and the test loss need W's way, worked out tile by tile
                at the cost of three to ten steps; the others read β and e.

        Raises:
            ValueError: a name is unknown.

        Warns:
            UserWarning: a run is no longer finite.
        """
        known = [*ALWAYS, *([] if self.start.X_test is None else ["test_loss"])]
        wanted = chosen(names, known)
        values = {"loss": self._e.unflatten(0, self._runs).square().sum(-1) / 2}
        if wanted & {"cosine", "beta_norm", "b_dot_beta", "beta_change"}:
            beta = self.beta
            values |= alignment(self.start.b[:, None, :, None], beta.unsqueeze(-1))
            values["beta_change"] = (beta - self.start.beta.unsqueeze(1)).abs().amax(-1)
        if wanted & {"weight_change", "weight_growth", "test_loss"}:
            values |= self._travelled()
        return told_of_divergence({name: values[name] for name in known if name in wanted}, self.t)

    @cached_property
    def _inverse(self) -> tuple[Float[Tensor, "seeds r n"], Float[Tensor, "seeds m r"] | None]:
        """U -> W in the basis of X's right singular vectors, and on to the test points."""
        start = self.start
        Q, S, _ = torch.linalg.svd(start.X, full_matrices=False)
        # Directions that the inputs do not span: dividing by their rounding would invent a way of W.
        cut = S[:, :1] * max(start.X.shape[1:]) * torch.finfo(S.dtype).eps
        inverse = torch.where(cut < S, 1 / S, 0.0)
        onward = None if start.X_test is None else start.X_test @ start.X.mT @ Q * inverse.unsqueeze(1)
        return inverse.unsqueeze(-1) * Q.mT, onward

    def _travelled(self) -> dict[str, Tensor]:
        """Measure how far W has come, from U - U(0), and the loss at the test points that follows from it."""
        start, (coordinates, onward) = self.start, self._inverse
        far, growth = torch.zeros(2, self._y.shape[0]).to(self._y)
        f = None if onward is None else self._y.new_zeros(self._y.shape[0], onward.shape[1])
        for tile in self._tiles:
            seeds, part = tile.origin(self._runs[1]), tile.neurons
            before, back = start.U[seeds, :, part], coordinates[seeds]
            moved = back @ (tile.joined(tile.U) / self._form.stretch - before)
            far[tile.runs] = torch.maximum(far[tile.runs], moved.square().sum(1).amax(-1))
            growth[tile.runs] += (moved * (back @ before + moved / 2)).sum((-1, -2))
            if f is not None and onward is not None and start.U_test is not None:
                hidden = self.activation.value(start.U_test[seeds, :, part] + onward[seeds] @ moved)
                f[tile.runs] += (hidden @ tile.joined(tile.beta).mT)[..., 0]
        values = {"weight_change": far.sqrt(), "weight_growth": growth}
        if f is not None and start.y_test is not None:
            values["test_loss"] = (self._each(start.y_test) - f / self._root).square().sum(-1) / 2
        return {name: value.unflatten(0, self._runs) for name, value in values.items()}


# Memory of a block of runs, known before it is started.


@public
def bytes_needed(
    engine: str,
    *,
    n: int,
    d: int,
    p: int,
    seeds: int = 1,
    penalties: int = 1,
    outputs: int = 1,
    test: int = 0,
    batch: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> int:
    """Bytes of a block's data, start, state and, at most, of the arrays that live during one step.

    Counted are the tensors of the engine and of the start it was given (for ``dual`` the reduced one, of
    ``draw_reduced``; a whole start adds its W, seeds · p · d), and an upper bound on a step's temporaries. Not counted:
    the interpreter, what a library's matrix product takes for itself, and the start's drawing. Dropout takes three
    more arrays of hidden activities; measuring a block in weight space takes three arrays of one seed's W, and pieces
    of 2²⁴ hidden activities in place of a step's. Measuring how far a dual block's weights have come takes six arrays
    of a tile, measuring the rest of it three of β.

    Args:
        engine: ``weight-space``, ``dual`` or ``width-free``.
        n: Training points.
        d: Input dimension.
        p: Hidden neurons; no matter for ``width-free``.
        seeds: Runs of different draws.
        penalties: Runs of each draw.
        outputs: k, for ``weight-space``.
        test: Points that are measured and not trained on.
        batch: Points of a step, for ``weight-space``; None for all.
        dtype: Of the run.

    Raises:
        ValueError: there is no such engine, or a size is below 1.
    """
    check_sizes(n=n, d=d, p=p, seeds=seeds, penalties=penalties, outputs=outputs, batch=batch)
    whole_between("test", test, 0)
    one_of("engine", engine, ("weight-space", "dual", "width-free"))
    runs = seeds * penalties
    data = seeds * (n + test) * (d + (outputs if engine == "weight-space" else 1))
    if engine == "weight-space":
        points = n if batch is None else batch
        weights = seeds * p * (d + 2 * outputs) + runs * p * (d + outputs)
        step = 4 * runs * p * points + 2 * runs * p * outputs + seeds * points * (d + outputs)
        numbers = data + weights + step + 4 * runs * points * outputs
    elif engine == "dual":
        most = layout(n, p, runs)
        start = seeds * (p * (n + test + 2) + (n + test) * min(n, d))
        state = runs * (2 * n * p + 2 * p + n * n + 2 * n) + n * most.runs * most.whole
        copies = most.runs * most.chunks * (n * n + 3 * n + 2) if most.runs > 1 < most.chunks else 0
        numbers = data + start + state + runs * (n * n + 5 * n) + copies
    else:
        r = min(n, d)
        gram = seeds * (n * r + r * r + 4 * r + n + 4) + seeds * test * (2 * r + 3)
        state = seeds * ((r + 1) * (r + 2) + r) + runs * (4 * r + 3)
        numbers = gram + state + 2 * runs * r
    return numbers * dtype.itemsize
