"""Linear feedback alignment in the coordinates that its run stays in: the width enters as a number."""

from collections.abc import Collection, Sequence
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public, recording, typed
from falign.theory.two_layer.gram import Gram, from_start, sample
from falign.theory.two_layer.measures import chosen, ratio, told_of_divergence
from falign.theory.two_layer.reduced import Reduced
from falign.theory.two_layer.schedules import Penalty, checked, shrinkage
from falign.theory.two_layer.start import Scale, Start
from falign.theory.two_layer.streams import check_dtype


@typed
class WidthFree:
    """Feedback alignment of the linear network ``f = (1/√p) βᵀWx``, at r² a step for any width, r = min(n, d).

    W(t) is W(0) plus a multiple of b and β(t) stays in the span of β(0), W(0)Xᵀ and b:
    ``W(t)Xᵀ = Z + b σᵀ``, ``β(t) = a β(0) + Z u + c b`` with ``Z = W(0)Xᵀ``, and with e = y - f, g = η/√p, decay
    ``k = 1 - ηλ(t)``: ``σ ← σ + gKe``, ``a ← ka``, ``u ← ku + ge``, ``c ← kc + g σᵀe``. The output needs only the
    inner products of (Z, β(0), b), a Wishart matrix, and |y| outside X's column space never moves. What is held is
    ``√p σ``, ``√p u`` and ``p c``, which have limits for p → ∞, in the left singular basis of X, where K is diagonal.
    Exact for every p; a width of 10⁹ is as well conditioned as one of 100.

    Args:
        gram: Inner products and data; ``from_start`` and ``sample`` make it.
        rate: η.
        penalties: One run per seed and penalty.

    Raises:
        ValueError: a rate out of range, or a Gram that is in neither float32 nor float64.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 6, equation for β(t), with the square on its last
    coefficient that the print has lost; the rest is derived here.
    """

    def __init__(self, gram: Gram, *, rate: float, penalties: Sequence[Penalty] = (Penalty(),)) -> None:
        check_dtype(gram.y.dtype)
        self.gram = gram
        self.rate, self.penalties = checked(rate, penalties)
        self.t = 0
        seeds, r = gram.y.shape
        runs = len(self.penalties)
        self._map = _output_map(gram)
        self._p, self._y = gram.p[:, None], gram.y.unsqueeze(1)
        self._drive = (rate * gram.K).unsqueeze(1)
        self._decaying = gram.y.new_zeros(seeds, runs, r + 2)
        self._u, a, self._c = self._decaying.split([r, 1, 1], -1)
        a.fill_(1)
        self._sigma = gram.y.new_zeros(seeds, runs, r)
        self._through = gram.y.new_empty(seeds, runs, r + 1)
        self._on_Z, self._on_b = self._through.split([r, 1], -1)
        self._e = gram.y.new_empty(seeds, runs, r)
        self._answer()

    @classmethod
    @public
    def from_start(
        cls, start: Start | Reduced, *, rate: float, penalties: Sequence[Penalty] = (Penalty(),)
    ) -> "WidthFree":
        """The run of that start: what ``Literal`` gives, to rounding."""
        return cls(from_start(start), rate=rate, penalties=penalties)

    @classmethod
    @public
    def sample(
        cls,
        seeds: Sequence[int],
        *,
        n: int,
        d: int,
        p: SupportsIndex | Sequence[SupportsIndex],
        rate: float,
        penalties: Sequence[Penalty] = (Penalty(),),
        inputs: Scale = "standard",
        test: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> "WidthFree":
        """A run in law: inputs as ``draw`` draws them, weights and teacher as a Wishart matrix.

        Args:
            seeds: One run each.
            n: Training points.
            d: Input dimension.
            p: Width of the network and its linear teacher, an integer of any type below 2⁶³, one for all seeds or
                one for each.
            rate: η.
            penalties: One run per seed and penalty.
            inputs: Distribution of the inputs.
            test: Points that are measured and not trained on.
            dtype: Of the run.
            device: Of the run.
        """
        gram = sample(seeds, n=n, d=d, p=p, inputs=inputs, test=test)
        return cls(gram.to(device, dtype), rate=rate, penalties=penalties)

    @public
    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Make that many steps."""
        for keep in shrinkage(self.penalties, self.rate, self.t, steps, self._e):
            grown = (self._sigma * self._e).sum(-1, keepdim=True)
            self._decaying.mul_(keep.unsqueeze(-1))
            self._u.add_(self._e, alpha=self.rate)
            self._c.add_(grown, alpha=self.rate)
            self._sigma.addcmul_(self._drive, self._e)
            self._answer()
            self.t += 1

    def _answer(self) -> None:
        """``e = y - (1/√p)(Zᵀβ + σ bᵀβ)``: one product with the inner products."""
        torch.bmm(self._decaying, self._map, out=self._through)
        torch.sub(self._y, self._on_Z, out=self._e)
        self._e.addcmul_(self._sigma, self._on_b, value=-1)

    @torch.no_grad()
    def error(self) -> Float[Tensor, "seeds penalties n"]:
        """``e = y - f`` at the training points."""
        return self._e @ self.gram.basis.mT + self.gram.rest.unsqueeze(1)

    @recording
    @torch.no_grad()
    def measure(self, names: Collection[str] | None = None) -> dict[str, Float[Tensor, "seeds penalties"]]:
        """Loss, alignment and growth: ``Literal.measure`` without the maxima over neurons.

        Args:
            names: Which of them; None for all.

        Raises:
            ValueError: a name is unknown.

        Warns:
            UserWarning: a run is no longer finite.
        """
        gram, p, root = self.gram, self._p, self._p.sqrt()
        u, a, c = self._u, self._decaying[..., -2], self._decaying[..., -1]
        tau, rho, nu = gram.b_b.unsqueeze(1), gram.b_beta.unsqueeze(1), gram.beta_beta.unsqueeze(1)
        u_b, u_beta = (u * gram.Z_b.unsqueeze(1)).sum(-1), (u * gram.Z_beta.unsqueeze(1)).sum(-1)
        dot = a * root * rho + u_b + tau * c
        square = a * a * p * nu + (u @ gram.Z_Z * u).sum(-1) + c * c * tau / p
        square = square + 2 * a * (u_beta + c * rho / root) + 2 * c * u_b / p
        norm = square.clamp_min(0).sqrt()
        q = torch.where(gram.K > 0, 1 / gram.K, 0.0).unsqueeze(1) * self._sigma
        rest = gram.rest.square().sum(-1, keepdim=True)
        found = {
            "loss": (self._e.square().sum(-1) + rest) / 2,
            "cosine": ratio(dot, norm * (p * tau).sqrt()),
            "beta_norm": norm,
            "b_dot_beta": dot,
            "weight_growth": (q * gram.Z_b.unsqueeze(1)).sum(-1) + tau / 2 * (q * self._sigma).sum(-1),
        }
        if gram.test is not None:
            found["test_loss"] = gram.test.loss(self._decaying, q, self._on_b)
        wanted = chosen(names, found)
        return told_of_divergence({name: value for name, value in found.items() if name in wanted}, self.t)


def _output_map(gram: Gram) -> Float[Tensor, "seeds r_2 r_1"]:
    """(√p u, a, p c) -> (Zᵀβ/√p, bᵀβ/p), to be multiplied from the right: the fast side of a batched product."""
    p = gram.p[:, None]
    on_Z = torch.cat([gram.Z_Z, gram.Z_beta.unsqueeze(1), (gram.Z_b / p).unsqueeze(1)], 1)
    on_b = torch.cat([gram.Z_b / p, gram.b_beta[:, None] / p.sqrt(), gram.b_b[:, None] / p], 1)
    return torch.cat([on_Z, on_b.unsqueeze(-1)], -1)
