"""Two-layer linear networks on isotropic inputs: the factorisation under another name."""

from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_floating, check_memory, describe, is_whole, named, positive
from falign.feedback import generator
from falign.theory._coerce import public
from falign.theory.factorisation._problem import State, fitting


@public
def isotropic(points: int, m: int, *, seed: int) -> Float[Tensor, "points m"]:
    """Inputs with ``XᵀX = points · I`` exactly, in float64: those on which a network is the factorisation.

    Gaussian inputs are isotropic in the population only; on N points they miss by O(√(m/N)).

    Args:
        points: N.
        m: Input dimension, at most N.
        seed: Of the directions.

    Raises:
        ValueError: the sizes or the seed are no whole numbers, or there are fewer points than dimensions.
    """
    if not is_whole(seed):
        raise ValueError(f"seed is {describe(seed)}, expected a whole number")
    if not is_whole(points) or not is_whole(m) or not 1 <= m <= points:
        raise ValueError(
            f"{describe(points)} points of dimension {describe(m)}, expected at least as many points as dimensions"
        )
    check_memory("inputs", points, m)
    drawn = torch.randn(points, m, dtype=torch.float64, generator=generator(seed, "factorisation", "inputs"))
    return torch.linalg.qr(drawn).Q * sqrt(points)


@public
def from_network(
    first: Float[Tensor, "r m"], second: Float[Tensor, "n r"], carried: Float[Tensor, "n r"]
) -> tuple[Float[Tensor, "1 r n"], State]:
    """B and the state that a network ``f = Z(Wx)`` is: W its first weights, Z its second, ``B = Mᵀ``.

    M are the feedback weights of the second layer, in the shape of that layer's weights. For inputs with covariance I
    and labels ``Yx`` the mean ½|f - Yx|² is ``½|ZW - Y|²``, its gradients are the factorisation's, and feedback
    alignment on the network is ``fa``.

    Raises:
        ValueError: the shapes do not fit each other, B is not of full rank, or a number is not finite.

    Source: derived; the corollary for two-layer linear networks in the abstract of Garg and Vempala 2022.
    """
    check_floating(first=first, second=second, carried=carried)
    if first.ndim != 2 or second.shape != carried.shape or second.shape[-1:] != first.shape[:1]:
        shapes = [tuple(part.shape) for part in (first, second, carried)]
        raise ValueError(f"W, Z and the feedback have shapes {shapes}, expected (r, m), (n, r) and (n, r)")
    first, second, carried = (part.detach()[None] for part in (first, second, carried))
    B, state = carried.mT.contiguous(), State(second, first)
    fitting(second @ first, B, state)
    return B, state


@public
def rate_in_factorisation(
    rate: float, outputs: int, *, variance: float = 1.0, reduction: Literal["half", "mean", "sum"] = "mean"
) -> float:
    """η of the factorisation for a network's learning rate.

    | loss, mean over the points | η/rate |
    |---|---|
    | ``½|f - y|²`` (half) | s |
    | mean over the n outputs too, as ``torch.nn.MSELoss()`` (mean) | 2s/n |
    | ``|f - y|²`` (sum) | 2s |

    With inputs of covariance s·I the network with labels Yx is the factorisation of Y at that η.

    Args:
        rate: Learning rate of SGD.
        outputs: n.
        variance: s.
        reduction: half, mean or sum.

    Raises:
        ValueError: a number is not positive, the outputs are not whole, or the reduction is unknown.
    """
    if not is_whole(outputs):
        raise ValueError(f"outputs is {describe(outputs)}, expected a whole number: n, the rows of Y")
    factors = {"half": 1.0, "mean": 2.0 / positive("outputs", outputs), "sum": 2.0}
    return positive("rate", rate) * positive("variance", variance) * named("reduction", reduction, factors)
