"""Deep linear networks of any sizes, many at once: their weights and feedback, and the rate that they bear."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign.feedback import generator
from falign.theory import conservation
from falign.theory.conservation import Dynamics, State
from falign.theory.conservation.fits import fits_inputs
from falign.theory.conservation.network import carriers
from falign.theory.deep_linear.modes import Rule
from falign.theory.door import public
from falign.theory.inputs import Numbers, floating, full_rank, told

_ITERATIONS = 60
"""Of the power method; its last third is averaged."""

_NONE = 1e-6
"""An eigenvalue with a real part below that share of the size of others is none."""

_DENSE = 128
"""Numbers in E up to which all eigenvalues are looked at."""


@public
def linear(rule: Rule = "fa") -> Dynamics:
    """The dynamics of a linear network with the mean of ½|f - y|² as its loss.

    Raises:
        ValueError: the rule is none of fa, dfa, bp.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule is {told(rule)}, expected one of {', '.join(get_args(Rule))}")
    return Dynamics(gate=conservation.gate("linear"), rule=conservation.rule(rule), loss=conservation.loss("squared"))


@public
def network(W: Sequence[Numbers], B: Sequence[Numbers] = (), *, rule: Rule = "fa") -> State:
    """Weights and feedback as the simulator holds them.

    Args:
        W: W_1, …, W_L, each [out in], or [runs out in] for many networks at once.
        B: Of fa B_2, …, B_L in the shapes of W_2, …, W_L; of dfa, for every hidden layer, [outputs neurons]; bp has
            none and takes no notice of any.
        rule: fa, dfa or bp.

    Raises:
        ValueError: the sizes do not chain, a number is not finite, or a B is not of full rank.
    """
    direct = linear(rule).rule.direct
    for name, given in (("W", W), ("B", () if rule == "bp" else B)):
        if not isinstance(given, Iterable):
            raise ValueError(f"{name} is {told(given)}, expected a list of matrices, one a layer")
    weights = [_matrix(f"W_{place}", given) for place, given in enumerate(W, 1)]
    feedback = [] if rule == "bp" else [_matrix(f"B_{place}", given) for place, given in enumerate(B, 2)]
    shapes = [tuple(part.shape) for part in weights]
    if len(shapes) < 2 or any(one[:2] != (other[0], other[2]) for one, other in pairwise(shapes)):
        raise ValueError(f"weights of shapes {shapes} are no network of two layers or more: expected (runs, out, in)")
    runs, outputs, _ = shapes[-1]
    wanted = [] if rule == "bp" else [(runs, outputs if direct else shape[1], shape[2]) for shape in shapes[1:]]
    if (found := [tuple(part.shape) for part in feedback]) != wanted:
        raise ValueError(f"feedback has shapes {found}, {rule} wants {wanted} for weights of shapes {shapes}")
    for place, matrix in enumerate(feedback, 2):
        full_rank(f"B_{place}", matrix)
    return State(W=tuple(weights), B=tuple(part.to(weights[0]) for part in feedback))


@public
def local_rate(
    state: State, X: Float[Tensor, "n d"], rule: Rule = "fa", *, share: float = 0.0
) -> Float[Tensor, " runs"]:
    """The least ``2 Re a/|a|²`` over eigenvalues a of A: above it, steps make small errors grow, were weights to stay.

    ``E = Σ_yx - W_L…W_1 Σ_xx`` obeys ``E' = -A(E)``, ``A(E) = Σ_l (W_L…W_{l+1} C_l) E (Q_lᵀ Q_l Σ_xx)`` with
    ``Q_l = W_{l-1}…W_1`` and C_l what carries the error to layer l; ``E⁺ = E - ηA(E) + O(η²E²)``. Necessary near a
    point of rest; elsewhere a guide. A scalar mode has a = ρ. Where Re a ≤ 0 the error grows at any η: these are left
    out, so that it is infinite where no Re a is positive, such as at zero weights. Of more than 128 numbers in E by
    power iteration: ``2/a`` for the largest a, to a few per cent if that is real.

    Args:
        state: The networks.
        X: Inputs.
        rule: How the error returns.
        share: Only of a whose real part is at least that share of the largest: away from rest the weights move before
            slow errors have grown. Warnings go by one half.

    Raises:
        ValueError: the inputs do not fit the networks.

    Source: derived.
    """
    fits_inputs(state.W[0], X)
    dynamics, covariance = linear(rule), X.mT @ X / X.shape[-2]
    depth, matrices = state.depth, carriers(state, dynamics)
    runs, outputs, _ = state.W[-1].shape
    above = carried = torch.eye(outputs).to(state.W[0]).expand(runs, -1, -1)
    left = [above]
    for layer in range(depth - 1, 0, -1):
        above = above @ state.W[layer]
        carried = matrices[layer - 1].mT if dynamics.rule.direct else matrices[layer - 1].mT @ carried
        left.insert(0, above @ carried)
    below = [torch.eye(X.shape[1]).to(X).expand(runs, -1, -1)]
    for W in state.W[:-1]:
        below.append(W @ below[-1])
    right = [Q.mT @ (Q @ covariance) for Q in below]
    if outputs * X.shape[1] <= _DENSE:
        pairs = zip(left, right, strict=True)
        whole = torch.stack([torch.einsum("rij,rkl->riljk", S, T).flatten(1, 2) for S, T in pairs]).sum(0).flatten(2)
        a = torch.linalg.eigvals(whole)
        counts = a.real > _NONE * a.abs().amax(1, keepdim=True)
        counts &= a.real >= share * a.real.amax(1, keepdim=True)
        return torch.where(counts, 2 * a.real / a.abs().square(), torch.inf).amin(1)
    E = torch.randn(runs, outputs, X.shape[1], generator=generator(0, "deep linear", "power iteration")).to(X)
    size = _growth(E, left, right, torch.zeros(runs).to(X))
    largest = _growth(E, left, right, size) - size  # A + size has no eigenvalue below 0, so that its largest leads
    return torch.where(largest > _NONE * size, 2 / largest, torch.inf)


def _growth(E: Tensor, left: list[Tensor], right: list[Tensor], shift: Tensor) -> Float[Tensor, " runs"]:
    """By how much a step ``E -> Σ_l S_l E T_l + shift E`` of the power method lengthens E at last."""
    logs = []
    for _ in range(_ITERATIONS):
        E = E / E.norm(dim=(-1, -2), keepdim=True).clamp_min(torch.finfo(E.dtype).tiny)
        E = torch.stack([S @ E @ T for S, T in zip(left, right, strict=True)]).sum(0) + shift[:, None, None] * E
        logs.append(E.norm(dim=(-1, -2)).log())
    return torch.stack(logs[-_ITERATIONS // 3 :]).mean(0).exp()


def _matrix(name: str, given: Numbers) -> Tensor:
    found = floating(name, given)
    if found.ndim not in (2, 3) or not found.numel():
        raise ValueError(f"{name} has shape {tuple(found.shape)}, expected [out in] or [runs out in]")
    if not found.isfinite().all():
        raise ValueError(f"{name} holds {int((~found.isfinite()).sum())} numbers that are not finite")
    return found if found.ndim == 3 else found.unsqueeze(0)
