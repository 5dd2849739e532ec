"""What a linear network sees of its data: ``Σ_xx = XᵀX/n``, ``Σ_yx = YᵀX/n``, and few points that have the same."""

from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.inputs import Numbers, floating, squarable, table

_NOTHING = 1e-10
"""A share of the largest eigenvalue that counts as none."""


class Compressed(NamedTuple):
    """Points in place of many, of which a linear network learns the same.

    Attributes:
        X: Inputs [points d], at most d.
        Y: Targets [points k].
        left: What the mean loss ½|f - y|² of all the points has above theirs: what no linear map can fit.
    """

    X: Float[Tensor, "points d"]
    Y: Float[Tensor, "points k"]
    left: float


def data(X: Numbers, Y: Numbers) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"]]:
    """Inputs and targets, a row a point, in float64 unless tensors say otherwise.

    Raises:
        ValueError: they are no finite tables, or differ in their number of points.
    """
    inputs, targets = _rows("inputs", X), _rows("targets", Y)
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets: one row of each a point")
    return inputs, targets.to(inputs)


@public
def covariances(X: Numbers, Y: Numbers) -> tuple[Float[Tensor, "d d"], Float[Tensor, "k d"]]:
    """``Σ_xx = XᵀX/n`` and ``Σ_yx = YᵀX/n``: second moments, no mean is taken off.

    Raises:
        ValueError: the data are no finite tables of the same number of points.
    """
    inputs, targets = data(X, Y)
    return inputs.mT @ inputs / len(inputs), targets.mT @ inputs / len(inputs)


@public
def compressed(X: Numbers, Y: Numbers) -> Compressed:
    """As many points as X has rank, with the same Σ_xx and Σ_yx: training on them costs nothing in n.

    ``X = P S Qᵀ`` and k points: ``X' = √(k/n) S Qᵀ``, ``Y' = √(k/n) Pᵀ Y``, ``left = |Y - P Pᵀ Y|²/(2n)``.

    Args:
        X: Inputs [n d].
        Y: Targets [n k].

    Raises:
        ValueError: the data are no finite tables of the same number of points, or all inputs are zero.
    """
    inputs, targets = data(X, Y)
    P, S, Q = torch.linalg.svd(inputs, full_matrices=False)
    kept = _above_rounding(S, inputs)
    P, S, Q = P[:, kept], S[kept], Q[kept]
    scale, seen = sqrt(len(S) / len(inputs)), P.mT @ targets
    left = (targets - P @ seen).square().sum() / (2 * len(inputs))
    return Compressed(scale * S[:, None] * Q, scale * seen, float(left))


@public
def points_of(inputs: Numbers, cross: Numbers) -> tuple[Float[Tensor, "points d"], Float[Tensor, "points k"]]:
    """Points that have given Σ_xx and Σ_yx.

    Args:
        inputs: Σ_xx [d d], symmetric, no eigenvalue below 0.
        cross: Σ_yx [k d].

    Raises:
        ValueError: the sizes do not fit, Σ_xx is no covariance, or Σ_yx reads what has no variance in Σ_xx.
    """
    xx, yx = _rows("Σ_xx", inputs), _rows("Σ_yx", cross)
    yx = yx.to(xx)
    if xx.shape != (yx.shape[1], yx.shape[1]):
        raise ValueError(f"Σ_xx is {tuple(xx.shape)} and Σ_yx {tuple(yx.shape)}, expected (d, d) and (outputs, d)")
    values, Q = torch.linalg.eigh((xx + xx.mT) / 2)
    size = float(values.abs().max())
    if float((xx - xx.mT).abs().max()) > _NOTHING * size or float(values[0]) < -_NOTHING * size or not size:
        raise ValueError(f"Σ_xx must be symmetric with eigenvalues from 0 up, not all 0; the least is {values[0]:g}")
    kept = values > _NOTHING * size
    unseen = float((yx @ Q[:, ~kept]).abs().max()) if not kept.all() else 0.0
    if unseen > sqrt(_NOTHING) * float(yx.abs().max()):
        raise ValueError(f"Σ_yx holds {unseen:g} along inputs without variance in Σ_xx: no data have these moments")
    roots, Q = values[kept].sqrt(), Q[:, kept]
    scale = sqrt(len(roots))
    return scale * roots[:, None] * Q.mT, scale * (yx @ Q / roots).mT


@public
def whitened(X: Numbers) -> Float[Tensor, "n rank"]:
    """The inputs in coordinates with Σ_xx = 1, as many as X has rank: ``√n P`` of ``X = P S Qᵀ``.

    Raises:
        ValueError: they are no finite table, or all zero.
    """
    inputs = _rows("inputs", X)
    P, S, _ = torch.linalg.svd(inputs, full_matrices=False)
    return sqrt(len(inputs)) * P[:, _above_rounding(S, inputs)]


def _rows(name: str, given: Numbers) -> Tensor:
    """The finite table, of the type and on the device that a floating point tensor has."""
    squarable(name, table(name, given))
    return floating(name, given)


def _above_rounding(S: Float[Tensor, " values"], X: Float[Tensor, "n d"]) -> Bool[Tensor, " values"]:
    """Which singular values of X are not rounding."""
    if not S[0]:
        raise ValueError(f"all {len(X)} inputs are zero: nothing can be learned of them")
    return max(X.shape) * torch.finfo(X.dtype).eps * S[0] < S
