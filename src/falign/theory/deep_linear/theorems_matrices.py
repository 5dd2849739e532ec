"""What a linear network conserves: not only a number a neuron, the whole matrix of each hidden layer."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory import conservation
from falign.theory.conservation import Dynamics, State, velocity
from falign.theory.conservation.law import lawful
from falign.theory.conservation.network import carriers
from falign.theory.deep_linear.covariances import compressed
from falign.theory.deep_linear.modes import Rule
from falign.theory.deep_linear.network import linear
from falign.theory.inputs import Numbers, numbers, positive
from falign.theory.statement import TheoremCheck


def matrix_invariants(state: State, rule: Rule = "fa") -> tuple[Float[Tensor, "runs _ _"], ...]:
    """``C_l = W_l W_lᵀ - B_{l+1}ᵀ W_{l+1} - W_{l+1}ᵀ B_{l+1}`` of every hidden layer; dfa the last one's only.

    Of bp ``C_l = W_l W_lᵀ - W_{l+1}ᵀ W_{l+1}``. On its diagonal stands twice the law of ``falign.theory.conservation``;
    of linear networks the whole matrix is conserved. A chain has ``C = -2 K`` (fa, bp).
    """
    dynamics = linear(rule)
    matrices, found = carriers(state, dynamics), []
    for layer in lawful(state, dynamics):
        aligned = matrices[layer].mT @ state.W[layer + 1]
        incoming = state.W[layer] @ state.W[layer].mT
        found.append(incoming - (aligned if rule == "bp" else aligned + aligned.mT))
    return tuple(found)


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

    Source: derived; of two layers known from matrix factorisation.
    """
    few, dynamics = compressed(X, Y), linear(rule)
    first = matrix_invariants(state, rule)
    if rate is not None and times is None:
        gained = [torch.zeros_like(part) for part in first]
        residuals = [torch.zeros(len(state.W[0])).to(first[0])]
        for before, after in stepped(state, dynamics, few.X, few.Y, positive("rate", rate), steps):
            moved = [new - old for new, old in zip(after.W, before.W, strict=True)]
            for place, layer in enumerate(lawful(state, dynamics)):
                gained[place] = gained[place] + moved[layer] @ moved[layer].mT
                if rule == "bp":
                    gained[place] = gained[place] - moved[layer + 1].mT @ moved[layer + 1]
            residuals.append(_largest(matrix_invariants(after, rule), first, gained))
        tolerance = 1e-12
    elif times is not None and rate is None:
        when = numbers("times", times).double()
        end = conservation.flow(state, dynamics, few.X, few.Y, times=when, names=["loss"]).end
        residuals = [_largest(matrix_invariants(end, rule), first, [torch.zeros_like(part) for part in first])]
        tolerance = 1e-7
    else:
        raise ValueError(f"rate {rate} and times {times}: pass a rate and steps, or times alone")
    measured = torch.stack(residuals, 1)
    size = torch.stack([W.square().sum((-1, -2)) for W in state.W]).amax(0).clamp_min(1.0)
    return TheoremCheck(
        name="Matrix conservation law",
        source="derived",
        reading=f"{rule}, depth {state.depth}; the largest entry of C_l(t) - C_l(0) less what steps add",
        assumptions=(),
        bound=(tolerance * size)[:, None].expand_as(measured),
        measured=measured,
        scale=torch.zeros_like(size),
    )


def stepped(
    state: State, dynamics: Dynamics, X: Tensor, Y: Tensor, rate: float, steps: int
) -> Iterator[tuple[State, State]]:
    """Each step's networks, before and after."""
    for _ in range(steps):
        after = state.map(lambda value, change: value + rate * change, velocity(state, dynamics, X, Y))
        yield state, after
        state = after


def _largest(now: tuple[Tensor, ...], first: tuple[Tensor, ...], gained: list[Tensor]) -> Float[Tensor, " runs"]:
    pairs = zip(now, first, gained, strict=True)
    return torch.stack([(new - old - more).abs().amax((-1, -2)) for new, old, more in pairs]).amax(0)
