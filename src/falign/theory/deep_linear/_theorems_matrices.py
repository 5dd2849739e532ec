"""Statements about linear networks: a whole matrix is conserved in each hidden layer, and when two layers converge."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import Numbers, check_steps, real_tensor
from falign.theory import conservation
from falign.theory._coerce import public, recording
from falign.theory.conservation import State
from falign.theory.conservation._law import lawful
from falign.theory.conservation._network import feedback_matrices
from falign.theory.deep_linear._modes import Rule
from falign.theory.deep_linear._network import Compressed, compressed, finite, linear, stepped, warn_of_rate
from falign.theory.deep_linear._theorems_modes import SOURCE
from falign.theory.statement import Assumption, TheoremCheck


@public
def matrix_invariants(state: State, rule: Rule = "fa") -> tuple[Float[Tensor, "runs _ _"], ...]:
    """``C_l = W_l W_lᵀ - B_{l+1}ᵀ W_{l+1} - W_{l+1}ᵀ B_{l+1}`` of every hidden layer; dfa the last one's only.

    Of bp ``C_l = W_l W_lᵀ - W_{l+1}ᵀ W_{l+1}``. On its diagonal stands twice the law of ``falign.theory.conservation``;
    of linear networks the whole matrix is conserved. A chain has ``C = -2 K`` (fa, bp).
    """
    dynamics = linear(rule)
    matrices, invariants = feedback_matrices(state, dynamics), []
    for layer in lawful(state, dynamics):
        aligned = matrices[layer].mT @ state.W[layer + 1]
        incoming = state.W[layer] @ state.W[layer].mT
        invariants.append(incoming - (aligned if rule == "bp" else aligned + aligned.mT))
    return tuple(invariants)


@recording
def matrix_conservation(
    state: State,
    X: Numbers,
    Y: Numbers,
    *,
    rule: Rule = "fa",
    rate: float | None = None,
    steps: int = 100,
    times: Numbers | None = None,
) -> TheoremCheck:
    """Check that the matrices C_l are constant in flow, and grow by exactly ``Σ ΔW_l ΔW_lᵀ`` in steps.

    ``Ẇ_l = -Δ_l H_{l-1}ᵀ`` with ``Δ_l = B_{l+1}ᵀ Δ_{l+1}`` and ``H_l = W_l H_{l-1}``, the points in columns: so
    ``Ẇ_l W_lᵀ = -Δ_l H_lᵀ = B_{l+1}ᵀ Ẇ_{l+1}``. In steps the same holds of the displacements, and the square is left;
    of bp that of W_{l+1} is taken off, ``Σ ΔW_{l+1}ᵀ ΔW_{l+1}``.

    Args:
        state: The networks.
        X: Inputs.
        Y: Targets.
        rule: How the error returns.
        rate: η of steps; None for gradient flow.
        steps: Their number.
        times: Of gradient flow, increasing from 0; looked at the last.

    Raises:
        ValueError: neither a rate nor times, or both, were given, or the data do not fit.

    Warns:
        UserWarning: the rate is beyond what is stable, with the value.

    Source: derived; of two layers known from matrix factorisation.
    """
    state, few = _in_double(state, X, Y)
    dynamics = linear(rule)
    conservation.loss_of(state, dynamics, few.X, few.Y)  # refuses data that do not fit the networks
    first = matrix_invariants(state, rule)
    residuals, sizes, conditions = [torch.zeros(len(state.W[0])).to(first[0])], [_size(state)], ()
    check_steps(steps)
    if rate is not None and times is None:
        gained, end = [torch.zeros_like(part) for part in first], state
        for before, end in stepped(state, dynamics, few.X, few.Y, rate, steps):
            if not finite(end):
                break
            moved = [new - old for new, old in zip(end.W, before.W, strict=True)]
            for place, layer in enumerate(lawful(state, dynamics)):
                gained[place] = gained[place] + moved[layer] @ moved[layer].mT
                if rule == "bp":
                    gained[place] = gained[place] - moved[layer + 1].mT @ moved[layer + 1]
            residuals.append(_largest(matrix_invariants(end, rule), first, gained))
            sizes.append(_size(end))
        warn_of_rate(rate, (state, end), few.X, few.Y, rule)
        conditions, tolerance = (diverging(len(residuals) - 1, steps),), 1e-12
    elif times is not None and rate is None:
        when = real_tensor("times", times).double()
        end = conservation.gradient_flow(state, dynamics, few.X, few.Y, times=when, names=["loss"]).end
        residuals.append(_largest(matrix_invariants(end, rule), first, [torch.zeros_like(part) for part in first]))
        sizes.append(_size(end))
        tolerance = 1e-7
    else:
        raise ValueError(f"rate {rate} and times {times}: pass a rate and steps, or times alone")
    measured = torch.stack(residuals, 1)
    return TheoremCheck(
        name="Matrix conservation law",
        source="derived",
        reading=f"{rule}, depth {state.depth}; the largest entry of C_l(t) - C_l(0) less what steps add",
        assumptions=conditions,
        bound=tolerance * torch.stack(sizes, 1).cummax(1).values,
        measured=measured,
        scale=torch.zeros_like(sizes[0]),
    )


def diverging(taken: int, steps: int) -> Assumption:
    """The assumption that all steps were taken and the weights stayed finite."""
    return Assumption(
        name="finite",
        statement="the weights stay finite; steps until the run diverged",
        measured=float(taken),
        needed=float(steps),
        holds=taken == steps,
    )


def _in_double(state: State, X: Numbers, Y: Numbers) -> tuple[State, Compressed]:
    """Convert to float64, in which the statements are checked, and compress the data."""
    few = compressed(X, Y)
    return state.map(lambda part: part.double()), few._replace(X=few.X.double(), Y=few.Y.double())


def _size(state: State) -> Float[Tensor, " runs"]:
    """Return the largest ``|W|²`` or ``|B|²``."""
    return torch.stack([part.square().sum((-1, -2)) for part in (*state.W, *state.B)]).amax(0)


def _largest(now: tuple[Tensor, ...], first: tuple[Tensor, ...], gained: list[Tensor]) -> Float[Tensor, " runs"]:
    pairs = zip(now, first, gained, strict=True)
    return torch.stack([(new - old - more).abs().amax((-1, -2)) for new, old, more in pairs]).amax(0)


# Convergence of two layers under feedback alignment, on any data.

_ROUNDING = 1e-13
"""A κ below this share of the largest |W|² or |B|² is rounding."""


@recording
def two_layer_convergence(
    state: State, X: Numbers, Y: Numbers, *, rate: float | None = None, steps: int = 100, times: Numbers | None = None
) -> TheoremCheck:
    """Check that the loss seen through B of a two-layer network under fa falls exponentially, on any data.

    ``V = mean ½ |Bᵀ(y - f)|²``, less what no linear map can fit. With ``-C = BᵀW_2 + W_2ᵀB - W_1W_1ᵀ ⪰ 2κ`` on the
    range of Bᵀ and s the least variance of the inputs, ``V(t) ≤ V(0) exp(-2 κ s t)``; in steps
    ``V(t) ≤ V(0) (1 - η κ s)^t``, κ that of the last step. Where B has as many rows as rank, the loss above the floor
    is between V/σ_max² and V/σ_min² of B's singular values, so it falls likewise.

    ``F = BᵀE`` obeys ``F' = -T(F) Σ_xx``, ``T(F) = BᵀW_2 F + F W_1ᵀW_1``, and ``V = ½ tr F Σ_xx⁺ Fᵀ``: so
    ``V' = -⟨T(F), F⟩ = -½ tr (W_1W_1ᵀ - C) FFᵀ - |F W_1ᵀ|² ≤ -κ |F|² ≤ -2 κ s V``. In steps exactly
    ``F⁺ = F - η T(F) Σ_xx`` with ``W_2⁺`` in the place of W_2, C only grows, and ``η |T(F) Σ_xx^½|² ≤ ⟨T(F), F⟩``,
    which is looked at along the path, leaves half of the decrease. For one mode it is ``|e| ≤ |e(0)| exp(-K t)``.

    Args:
        state: Networks of two layers, under fa.
        X: Inputs.
        Y: Targets.
        rate: η of steps; None for gradient flow.
        steps: Their number.
        times: Where gradient flow is recorded, increasing from 0.

    Raises:
        ValueError: the networks have another depth or no B, the data do not fit, or neither a rate nor times, or
            both, were given.

    Warns:
        UserWarning: the rate is beyond what is stable, with the value.

    Source: derived; the conservation law as in Garg and Vempala 2022's model, the convergence after Girotti,
    Mitliagkas and Gidel 2021.
    """
    if state.depth != 2:
        raise ValueError(f"the networks have {state.depth} layers: the statement is of two")
    if not state.B:
        raise ValueError("the networks have no feedback B: the statement is of fa")
    state, few = _in_double(state, X, Y)
    dynamics = linear("fa")
    conservation.loss_of(state, dynamics, few.X, few.Y)  # refuses data that do not fit the networks
    B, covariance = state.B[0], few.X.mT @ few.X / len(few.X)
    s = float(torch.linalg.eigvalsh(few.X @ few.X.mT / len(few.X))[0])
    conditions = []
    check_steps(steps)
    if rate is not None and times is None:
        seen, excess = [_seen(conservation.output(state, dynamics, few.X), few.Y, B)], 0.0
        last = end = state
        for before, end in stepped(state, dynamics, few.X, few.Y, rate, steps):
            if not finite(end):
                break
            excess = max(excess, float(_excess(before, end, few.X, few.Y, covariance, rate).max()))
            seen.append(_seen(conservation.output(end, dynamics, few.X), few.Y, B))
            last = end
        warn_of_rate(rate, (state, end), few.X, few.Y, "fa")
        measured, κ = torch.stack(seen, 1), _alignment(last)
        factor = (1 - rate * κ.clamp(min=0) * s).clamp(min=0)
        bound = measured[:, :1] * factor[:, None] ** torch.arange(len(seen), device=factor.device)
        conditions = [
            diverging(len(seen) - 1, steps),
            Assumption(
                name="step size",
                statement="η |T(F) Σ^½|²/⟨T(F), F⟩ ≤ 1",
                measured=excess,
                needed=1.0,
                holds=excess <= 1,
            ),
        ]
    elif times is not None and rate is None:
        when = real_tensor("times", times).double()
        trajectory = conservation.gradient_flow(state, dynamics, few.X, few.Y, times=when, names=["map"])
        outputs = few.X @ trajectory["map"].mT
        measured, κ = (
            torch.stack([_seen(outputs[:, place], few.Y, B) for place in range(len(when))], 1),
            _alignment(state),
        )
        bound = measured[:, :1] * torch.exp(-2 * κ.clamp(min=0)[:, None] * s * when)
    else:
        raise ValueError(f"rate {rate} and times {times}: pass a rate and steps, or times alone")
    least = float(κ.min())
    return TheoremCheck(
        name="Two-layer convergence",
        source=SOURCE,
        reading="the loss seen through B, less what no linear map can fit",
        assumptions=(
            Assumption(
                name="aligned", statement="-C ⪰ 2κ > 0 on the range of Bᵀ", measured=least, needed=0.0, holds=least > 0
            ),
            *conditions,
        ),
        bound=bound,
        measured=measured,
        scale=(1e2 if rate is not None else 1e6) * measured[:, 0],
        constants={"rate": least * s},
    )


def _seen(f: Tensor, Y: Tensor, B: Tensor) -> Float[Tensor, " runs"]:
    """``mean ½ |Bᵀ(y - f)|²``."""
    return ((Y - f) @ B).square().sum(-1).mean(-1) / 2


def _alignment(state: State) -> Float[Tensor, " runs"]:
    """κ: half the least eigenvalue of -C on the range of Bᵀ; 0 where it is only rounding."""
    (C,), B = matrix_invariants(state), state.B[0]
    Q = torch.linalg.svd(B, full_matrices=False).Vh
    κ = torch.linalg.eigvalsh(-Q @ C @ Q.mT)[:, 0] / 2
    size = torch.stack([part.square().sum((-1, -2)) for part in (*state.W, B)]).amax(0)
    return κ.where(κ.abs() > _ROUNDING * size, 0.0)


def _excess(before: State, after: State, X: Tensor, Y: Tensor, covariance: Tensor, rate: float) -> Tensor:
    """``η |T(F) Σ^½|²/⟨T(F), F⟩`` of a step [runs]; 0 where nothing moves, inf where it moves the wrong way."""
    B, W = before.B[0], before.W[0]
    F = B.mT @ (Y - X @ W.mT @ before.W[1].mT).mT @ X / len(X)
    moved = B.mT @ after.W[1] @ F + F @ W.mT @ W
    fit, energy = (moved * F).sum((-1, -2)), ((moved @ covariance) * moved).sum((-1, -2))
    ratio = (rate * energy / fit.where(fit > 0, 1.0)).where(fit > 0, torch.inf)
    return ratio.where(energy > 0, 0.0)
