"""Inner products of a linear network's initial weights: all that its run depends on, computed or drawn."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from falign.feedback import generator
from falign.theory.door import public, typed
from falign.theory.inputs import room, whole_number
from falign.theory.two_layer.reduced import Reduced, reduce
from falign.theory.two_layer.start import Start
from falign.theory.two_layer.streams import Scale, inputs_of


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
    room("inputs", len(seeds), n + test, d)
    room("products", len(seeds), min(n + test, d) + 2, min(n + test, d) + 2)
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
