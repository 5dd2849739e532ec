"""The conditions of the theorems, as measured on a course."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.factorisation.measurements import Course
from falign.theory.factorisation.methods import conserved
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


def negative_invariant(course: Course) -> Assumption:
    """C(0) ⪯ 0 (fa)."""
    largest = torch.linalg.eigvalsh(conserved(*course.start, course.B))[:, -1]
    return Assumption(
        name="negative invariant",
        statement="λ_max(C(0)) ≤ 0",
        measured=float(largest.max()),
        needed=0.0,
        holds=bool((largest <= 1e-12 * largest.abs().max().clamp(min=1)).all()),
    )


def long_enough(course: Course, tolerance: float) -> Assumption:
    """The run ended so near rest that ZW is within tolerance·|Y| of where it rests.

    With P onto the rows of W, ``|ZW - YP| = |RP| ≤ |RWᵀ|/σ(W)``, and ``BY(I - P) = BR(I - P)`` makes ``YP`` miss
    ``Y(BY)⁺BY`` by at most ``|Y||BR|/σ(BY)``; σ is the least singular value above the root of the precision.
    """
    Z, W = course.end
    R, BY = course.Y - Z @ W, course.B @ course.Y
    size = _norm(course.Y).clamp(min=torch.finfo(R.dtype).tiny)
    left = _norm(R @ W.mT) / (_least(W) * size) + _norm(course.B @ R) / _least(BY)
    measured = float(left.max())
    return Assumption(
        name="long enough",
        statement="|RWᵀ|/(σ(W)|Y|) + |BR|/σ(BY) at the end within the tolerance",
        measured=measured,
        needed=tolerance,
        holds=measured <= tolerance,
    )


def finite(course: Course, *names: str) -> Assumption:
    """No run overflowed, so far as these names tell; the step (in flow the time) is of the first that did."""
    sound = torch.stack([course[name] for name in names]).isfinite().all(0)
    steps = course.times / (course.rate or 1.0)
    first = [float(steps[int((~run).nonzero()[0])]) for run in sound if not run.all()]
    first += course.diverged[course.diverged >= 0].double().tolist()
    return Assumption(
        name="finite",
        statement="no run overflows (the step at which the first one does, -1 if none)",
        measured=min(first, default=-1.0),
        holds=not first,
    )


def judged(course: Course, *methods: str) -> None:
    """Refuse a course that the statement is not about, or of a precision for which its tolerances are not meant.

    Raises:
        ValueError: it is of another method, or not in float64.
    """
    if methods and course.method.name not in methods:
        raise ValueError(f"the statement is about {' and '.join(methods)}, the course is of {course.method.name}")
    if course.Y.dtype != torch.float64:
        raise ValueError(f"the course is in {course.Y.dtype}, judged to float64 rounding: take Y, B, start .double()")


def later(course: Course) -> None:
    """Refuse a course that has only its start.

    Raises:
        ValueError: nothing was recorded after time 0, or only one time.
    """
    if len(course.times) < 2:
        raise ValueError("nothing was recorded after the first time: take steps, and record more (at)")


def _norm(A: Float[Tensor, "runs rows columns"]) -> Float[Tensor, " runs"]:
    return A.square().sum((1, 2)).sqrt()


def _least(A: Float[Tensor, "runs rows columns"]) -> Float[Tensor, " runs"]:
    """The least singular value above the root of the precision; inf where there is none, as of 0."""
    sizes = torch.linalg.svdvals(A.nan_to_num(0.0, 0.0, 0.0))
    counts = sizes > torch.finfo(A.dtype).eps ** 0.5 * sizes[:, :1]
    return torch.where(counts, sizes, torch.inf).amin(1)


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
