"""What a linear network conserves: not only a number a neuron, the whole matrix of each hidden layer."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory import conservation
from falign.theory.conservation import State
from falign.theory.conservation.law import lawful
from falign.theory.conservation.network import carriers
from falign.theory.deep_linear.covariances import Compressed, compressed
from falign.theory.deep_linear.modes import Rule
from falign.theory.deep_linear.network import linear
from falign.theory.deep_linear.rates import finite, stepped, warn_of_rate
from falign.theory.door import public, recording
from falign.theory.inputs import Numbers, bearable, numbers
from falign.theory.statement import Assumption, TheoremCheck


@public
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
    state, few = in_double(state, X, Y)
    dynamics = linear(rule)
    conservation.loss_of(state, dynamics, few.X, few.Y)  # refuses data that do not fit the networks
    first = matrix_invariants(state, rule)
    residuals, sizes, conditions = [torch.zeros(len(state.W[0])).to(first[0])], [_size(state)], ()
    bearable(steps)
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
        warn_of_rate(rate, (state, end), few.X, few.Y, rule, steps)
        conditions, tolerance = (diverging(len(residuals) - 1, steps),), 1e-12
    elif times is not None and rate is None:
        when = numbers("times", times).double()
        end = conservation.flow(state, dynamics, few.X, few.Y, times=when, names=["loss"]).end
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
    """That all steps were taken, none of them to weights that are not finite."""
    return Assumption(
        name="finite",
        statement="the weights stay finite; steps until the run diverged",
        measured=float(taken),
        needed=float(steps),
        holds=taken == steps,
    )


def in_double(state: State, X: Numbers, Y: Numbers) -> tuple[State, Compressed]:
    """Networks and few points in float64, in which the statements are tried."""
    few = compressed(X, Y)
    return state.map(lambda part: part.double()), few._replace(X=few.X.double(), Y=few.Y.double())


def _size(state: State) -> Float[Tensor, " runs"]:
    """The largest ``|W|²`` or ``|B|²``."""
    return torch.stack([part.square().sum((-1, -2)) for part in (*state.W, *state.B)]).amax(0)


def _largest(now: tuple[Tensor, ...], first: tuple[Tensor, ...], gained: list[Tensor]) -> Float[Tensor, " runs"]:
    pairs = zip(now, first, gained, strict=True)
    return torch.stack([(new - old - more).abs().amax((-1, -2)) for new, old, more in pairs]).amax(0)
