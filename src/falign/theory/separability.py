"""Conditions on a data set under which theorems promise convergence: separable classes, independent inputs."""

from dataclasses import dataclass
from math import inf

import numpy as np
import scipy
import torch
from torch import Tensor

from falign._validation import Numbers, check_squarable, class_labels, feature_table
from falign.theory._coerce import public

__all__ = [
    "FullRankGram",
    "LinearMargin",
    "OrthogonalSeparability",
    "full_rank_gram",
    "linear_margin",
    "orthogonal_separability",
]

_PIECE = 1024
"""Rows of the products of all pairs of inputs that are made at a time."""

_SUMS = 1e4
"""Weight of the two sums of coefficients in the least-squares problem with a bias: its relative error is 1e-8."""


@dataclass(frozen=True, kw_only=True)
class LinearMargin:
    """Margins of hyperplanes that separate each class from the rest.

    Attributes:
        classes: The labels, in order.
        margins: Of each class against the rest (of two classes one number): the largest distance that a hyperplane with
            the class on one side has from its nearest point, in units of the inputs; 0 if there is no such hyperplane.
        bias: Whether the hyperplanes may miss the origin.
    """

    classes: tuple[int, ...]
    margins: tuple[float, ...]
    bias: bool

    @property
    def holds(self) -> bool:
        """True if every class can be separated from the rest."""
        return min(self.margins) > 0

    def __str__(self) -> str:
        separable = sum(margin > 0 for margin in self.margins)
        return (
            f"linear margin: {separable} of {len(self.margins)} splits separable, least margin {min(self.margins):.4g}"
        )


@dataclass(frozen=True, kw_only=True)
class OrthogonalSeparability:
    """Inner products of the inputs, which should be positive exactly within a class: ``x_i·x_j > 0``.

    Attributes:
        least_within: The smallest ``x_i·x_j`` of two inputs of one class, i = j included.
        largest_between: The largest ``x_i·x_j`` of two classes.
    """

    least_within: float
    largest_between: float

    @property
    def holds(self) -> bool:
        """True if ``min within > 0 ≥ max between``."""
        return self.least_within > 0 >= self.largest_between

    def __str__(self) -> str:
        return f"x_i·x_j: at least {self.least_within:.4g} within a class, at most {self.largest_between:.4g} between"


@dataclass(frozen=True, kw_only=True)
class FullRankGram:
    """Spectrum of the inputs' Gram matrix XXᵀ, of full rank if they are linearly independent.

    Attributes:
        points: n, the number of inputs.
        rank: Rank of the n × n matrix XXᵀ, where singular values of X below n·ε of the largest count as 0.
        smallest: λ_min(XXᵀ), 0 where the rank is below n.
        condition: λ_max/λ_min, infinite where the rank is below n.
    """

    points: int
    rank: int
    smallest: float
    condition: float

    @property
    def holds(self) -> bool:
        """True if the rank is n."""
        return self.rank == self.points

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.points}, smallest eigenvalue {self.smallest:.4g}"


@public
def linear_margin(X: Numbers, labels: Numbers, *, bias: bool = True) -> LinearMargin:
    """Compute the largest margin ``max_{|w|=1} min_i s_i (w·x_i + c)`` of each class (s = 1) against the rest (s = -1).

    It is half the distance of the two classes' convex hulls; without bias (c = 0) the distance of the hull of s_i x_i
    from the origin. The nearest points are found by non-negative least squares, and the margin is the one that their
    hyperplane has on the points, so a positive margin is certain. Meant for up to some thousand points.

    Args:
        X: Inputs [n d], flattened: a tensor, an array or lists.
        labels: Classes [n], whole numbers.
        bias: Whether the hyperplane may miss the origin.

    Raises:
        ValueError: shapes do not fit, a number is not finite or real, a label is not whole, or there is only one class.

    Source: Robertson and Koyejo 2024 (ICML) speak of data separability; the definition is the textbook's.
    """
    X, labels, classes = _checked(X, labels)
    points = X.numpy()
    scale = float(np.abs(points).max()) or 1.0
    # Two classes have one split, which is the same from either side.
    sides = [np.where(labels.numpy() == one, 1.0, -1.0) for one in (classes[1:] if len(classes) == 2 else classes)]
    margins = tuple(scale * _margin(points / scale, side, bias) for side in sides)
    return LinearMargin(classes=classes, margins=margins, bias=bias)


def _margin(X: np.ndarray, side: np.ndarray, bias: bool) -> float:
    """Solve ``min over α ≥ 0 of |Σ_i α_i s_i x_i|² + m² |1 - sums of α|²`` and measure the margin of its hyperplane.

    With one sum its minimum lies on the ray through the hull's nearest point for every m; with two, one a class, it
    does for large m, to a relative 1/m².
    """
    weight = _SUMS if bias else 1.0
    # The bias takes up any shift: centring changes no margin, and keeps the digits of points far from the origin.
    X = X - X.mean(0) if bias else X
    sums = np.stack([side > 0, side < 0]) if bias else np.ones((1, len(side)))
    matrix = np.concatenate([(X * side[:, None]).T, weight * sums])
    wanted = np.concatenate([np.zeros(X.shape[1]), np.full(len(sums), weight)])
    combined, _ = scipy.optimize.nnls(matrix, wanted, maxiter=30 * len(side))
    normal = matrix[: X.shape[1]] @ combined
    size = float(np.linalg.norm(normal))
    heights = X @ normal
    inside = (heights[side > 0].min() - heights[side < 0].max()) / 2 if bias else (side * heights).min()
    return max(0.0, float(inside) / size) if size > 0 else 0.0


@public
def orthogonal_separability(X: Numbers, labels: Numbers) -> OrthogonalSeparability:
    """Find the worst inner products of inputs within and between classes, of all n², made in pieces.

    Args:
        X: Inputs [n d], flattened: a tensor, an array or lists.
        labels: Classes [n], whole numbers.

    Raises:
        ValueError: as for ``linear_margin``, or the products are beyond float64.

    Source: the condition of Phuong and Lampert 2021 (ICLR), here for inner products of any two inputs.
    """
    X, labels, _ = _checked(X, labels)
    check_squarable("inputs", X)
    within, between = inf, -inf
    for rows, row_labels in zip(X.split(_PIECE), labels.split(_PIECE), strict=True):
        products, same = rows @ X.mT, row_labels[:, None] == labels
        within = min(within, float(products.masked_fill(~same, inf).min()))
        between = max(between, float(products.masked_fill(same, -inf).max()))
    return OrthogonalSeparability(least_within=within, largest_between=between)


@public
def full_rank_gram(X: Numbers) -> FullRankGram:
    """Compute the spectrum of XXᵀ, from the singular values of X.

    Args:
        X: Inputs [n d], flattened: a tensor, an array or lists.

    Raises:
        ValueError: X is no table of finite real numbers, is empty, or its squares are beyond float64.

    Source: the condition of Song, Xu and Lafferty 2021 (NeurIPS), theorem 4.3, for linear networks.
    """
    X = feature_table("inputs", X)
    check_squarable("inputs", X)
    n, d = X.shape
    # Of X, not of XXᵀ: the squares of small singular values would drown in the rounding of the large ones.
    values = torch.linalg.svdvals(X)
    rank = int((values > max(n, d) * torch.finfo(torch.float64).eps * values[0]).sum())
    full = rank == n
    return FullRankGram(
        points=n,
        rank=rank,
        smallest=float(values[-1] ** 2) if full else 0.0,
        condition=float((values[0] / values[-1]) ** 2) if full else inf,
    )


def _checked(X: Numbers, labels: Numbers) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Convert and check inputs and labels, and list the classes."""
    X = feature_table("inputs", X)
    labels = class_labels(labels, len(X))
    classes: tuple[int, ...] = tuple(labels.unique().tolist())
    if len(classes) < 2:
        raise ValueError(f"all labels are {int(labels[0])}: separability wants at least two classes")
    return X, labels, classes
