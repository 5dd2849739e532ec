"""Linear feedback alignment in the coordinates that its run stays in: the width enters as a number."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_memory, whole_number
from falign.feedback import generator
from falign.theory._coerce import public, recording, typed
from falign.theory.two_layer._schedules import Penalty, checked, shrinkage
from falign.theory.two_layer._start import Reduced, Scale, Start, check_dtype, inputs_of, reduce
from falign.theory.two_layer._trajectory import chosen, ratio, told_of_divergence

# Inner products of the initial weights, all that a linear network's run depends on: computed or drawn.


@typed
@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The same for points that are not trained on.

    Attributes:
        y: Targets [seeds m].
        K: ``X_test Xᵀ``, with X in the basis [seeds m r].
        through: ``Z_testᵀ`` times (Z/p, β/√p, b/p√p) [seeds m r+2].
    """

    y: Tensor
    K: Tensor
    through: Tensor

    def loss(self, decaying: Tensor, q: Tensor, on_b: Tensor) -> Float[Tensor, "seeds penalties"]:
        """``½|y - f|²`` from the run's coordinates (√p u, a, p c), √p q with σ = Kq, and bᵀβ/p."""
        f = decaying @ self.through.mT + q @ self.K.mT * on_b
        return (self.y.unsqueeze(1) - f).square().sum(-1) / 2


@typed
@dataclass(frozen=True, kw_only=True)
class Gram:
    """Inner products of Z = W(0)Xᵀ, β(0) and b, scaled to have limits for p → ∞; X in its left singular basis.

    Attributes:
        p: Widths [seeds].
        K: Squared singular values of X [seeds r].
        y: Targets in the basis [seeds r].
        rest: y outside X's column space [seeds n].
        basis: The basis [seeds n r].
        Z_Z: ZᵀZ/p [seeds r r].
        Z_beta: Zᵀβ(0)/√p [seeds r].
        Z_b: Zᵀb/√p [seeds r].
        b_beta: bᵀβ(0)/√p [seeds].
        b_b: |b|²/p [seeds].
        beta_beta: |β(0)|²/p [seeds].
        test: The same of test points, or None.
    """

    p: Tensor
    K: Tensor
    y: Tensor
    rest: Tensor
    basis: Tensor
    Z_Z: Tensor
    Z_beta: Tensor
    Z_b: Tensor
    b_beta: Tensor
    b_b: Tensor
    beta_beta: Tensor
    test: HeldOut | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Gram":
        """The same on another device or in another dtype."""

        def moved(owner: "Gram | HeldOut") -> dict[str, Tensor]:
            pairs = ((field.name, getattr(owner, field.name)) for field in fields(owner))
            return {name: value.to(device, dtype) for name, value in pairs if isinstance(value, Tensor)}

        test = None if self.test is None else HeldOut(**moved(self.test))
        return replace(self, **moved(self), test=test)


@public
def from_start(start: Start | Reduced) -> Gram:
    """The inner products of a start's own weights, by summation over its neurons."""
    reduced = reduce(start) if isinstance(start, Start) else start
    parts = [start.beta.unsqueeze(-1), start.b.unsqueeze(-1)]
    Q = torch.linalg.svd(reduced.X, full_matrices=False)[0]
    columns = [(Q.mT @ reduced.U).mT, *([] if reduced.U_test is None else [reduced.U_test.mT]), *parts]
    stack = torch.cat(columns, -1)
    p = torch.full((stack.shape[0],), float(stack.shape[1])).to(stack)
    return _scaled(p, stack.mT @ stack / stack.shape[1], reduced.X, reduced.y, reduced.X_test, reduced.y_test)


@public
def sample(
    seeds: Sequence[int],
    *,
    n: int,
    d: int,
    p: SupportsIndex | Sequence[SupportsIndex],
    inputs: Scale = "standard",
    test: int = 0,
) -> Gram:
    """Inputs, and inner products and a linear teacher of width p drawn in law, in float64 on the CPU.

    In an orthonormal basis of the inputs' span (W(0), β(0), b) are independent N(0, 1), so their products are a
    Wishart matrix of p degrees of freedom, drawn by Bartlett's decomposition: a triangle of normals and χ numbers,
    whatever the width. The teacher's answers are ``y = Xv``, v ~ N(0, |β*|²/p I_d), |β*|² ~ χ²_p.

    Args:
        seeds: One run each.
        n: Training points.
        d: Input dimension.
        p: Width, an integer of any type, one for all seeds or one for each.
        inputs: Distribution of the inputs, drawn from the generators that ``draw`` uses.
        test: Points that are not trained on.

    Raises:
        ValueError: a size is below 1 or no integer, or there are not as many widths as seeds.
    """
    several = p if isinstance(p, Iterable) and getattr(p, "ndim", 1) else [p] * len(seeds)
    widths = [whole_number("p", width) for width in several]
    if len(widths) != len(seeds):
        raise ValueError(f"{len(widths)} widths were given for {len(seeds)} seeds: one for all or one for each")
    if not seeds or min(n, d, *widths) < 1 or test < 0:
        raise ValueError(f"sizes must be at least 1, got seeds={len(seeds)}, n={n}, d={d}, p={p}, test={test}")
    check_memory("inputs", len(seeds), n + test, d)
    check_memory("products", len(seeds), min(n + test, d) + 2, min(n + test, d) + 2)
    X = torch.stack([inputs_of(seed, n, d, inputs) for seed in seeds])
    X_test = torch.stack([inputs_of(seed, test, d, inputs, "test inputs") for seed in seeds])
    points = torch.cat([X, X_test], 1)
    v = torch.stack([_teacher(seed, d, width) for seed, width in zip(seeds, widths, strict=True)])
    y = (points @ v.unsqueeze(-1)).squeeze(-1)
    span = torch.linalg.svd(points, full_matrices=False)[2]
    Q = torch.linalg.svd(X, full_matrices=False)[0]
    D = span.shape[1]
    factors = torch.stack([_factor(seed, D + 2, width) for seed, width in zip(seeds, widths, strict=True)])
    seen = torch.cat([Q.mT @ X, X_test], 1) @ span.mT
    factors = torch.cat([seen @ factors[:, :D], factors[:, D:]], 1)
    tests = (X_test, y[:, n:]) if test else (None, None)
    return _scaled(torch.tensor(widths).double(), factors @ factors.mT, X, y[:, :n], *tests)


def _factor(seed: int, size: int, p: int) -> Tensor:
    """L with L Lᵀ ~ Wishart(p, I)/p: Bartlett's triangle, or the p normals themselves where they are fewer."""
    random = generator(seed, "two-layer", "products")
    if p < size:
        normals = torch.randn(size, p, generator=random, dtype=torch.float64)
        return torch.nn.functional.pad(normals, (0, size - p)) / p**0.5
    lower = torch.randn(size, size, generator=random, dtype=torch.float64).tril(-1)
    # PyTorch draws no χ² from a generator: NumPy does, seeded by the same stream.
    squares = np.random.default_rng(random.initial_seed()).chisquare(p - np.arange(size))
    return (lower + torch.from_numpy(np.sqrt(squares)).diag()) / p**0.5


def _teacher(seed: int, d: int, p: int) -> Tensor:
    """``v = W*ᵀβ*/√p`` in law."""
    random = generator(seed, "two-layer", "width-free teacher")
    norm = np.sqrt(np.random.default_rng(random.initial_seed()).chisquare(p) / p)
    return torch.randn(d, generator=random, dtype=torch.float64) * float(norm)


def _scaled(p: Tensor, products: Tensor, X: Tensor, y: Tensor, X_test: Tensor | None, y_test: Tensor | None) -> Gram:
    """Cut the products (Z in the basis, Z_test, β, b), all divided by p, into a Gram."""
    Q, S, _ = torch.linalg.svd(X, full_matrices=False)
    r, root = S.shape[1], p.sqrt()
    in_basis = (Q.mT @ y.unsqueeze(-1)).squeeze(-1)
    Z_Z, to_beta, to_b = products[:, :r, :r], products[:, :, -2], products[:, :, -1]
    test = None
    if X_test is not None and y_test is not None:
        through = [products[:, r:-2, :r], to_beta[:, r:-2, None] * root[:, None, None], to_b[:, r:-2, None]]
        through[-1] = through[-1] / root[:, None, None]
        test = HeldOut(y=y_test, K=X_test @ X.mT @ Q, through=torch.cat(through, -1))
    return Gram(
        p=p, K=S.square(), y=in_basis, rest=y - (Q @ in_basis.unsqueeze(-1)).squeeze(-1), basis=Q, Z_Z=Z_Z.clone(),
        Z_beta=to_beta[:, :r] * root[:, None], Z_b=to_b[:, :r] * root[:, None],
        b_beta=to_b[:, -2] * root, b_b=to_b[:, -1].clone(), beta_beta=to_beta[:, -2].clone(), test=test,
    )  # fmt: skip


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
        # √p u, a and p c in one tensor: all decay alike, and one product with the inner products gives the output.
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
        """The run of that start: what ``WeightSpace`` gives, to rounding."""
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
        """Loss, alignment and growth: ``WeightSpace.measure`` without the maxima over neurons.

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
        # Where its terms cancel, rounding may leave |β|² below 0.
        norm = square.clamp_min(0).sqrt()
        # σ = Kq: along a direction that no input has, both are 0.
        q = torch.where(gram.K > 0, 1 / gram.K, 0.0).unsqueeze(1) * self._sigma
        rest = gram.rest.square().sum(-1, keepdim=True)
        values = {
            "loss": (self._e.square().sum(-1) + rest) / 2,
            "cosine": ratio(dot, norm * (p * tau).sqrt()),
            "beta_norm": norm,
            "b_dot_beta": dot,
            "weight_growth": (q * gram.Z_b.unsqueeze(1)).sum(-1) + tau / 2 * (q * self._sigma).sum(-1),
        }
        if gram.test is not None:
            values["test_loss"] = gram.test.loss(self._decaying, q, self._on_b)
        wanted = chosen(names, values)
        return told_of_divergence({name: value for name, value in values.items() if name in wanted}, self.t)


def _output_map(gram: Gram) -> Float[Tensor, "seeds r_2 r_1"]:
    """(√p u, a, p c) -> (Zᵀβ/√p, bᵀβ/p), to be multiplied from the right: the fast side of a batched product."""
    p = gram.p[:, None]
    on_Z = torch.cat([gram.Z_Z, gram.Z_beta.unsqueeze(1), (gram.Z_b / p).unsqueeze(1)], 1)
    on_b = torch.cat([gram.Z_b / p, gram.b_beta[:, None] / p.sqrt(), gram.b_b[:, None] / p], 1)
    return torch.cat([on_Z, on_b.unsqueeze(-1)], -1)
