"""Weights and feedback with which linear networks begin: small, zero, or against the feedback path."""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from falign.feedback import Normal, Orthogonal, draw, generator
from falign.lab.experiment import Point
from falign.papers.girotti2021.problems import Problem

AGAINST = 1.8
"""Size c of the start against the feedback path: λ_c = c³/(3√3) = 1.12 is above all components; the largest is 1."""
SMALL = 1e-2
"""Size of small random weights, entries N(0, size²/inputs); PyTorch's own are of size 0.6."""


def start(learned: Problem, point: Point, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and feedback of a point of a grid.

    Feedback carries an error at its norm: entries N(0, 1/columns), or orthonormal rows where the start is spectral.

    Args:
        learned: What will be learned.
        point: Has "rule", "depth", "hidden", "scheme" and "basis". Basis "spectral" is orthogonal feedback, with which
            zero and anti-aligned weights are diagonal in the components' directions, and stay so; "random" is not.
        seed: Of what is drawn.

    Returns:
        W_1, …, W_L and B_2, …, B_L, of dfa B_l [outputs, inputs of layer l]. Gradient descent has feedback too: its
        anti-aligned start is that of feedback alignment.
    """
    hidden, depth = int(point["hidden"]), int(point["depth"])
    widths = [learned.X.shape[1], *[hidden] * (depth - 1), learned.Y.shape[1]]
    family = Orthogonal() if point["basis"] == "spectral" else Normal()
    B = [
        draw(
            family,
            (widths[-1] if point["rule"] == "dfa" else out, into),
            seed=seed,
            name=f"{place}",
            deviation=into**-0.5,
        )
        for place, (into, out) in enumerate(pairwise(widths[1:]), 2)
    ]
    B = [_orthonormal(part.double()) if point["basis"] == "spectral" else part.double() for part in B]
    W = [torch.zeros(out, into, dtype=torch.float64) for into, out in pairwise(widths)]
    if point["scheme"] == "small":
        W = [_small(part, seed, place) for place, part in enumerate(W, 1)]
    if point["scheme"] == "anti-aligned":
        directions = path(B, direct=point["rule"] == "dfa") @ learned.U
        W[0] = -AGAINST * directions / directions.norm(dim=0) @ learned.V.mT
    return W, B


def path(B: Sequence[Tensor], *, direct: bool) -> Tensor:
    """What carries the output's error to the first hidden layer [hidden outputs]."""
    if direct or len(B) == 1:
        return B[0].mT
    return torch.linalg.multi_dot([part.mT for part in B])


def _small(weight: Tensor, seed: int, place: int) -> Tensor:
    drawn = torch.randn(*weight.shape, generator=generator(seed, str(place), "weights")).double()
    return SMALL / sqrt(weight.shape[1]) * drawn


def _orthonormal(B: Tensor) -> Tensor:
    """The same to float64's rounding, from what was drawn in float32."""
    left, _, right = torch.linalg.svd(B, full_matrices=False)
    return left @ right
