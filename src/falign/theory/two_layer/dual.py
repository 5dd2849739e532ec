"""Algorithm 1 on full batches in the space of the points: exact, without the first layer's weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.two_layer.activations import activation as activation_named
from falign.theory.two_layer.measures import alignment, largest
from falign.theory.two_layer.reduced import Reduced, reduce
from falign.theory.two_layer.schedules import Penalty, checked, shrinkage
from falign.theory.two_layer.start import Start

_CACHED = 1 << 20
"""Preactivations of a piece: few enough to stay in a processor's last cache on the way of a step, with the two arrays
of that size beside them; more pieces only cost calls."""


def piece_size(n: int, p: int) -> tuple[int, int]:
    """How many runs and neurons a piece has at most."""
    neurons = min(p, max(1, _CACHED // n))
    return max(1, _CACHED // (n * neurons)), neurons


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Some neurons of some runs: what a step changes and nothing else touches meanwhile."""

    runs: slice
    neurons: slice
    U: Tensor
    hidden: Tensor
    beta: Tensor
    b: Tensor


class Dual:
    """Feedback alignment of ``f = (1/√p) βᵀψ(Wx)``, scalar output, on ``U = X Wᵀ`` and β.

    ``U ← U + K (g e ⊙ ψ'(U)) ⊙ bᵀ``, ``β ← (1 - ηλ(t)) β + g ψ(U)ᵀ e`` with ``K = X Xᵀ`` and ``g = η/√p``: the rows
    of W - W(0) stay in the span of the inputs, so nothing is lost. A step costs p n² for the literal 2 p n d, and
    its memory is p n. How far W has come is read off U - U(0) with X's pseudoinverse when it is measured, and so are
    the outputs at test points, which cost nothing on the way. Nearly dependent inputs (a large condition number of
    X) magnify the rounding of these numbers, not that of the run.

    The neurons of all runs are worked through in pieces that fit a processor's last cache; ψ and ψ' come from one
    evaluation; e is multiplied into the small K, not into the large ψ'. In float32 tanh is taken as 2σ(2u) - 1, to
    2e-7 absolute, several times as fast as the library's. There is no compiled step: on a
    busy machine of two cores torch.compile brought no clear gain over these passes.

    Args:
        start: Data and weights, whole or reduced; they decide dtype and device.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        penalties: One run per seed and penalty.

    Raises:
        ValueError: more than one output, or a rate out of range.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), algorithm 1, as ``Literal``; the reduction is exact for every ψ.
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
        self._K = self._each(self.start.X @ self.start.X.mT)
        self._y = self._each(self.start.y)
        self._pieces = self._cut()
        self._scratch = torch.empty_like(max((piece.U for piece in self._pieces), key=torch.numel)).flatten()
        self._e = self._y.clone()
        for piece in self._pieces:
            self._e[piece.runs] -= (piece.beta @ piece.hidden.mT)[:, 0] / self._root

    def _each(self, tensor: Tensor) -> Tensor:
        """One copy per run: [seeds …] to [runs …], the penalties within a seed."""
        return tensor.repeat_interleave(self._runs[1], 0)

    def _cut(self) -> list[_Piece]:
        """Pieces of at most ``_CACHED`` preactivations: neurons of one run, or several runs where they are narrow."""
        seeds, n, p = self.start.U.shape
        runs, neurons = piece_size(n, p)
        pieces, count = [], seeds * self._runs[1]
        for first in range(0, count, runs):
            some = slice(first, min(first + runs, count))
            origin = torch.arange(count)[some].to(self.start.U.device) // self._runs[1]
            for left in range(0, p, neurons):
                part = slice(left, min(left + neurons, p))
                U = self.start.U[:, :, part][origin].contiguous()
                hidden = U if self.activation.name == "identity" else torch.empty_like(U)
                self.activation.write(U, hidden)
                beta, b = (w[:, None, part][origin].contiguous() for w in (self.start.beta, self.start.b))
                pieces.append(_Piece(runs=some, neurons=part, U=U, hidden=hidden, beta=beta, b=b))
        return pieces

    def _gather(self, name: str, rows: int) -> Tensor:
        """The pieces put together, [seeds penalties rows p]."""
        whole = self.start.U.new_empty(self._y.shape[0], rows, self.start.U.shape[2])
        for piece in self._pieces:
            whole[piece.runs, :, piece.neurons] = getattr(piece, name)
        return whole.unflatten(0, self._runs)

    @property
    def beta(self) -> Float[Tensor, "seeds penalties p"]:
        """Output weights β."""
        return self._gather("beta", 1)[:, :, 0]

    @property
    def U(self) -> Float[Tensor, "seeds penalties n p"]:  # noqa: N802
        """``X Wᵀ``."""
        return self._gather("U", self._y.shape[1])

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Make that many steps."""
        keep = shrinkage(self.penalties, self.rate, self.t, steps).to(self._e)
        for row in keep.repeat(1, self._runs[0])[:, :, None, None]:
            self._step(row)
            self.t += 1

    def _step(self, keep: Tensor) -> None:
        e = (self.rate / self._root) * self._e.unsqueeze(1)
        carry = self._K * e
        f = torch.zeros_like(self._y)
        for piece in self._pieces:
            signal = self._scratch[: piece.U.numel()].view_as(piece.U)
            self.activation.write_carried(piece.b, piece.U, piece.hidden, signal)
            piece.beta.mul_(keep[piece.runs]).baddbmm_(e[piece.runs], piece.hidden)
            piece.U.baddbmm_(carry[piece.runs], signal)
            self.activation.write(piece.U, piece.hidden)
            f[piece.runs] += (piece.beta @ piece.hidden.mT)[:, 0]
        self._e = self._y - f / self._root

    @torch.no_grad()
    def error(self) -> Float[Tensor, "seeds penalties n"]:
        """``e = y - f`` at current weights."""
        return self._e.unflatten(0, self._runs).clone()

    @torch.no_grad()
    def measure(self) -> dict[str, Float[Tensor, "seeds penalties"]]:
        """Loss, alignment and how far the weights have come: the numbers of ``Literal.measure``."""
        start = self.start
        beta = self.beta.unsqueeze(-1)
        found = {
            "loss": self._e.unflatten(0, self._runs).square().sum(-1) / 2,
            **alignment(start.b[:, None, :, None], beta),
            "beta_change": (self.beta - start.beta.unsqueeze(1)).abs().amax(-1),
        }
        Q, S, _ = torch.linalg.svd(start.X, full_matrices=False)
        cut = S[:, :1] * max(start.X.shape[1:]) * torch.finfo(S.dtype).eps
        inverse = torch.where(cut < S, 1 / S, 0.0)
        coordinates = (inverse.unsqueeze(-1) * Q.mT).unsqueeze(1)
        change = self.U - start.U.unsqueeze(1)
        moved = coordinates @ change
        found["weight_change"] = largest(moved.mT)
        found["weight_growth"] = (moved * (coordinates @ start.U.unsqueeze(1) + moved / 2)).sum((-1, -2))
        if start.X_test is not None and start.U_test is not None and start.y_test is not None:
            carry = (start.X_test @ start.X.mT @ Q * inverse.unsqueeze(1)).unsqueeze(1)
            U_test = start.U_test.unsqueeze(1) + carry @ moved
            f = (self.activation.value(U_test) @ beta)[..., 0] / self._root
            found["test_loss"] = (start.y_test.unsqueeze(1) - f).square().sum(-1) / 2
        return found
