"""The spectral start: weights and feedback diagonal in fixed bases, so that a network is scalar modes and stays so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import Numbers, as_list, check_memory, describe, is_whole
from falign.feedback import generator
from falign.theory._coerce import public
from falign.theory.conservation import State
from falign.theory.deep_linear._modes import Modes, Rule, finite, modes
from falign.theory.deep_linear._network import covariances, network

# Common bases: those in which Σ_xx and Σ_yx of data are both diagonal, where there are any.


@public
def common_bases(X: Numbers, Y: Numbers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U, λ, s, V`` with ``Σ_yx = U diag(λ) Vᵀ`` and ``Σ_xx = V diag(s) Vᵀ``; modes without either left out.

    Singular values that are equal leave their vectors free; they are turned so that Σ_xx is diagonal too. Equal, or
    off the diagonal, is what differs from 0 by the root of the rounding of the data's type.

    Returns:
        U [outputs outputs] and V [d d], orthogonal, the modes first; λ and s [modes], λ falling.

    Raises:
        ValueError: all inputs are zero, or no bases make both diagonal; the message has what stands off the diagonal.
    """
    xx, yx = covariances(X, Y)
    eps, tiny = torch.finfo(xx.dtype).eps, torch.finfo(xx.dtype).tiny
    limit, size = eps**0.5, float(xx.abs().max())
    if not size:
        raise ValueError(f"all {len(xx)} features of the inputs are zero: nothing can be learned of them")
    V, largest = _turned(xx, yx, limit)
    off = xx.new_tensor(0.0) + (V.mT @ xx @ V - (V.mT @ xx @ V).diagonal().diag()).abs().max() / size
    if off > limit:
        raise ValueError(
            f"Σ_xx holds {float(off):.3g} of its largest number off the diagonal in the singular vectors of Σ_yx, "
            f"expected at most {limit:.2g}: pass whitened(X), or data from task(...) or points_of(...)"
        )
    noise = 8 * max(yx.shape) * eps * max(largest, tiny)
    λ = (yx @ V).norm(dim=0)
    order = (λ / noise).round().argsort(descending=True, stable=True)  # of equal λ the larger variance stays first
    V, λ = V[:, order], λ[order]
    learned, rank = int((λ > noise).sum()), min(yx.shape)
    U, R = torch.linalg.qr((yx @ V)[:, :learned], mode="complete")
    # QR is free in the signs of its columns; λ must come out positive.
    U[:, :learned] *= R.diagonal()[:learned].sign()
    λ = λ.where(λ > noise, 0.0)[:rank]
    s = (V.mT @ xx @ V).diagonal()[:rank]
    kept = (s > limit * float(s.max())) | (λ > 0)
    order = torch.cat([kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]])
    U = torch.cat([U[:, order], U[:, rank:]], 1)
    V = torch.cat([V[:, order], V[:, rank:]], 1)
    return U, λ[kept], s[kept], V


def _turned(xx: Tensor, yx: Tensor, limit: float) -> tuple[Tensor, float]:
    """V, and the largest λ: where λ are near each other by the variances, where these are too by λ again."""
    _, λ, V = torch.linalg.svd(yx, full_matrices=True)
    V, largest = V.mT.clone(), float(λ[0])
    λ = torch.cat([λ, λ.new_zeros(len(V) - len(λ))])
    # Of λ nearer than √ε rounding has turned the singular vectors among each other: any basis of their span is one.
    for equal in _groups(λ, limit * largest):
        block = V[:, equal]
        s, turn = torch.linalg.eigh(block.mT @ xx @ block)
        V[:, equal] = block = block @ turn.flip(-1)  # the largest variance first
        for alike in _groups(s.flip(0), limit * float(xx.abs().max())):
            V[:, equal.start + alike.start : equal.start + alike.stop] = (
                block[:, alike] @ torch.linalg.svd(yx @ block[:, alike], full_matrices=True).Vh.mT
            )
    return V, largest


def _groups(falling: Tensor, near: float) -> Iterator[slice]:
    """Mark neighbours that differ by no more than ``near``."""
    first = 0
    for last in range(1, len(falling) + 1):
        if last == len(falling) or falling[last - 1] - falling[last] > near:
            yield slice(first, last)
            first = last


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """A start of which every layer is diagonal: ``W_l = R_l diag(θ_l) R_{l-1}ᵀ``, ``R_0 = V``, ``R_L = U``.

    Attributes:
        state: Weights and feedback, one run a seed.
        modes: What the network is: chains [layers runs modes].
        bases: ``V, R_1, …, R_{L-1}, U`` [runs size size], orthogonal; the first columns are the modes, the rest, in
            which all weights are zero, complete them.
    """

    state: State
    modes: Modes
    bases: tuple[Float[Tensor, "runs _ _"], ...]

    @property
    def diagonals(self) -> Float[Tensor, "layers runs modes"]:
        """θ_1, …, θ_L of the start."""
        return self.modes.weights


@public
def task(
    targets: Numbers, variances: Numbers = 1.0, *, inputs: int, outputs: int, seed: int = 0
) -> tuple[Float[Tensor, "modes inputs"], Float[Tensor, "modes outputs"]]:
    """Data with given modes in drawn bases: ``Σ_xx = V diag(s) Vᵀ``, ``Σ_yx = U diag(λ) Vᵀ``.

    Args:
        targets: λ of each mode.
        variances: s > 0 of each mode, or of all.
        inputs: d, at least the number of modes.
        outputs: k, likewise.
        seed: Of U and V.

    Returns:
        X and Y, a point a mode.

    Raises:
        ValueError: a λ is negative, a variance is not positive, or there are more modes than inputs or outputs.
    """
    checked = modes(targets, [1.0, 1.0], variance=variances)
    λ, s = checked.target.reshape(-1), checked.variance.reshape(-1)
    if not (is_whole(inputs) and is_whole(outputs) and min(inputs, outputs) >= len(λ)):
        raise ValueError(
            f"{len(λ)} modes need as many inputs and outputs, got {describe(inputs)} and {describe(outputs)}"
        )
    V, U = (_orthogonal(size, seed, name)[:, : len(λ)].to(λ) for size, name in ((inputs, "V"), (outputs, "U")))
    scale = sqrt(len(λ))
    return scale * s.sqrt()[:, None] * V.mT, scale * (λ / s.sqrt())[:, None] * U.mT


@public
def spectral(
    X: Numbers,
    Y: Numbers,
    *,
    weights: Sequence[Numbers],
    hidden: Sequence[int],
    feedback: Numbers | Sequence[Numbers] = 1.0,
    rule: Rule = "fa",
    seeds: Sequence[int] = (0,),
) -> Spectral:
    """The network whose modes start at given numbers, on data of which Σ_xx and Σ_yx are diagonal in common bases.

    ``B_{l+1} = R_{l+1} diag(m_{l+1}) R_lᵀ`` in the shape of W_{l+1} (fa), ``D_l = U diag(m_{l+1}) R_lᵀ`` (dfa), with
    ones where there are no modes, so that they are of full rank. Every mode then moves as
    ``θ_l' = c_l θ_{l-1}…θ_1 e``, alone: ``E = U diag(e) Vᵀ`` at all times, and each layer's velocity is a product of
    factors that are diagonal between the same bases.

    Args:
        X: Inputs [n d], such as ``task``, ``points_of`` or ``whitened`` gives.
        Y: Targets [n k].
        weights: θ_1, …, θ_L, each one number for all modes or one a mode, the largest λ first.
        hidden: Neurons of layers 1, …, L - 1, each at least the number of modes: the least of k and X's rank.
        feedback: m of all layers, or m_2, …, m_L, as in ``modes``.
        rule: fa, dfa or bp.
        seeds: One run each, of the R_l.

    Raises:
        ValueError: Σ_xx is not diagonal where Σ_yx is, a layer has fewer neurons than there are modes, or ``modes``
            refuses the numbers.

    Source: derived, after Girotti, Mitliagkas and Gidel 2021.
    """
    hidden, seeds = as_list("hidden", hidden), as_list("seeds", seeds)
    weights = list(weights) if getattr(weights, "ndim", 1) == 2 else as_list("weights", weights)
    U, λ, s, V = common_bases(X, Y)
    if len(hidden) != len(weights) - 1:
        raise ValueError(f"{len(hidden)} hidden layers for {len(weights)} weights a mode, expected one layer fewer")
    if not all(is_whole(size) and size >= len(λ) for size in hidden):
        raise ValueError(f"hidden layers of {hidden} neurons, expected at least {len(λ)} in each, one a mode")
    if not seeds:
        raise ValueError("no seed was given: one run each")
    weights = [finite(f"θ_{layer}", value).to(λ) for layer, value in enumerate(weights, 1)]
    chains = modes(λ.expand(len(seeds), -1), weights, feedback=feedback, variance=s, rule=rule)
    between = [
        torch.stack([_orthogonal(size, seed, f"R{place}") for seed in seeds]).to(λ)
        for place, size in enumerate(hidden, 1)
    ]
    bases = (V.expand(len(seeds), -1, -1), *between, U.expand(len(seeds), -1, -1))
    # Direct feedback starts at the outputs, whose basis is U, whatever the layer.
    tops = [U.expand(len(seeds), -1, -1)] * len(hidden) if rule == "dfa" else bases[2:]
    W = [_between(θ, above, below, 0.0) for θ, above, below in zip(chains.weights, bases[1:], bases, strict=False)]
    B = [_between(m, above, below, 1.0) for m, above, below in zip(chains.feedback, tops, between, strict=True)]
    return Spectral(state=network(W, B, rule=rule), modes=chains, bases=bases)


@public
def reduced(state: State, start: Spectral) -> Modes:
    """The modes of a state in the bases of its start: θ_l are the diagonals of ``R_lᵀ W_l R_{l-1}``."""
    count = start.modes.target.shape[-1]
    diagonals = [part.diagonal(dim1=-2, dim2=-1)[:, :count] for part in _in_bases(state, start)]
    return start.modes.at(torch.stack(diagonals))


@public
def deviation(state: State, start: Spectral) -> Float[Tensor, " runs"]:
    """The largest number of any ``R_lᵀ W_l R_{l-1}`` that is not one of the modes' θ_l: 0 if the form is preserved."""
    count = start.modes.target.shape[-1]
    off = []
    for part in _in_bases(state, start):
        rest = part.clone()
        rest[:, range(count), range(count)] = 0.0
        off.append(rest.abs().amax((-1, -2)))
    return torch.stack(off).amax(0)


def _in_bases(state: State, start: Spectral) -> list[Tensor]:
    shapes, wanted = ([tuple(W.shape) for W in each.W] for each in (state, start.state))
    if shapes != wanted or state.W[0].dtype != start.bases[0].dtype:
        raise ValueError(f"weights of the state have shapes {shapes} in {state.W[0].dtype}, its start {wanted}")
    pairs = zip(state.W, start.bases[1:], start.bases, strict=False)
    return [above.mT @ W @ below for W, above, below in pairs]


def _between(diagonal: Tensor, above: Tensor, below: Tensor, rest: float) -> Float[Tensor, "runs out into"]:
    """``above diag(diagonal, rest) belowᵀ``, the middle as large as the bases."""
    size = min(above.shape[-1], below.shape[-1])
    filled = torch.cat([diagonal, diagonal.new_full((len(diagonal), size - diagonal.shape[-1]), rest)], -1)
    return (above[..., :size] * filled.unsqueeze(-2)) @ below[..., :size].mT


def _orthogonal(size: int, seed: int, name: str) -> Float[Tensor, "size size"]:
    """A Haar distributed orthogonal matrix, of (seed, name) alone."""
    check_memory("an orthogonal matrix", size, size)
    drawn = torch.randn(size, size, generator=generator(seed, "deep linear spectral", name), dtype=torch.float64)
    Q, R = torch.linalg.qr(drawn)
    return Q * R.diagonal().sign()  # QR leaves the columns' signs to its algorithm: fixed, Q is uniformly distributed
