"""The step size up to which steps follow the flow, and the sharp one at a point of rest."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.factorisation.methods import begun, conserved
from falign.theory.factorisation.problem import Start, State


@public
def stable_rate(
    method: str, Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], start: Start
) -> Float[Tensor, " runs"]:
    """``η_max = 1/ρ_max``, ρ_max the largest rate at which a deviation dies out at the end of the flow.

    At a point of rest ``δR' = -(δR WᵀW + ZB δR)``, so the rates are ``λ_i(WᵀW) + μ_j(BZ)``. Of the end itself,
    ``BZW = BY`` and what is conserved are known. With s the largest singular value of W and u its left vector,
    ``s² = uᵀCu + 2uᵀBZu`` and ``s uᵀBZu = uᵀBYv`` give ``s³ ≤ λ_max(C) s + 2|BY|``, and

    | method | ρ_max |
    |---|---|
    | fa | (3/2) s² - ½ λ_min(C), for s the root; exact for one mode |
    | fa* | |BY|/σ_min(W(0)): BZ with ``Z = YW⁺``, WWᵀ never shrinking |
    | gd | √(|C|² + 4σ_1(Y)²), from ``s_W² - s_Z² ≤ |C|``, ``s_W s_Z = σ_1`` |

    Near the end no step overshoots if ``η ≤ 1/ρ_max``. Twice that is the linear limit at the end; of one mode from a
    zero start, which overshoots its end, the sharp limit is 1.54/ρ_max, and matrices go by it too: all of the tests'
    runs converge at 1.4/ρ_max, none from zero at 1.7/ρ_max. Random starts take up to 2/ρ_max and more. It is no
    theorem: BZ need not be symmetric, and from a large random start the way may be steeper than its end.

    Raises:
        ValueError: the method is unknown, what was given does not fit, or rows of W(0) nearly depend on each
            other under fa*.

    Source: derived; for one mode it is 1/ρ_max of the scalar theory of Girotti, Mitliagkas and Gidel 2021.
    """
    how, Y, (Z, W) = begun(method, Y, B, start)
    if method == "fa*":
        return torch.linalg.svdvals(W)[:, -1] / _largest(B @ Y)
    if method == "gd":
        imbalance = torch.linalg.eigvalsh(how.invariant(Z, W, B)).abs().amax(-1)
        largest = _largest(Y[:1]).expand(len(B)) if Y.stride(0) == 0 else _largest(Y)
        return (imbalance.square() + 4 * largest.square()).rsqrt()
    eigenvalues = torch.linalg.eigvalsh(conserved(Z, W, B))
    s = _positive_root(eigenvalues[:, -1], 2 * _largest(B @ Y))
    return 1 / (1.5 * s.square() - eigenvalues[:, 0] / 2)


@public
def local_rate(B: Float[Tensor, "runs r n"], state: State) -> Float[Tensor, " runs"]:
    """The sharp η of fa at a point of rest: the least ``2 Re ρ/|ρ|²`` over its rates of decay ρ.

    The rates are ``λ_i(WWᵀ) + μ_j(BZ)``, and each of the two alone (what Z has across the columns of R, and W across
    its own rows). Rates of 0, of directions in which the point of rest is not alone, are left out. Below it small
    deviations die out, above it some grow; 0 or below where some grow at any η.

    Source: derived.
    """
    own = torch.linalg.eigvalsh(state.W @ state.W.mT).to(torch.complex128)
    fed = torch.linalg.eigvals(B @ state.Z).to(torch.complex128)
    sums = (own[:, :, None] + fed[:, None, :]).flatten(1)
    rates = torch.cat([own, fed, sums], 1)
    moves = rates.abs() > 1e-9 * rates.abs().amax(1, keepdim=True)
    return torch.where(moves, 2 * rates.real / rates.abs().square(), torch.inf).amin(1)


def _largest(A: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(A, ord=2)


def _positive_root(linear: Tensor, constant: Tensor) -> Tensor:
    """The one positive root of ``s³ = linear s + constant``, constant ≥ 0; its other roots have no larger real part."""
    pairs = torch.stack([linear, constant], 1).detach().cpu().numpy()
    roots = [np.roots([1.0, 0.0, -a, -c]) for a, c in pairs]
    return linear.new_tensor([max(float(found.real.max()), 0.0) for found in roots])
