"""Algorithm 1 on full batches in the space of the points: exact, without the first layer's weights."""

from collections.abc import Collection, Sequence
from functools import cached_property
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public, recording, typed
from falign.theory.two_layer.activations import activation as activation_named
from falign.theory.two_layer.activations import form
from falign.theory.two_layer.measures import ALWAYS, alignment, chosen, told_of_divergence
from falign.theory.two_layer.pieces import cut
from falign.theory.two_layer.reduced import Reduced, reduce
from falign.theory.two_layer.schedules import Penalty, checked, shrinkage
from falign.theory.two_layer.start import Start


@typed
class Dual:
    """Feedback alignment of ``f = (1/√p) βᵀψ(Wx)``, scalar output, on ``U = X Wᵀ`` and β.

    ``U ← U + K (g e ⊙ ψ'(U)) ⊙ bᵀ``, ``β ← (1 - ηλ(t)) β + g ψ(U)ᵀ e`` with ``K = X Xᵀ`` and ``g = η/√p``: the rows
    of W - W(0) stay in the span of the inputs, so nothing is lost. A step costs p n² for the literal 2 p n d, and
    its memory is p n. How far W has come is read off U - U(0) with X's pseudoinverse when it is measured, and so are
    the outputs at test points, which cost nothing on the way. Nearly dependent inputs (a large condition number of
    X) magnify the rounding of these numbers, not that of the run.

    The neurons of all runs are worked through in pieces that fit a processor's last cache, each one batched product of
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
        self._y = self._each(self.start.y)
        self._form = form(self.activation, self.start.U)
        factor = self.rate / self._root * self._form.scale * self._form.stretch**2
        self._gK = self._each(self.start.X @ self.start.X.mT * factor)
        self._pieces = list(cut(self.start, self._form, self._runs[1]))
        self._scratch = torch.empty_like(max((piece.U for piece in self._pieces), key=torch.numel)).flatten()
        self._e = self._y.clone()
        for piece in self._pieces:
            piece.part(self._e).sub_(piece.output(self._form), alpha=1 / self._root)

    def _each(self, tensor: Tensor) -> Tensor:
        """One copy per run: [seeds …] to [runs …], the penalties within a seed."""
        return tensor.repeat_interleave(self._runs[1], 0)

    def _gather(self, name: str, rows: int) -> Tensor:
        """The pieces put together, [seeds penalties rows p]."""
        whole = self.start.U.new_empty(self._y.shape[0], rows, self.start.U.shape[2])
        for piece in self._pieces:
            whole[piece.runs, :, piece.neurons] = piece.joined(getattr(piece, name))
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
        for piece in self._pieces:
            signal = self._scratch[: piece.U.numel()].view_as(piece.U)
            f = piece.step(self._form, keep, e, self.rate / self._root, carry, signal)
            piece.part(left).sub_(f, alpha=1 / self._root)
        self._e = left

    @torch.no_grad()
    def error(self) -> Float[Tensor, "seeds penalties n"]:
        """``e = y - f`` at current weights."""
        return self._e.unflatten(0, self._runs).clone()

    @recording
    @torch.no_grad()
    def measure(self, names: Collection[str] | None = None) -> dict[str, Float[Tensor, "seeds penalties"]]:
        """Loss, alignment and how far the weights have come: the numbers of ``Literal.measure``.

        Args:
            names: Which of them; None for all. The weights' and the test loss need W's way, worked out piece by piece
                at the cost of three to ten steps; the others read β and e.

        Raises:
            ValueError: a name is unknown.

        Warns:
            UserWarning: a run is no longer finite.
        """
        known = [*ALWAYS, *([] if self.start.X_test is None else ["test_loss"])]
        wanted = chosen(names, known)
        found = {"loss": self._e.unflatten(0, self._runs).square().sum(-1) / 2}
        if wanted & {"cosine", "beta_norm", "b_dot_beta", "beta_change"}:
            beta = self.beta
            found |= alignment(self.start.b[:, None, :, None], beta.unsqueeze(-1))
            found["beta_change"] = (beta - self.start.beta.unsqueeze(1)).abs().amax(-1)
        if wanted & {"weight_change", "weight_growth", "test_loss"}:
            found |= self._travelled()
        return told_of_divergence({name: found[name] for name in known if name in wanted}, self.t)

    @cached_property
    def _inverse(self) -> tuple[Float[Tensor, "seeds r n"], Float[Tensor, "seeds m r"] | None]:
        """U -> W in the basis of X's right singular vectors, and on to the test points."""
        start = self.start
        Q, S, _ = torch.linalg.svd(start.X, full_matrices=False)
        cut = S[:, :1] * max(start.X.shape[1:]) * torch.finfo(S.dtype).eps
        inverse = torch.where(cut < S, 1 / S, 0.0)
        onward = None if start.X_test is None else start.X_test @ start.X.mT @ Q * inverse.unsqueeze(1)
        return inverse.unsqueeze(-1) * Q.mT, onward

    def _travelled(self) -> dict[str, Tensor]:
        """What U - U(0) tells of the way of W, and the loss at the test points that follows from it."""
        start, (coordinates, onward) = self.start, self._inverse
        far, growth = torch.zeros(2, self._y.shape[0]).to(self._y)
        f = None if onward is None else self._y.new_zeros(self._y.shape[0], onward.shape[1])
        for piece in self._pieces:
            seeds, part = piece.origin(self._runs[1]), piece.neurons
            before, back = start.U[seeds, :, part], coordinates[seeds]
            moved = back @ (piece.joined(piece.U) / self._form.stretch - before)
            far[piece.runs] = torch.maximum(far[piece.runs], moved.square().sum(1).amax(-1))
            growth[piece.runs] += (moved * (back @ before + moved / 2)).sum((-1, -2))
            if f is not None and onward is not None and start.U_test is not None:
                hidden = self.activation.value(start.U_test[seeds, :, part] + onward[seeds] @ moved)
                f[piece.runs] += (hidden @ piece.joined(piece.beta).mT)[..., 0]
        found = {"weight_change": far.sqrt(), "weight_growth": growth}
        if f is not None and start.y_test is not None:
            found["test_loss"] = (self._each(start.y_test) - f / self._root).square().sum(-1) / 2
        return {name: value.unflatten(0, self._runs) for name, value in found.items()}
