"""The conditions of the theorems, as measured on a course."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.factorisation.measurements import Course
from falign.theory.factorisation.stability import stable_rate
from falign.theory.factorisation.subspace import row_basis
from falign.theory.statement import Assumption


def within_reach(course: Course) -> tuple[Assumption, ...]:
    """R ≥ rank Y, B injective on the columns of Y, and Z(0) in them (fa)."""
    r, ranks = course.B.shape[1], torch.linalg.matrix_rank(course.Y)
    seen = torch.linalg.matrix_rank(course.B @ course.Y)
    columns = row_basis(course.Y.mT)
    Z = course.start.Z
    outside = _outside(Z, columns)
    return (
        Assumption(
            name="overparameterised",
            statement="rank Y ≤ r",
            measured=float(ranks.max()),
            needed=float(r),
            holds=bool((ranks <= r).all()),
        ),
        Assumption(
            name="injective feedback",
            statement="rank Y - rank(BY) ≤ 0",
            measured=float((ranks - seen).max()),
            needed=0.0,
            holds=bool((seen == ranks).all()),
        ),
        Assumption(
            name="start in the columns of Y",
            statement="|Z(0) - P_Y Z(0)|/|Z(0)| ≤ 1e-10",
            measured=outside,
            needed=1e-10,
            holds=outside <= 1e-10,
        ),
    )


def _outside(Z: Float[Tensor, "runs n r"], columns: Float[Tensor, "runs k n"]) -> float:
    size = Z.square().sum((1, 2)).sqrt()
    left = (Z - columns.mT @ (columns @ Z)).square().sum((1, 2)).sqrt()
    return float((left / size.clamp(min=torch.finfo(Z.dtype).tiny)).max())


def small_step(course: Course) -> Assumption:
    """η ≤ η_max; of flow, η = 0."""
    limit = float(stable_rate(course.method.name, course.Y, course.B, course.start).min())
    return Assumption(
        name="step size", statement="η ≤ η_max", measured=course.rate, needed=limit, holds=course.rate <= limit
    )


def only(name: str, course: Course) -> None:
    """Refuse a course of another method.

    Raises:
        ValueError: it is of another.
    """
    if course.method.name != name:
        raise ValueError(f"the statement is about {name}, the course is of {course.method.name}")


def orthogonal(course: Course) -> Assumption:
    """Rows of W(0) are orthogonal and of equal length."""
    gram = course.start.W @ course.start.W.mT
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    away = (gram - mean[:, None, None] * torch.eye(gram.shape[1]).to(gram)).abs().amax((1, 2)) / mean
    worst = float(away.max())
    return Assumption(
        name="orthonormal start",
        statement="|W(0)W(0)ᵀ/c - I| ≤ 1e-10",
        measured=worst,
        needed=1e-10,
        holds=worst <= 1e-10,
    )
