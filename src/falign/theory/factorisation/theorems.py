"""What is conserved, what falls and where it ends: statements about a course, with assumptions and verdict."""

from dataclasses import replace

import torch

from falign.theory.door import recording
from falign.theory.factorisation.assumptions import (
    finite,
    judged,
    later,
    long_enough,
    negative_invariant,
    small_step,
    within_reach,
)
from falign.theory.factorisation.closed_forms import stationary_error
from falign.theory.factorisation.measurements import Course
from falign.theory.inputs import positive
from falign.theory.statement import Assumption, TheoremCheck

SOURCE = "derived; after Garg and Vempala 2022 (AISTATS)"


@recording
def conservation(course: Course, tolerance: float | None = None) -> TheoremCheck:
    """Check that ``C(t) = C(0) + η² Σ BR(BR)ᵀ`` at every recorded time, C of the course's method.

    Proof for fa: ``WWᵀ`` gains ``η(BRWᵀ + WRᵀBᵀ) + η²BR(BR)ᵀ`` in a step, and ``BZ + (BZ)ᵀ`` the first bracket. Under
    fa*, ``RWᵀ = 0`` removes the bracket, and WWᵀ itself is what gains; under gd WWᵀ - ZᵀZ gains
    ``η²(ZᵀRRᵀZ - WRᵀRWᵀ)``. In flow nothing is gained.

    Args:
        course: With ``invariant``, ``drift`` and ``account`` recorded.
        tolerance: Of what |C| is at most, or |WWᵀ| at the end; None for 1e-10 in steps and 1e-6 in flow.

    Raises:
        ValueError: the tolerance is not positive, what it needs was not recorded, or the course is not in float64.

    Source: derived.
    """
    judged(course)
    tolerance = (1e-10 if course.rate else 1e-6) if tolerance is None else positive("tolerance", tolerance)
    gram = (course.end.W @ course.end.W.mT).square().sum((1, 2)).sqrt()
    scale = torch.maximum(course["invariant"].amax(1), gram).clamp(min=torch.finfo(gram.dtype).tiny)
    residual = course["account"] / scale[:, None]
    return TheoremCheck(
        name="Conservation",
        source=SOURCE,
        reading=f"{course.method.name}: C = {course.method.law}, less the exact gain of the steps; in tolerances",
        assumptions=(finite(course, "invariant", "account"),),
        bound=torch.ones_like(residual),
        measured=residual / tolerance,
        scale=torch.ones_like(scale),
        constants={"relative residual": float(residual.max())},
        series={"drift": course["drift"]},
    )


@recording
def descent_of_feedback(course: Course) -> TheoremCheck:
    """Check that ``V = |BR|²`` does not increase from one recorded time to the next under fa.

    Proof in flow: ``V̇ = -2|BRWᵀ|² - |WᵀBR|² + tr(C BR(BR)ᵀ)``, and the last term is at most 0 where ``C ⪯ 0``, as
    from a zero start. In steps C gains O(η), and η must be small.

    Args:
        course: Of fa, with ``lyapunov`` recorded.

    Raises:
        ValueError: it is of another method or not in float64, or too little was recorded.

    Source: derived.
    """
    judged(course, "fa")
    later(course)
    V = course["lyapunov"]
    size = V[:, 0].clamp(min=torch.finfo(V.dtype).tiny)
    return TheoremCheck(
        name="Descent of |BR|²",
        source=SOURCE,
        reading="each recorded value is at most the one before",
        assumptions=(negative_invariant(course), small_step(course)),
        bound=V[:, :-1],
        measured=V[:, 1:],
        scale=size,
        constants={"left": float((V[:, -1] / size).max())},
    )


@recording
def optimum_reached(course: Course, tolerance: float = 1e-6) -> TheoremCheck:
    """Check that the error ends below ``tolerance · |Y|`` where r ≥ rank Y: "converges to the optimum".

    Proof for fa from ``C ⪯ 0``: V falls and is bounded below, so ``V̇ → 0``, and with it ``BRWᵀ`` and ``WᵀBR``; V → 0
    (LaSalle; Z and W bounded, as ``|WWᵀ|² ≤ 2|W||BZW|``). R keeps its columns in those of Y as long as Z(0) does, and
    B is injective there, so ``BR → 0`` is ``R → 0``. For fa* see ``optimal_output_bound``. What Z(0) has outside the
    columns of Y decays with λ_min(WWᵀ) only: slowly. From other starts fa is seen to converge as well, unproven here:
    the check then says so in its name, and leaves the assumption on C(0) open.

    Args:
        course: Of fa or fa*, with ``error`` recorded.
        tolerance: Of |Y|, at the last recorded time.

    Raises:
        ValueError: it is of gd or not in float64, the tolerance is not positive, or the error was not recorded.

    Source: derived; the abstract: "converges to the optimum when r ≥ rank(Y)".
    """
    judged(course, "fa", "fa*")
    positive("tolerance", tolerance)
    start = negative_invariant(course)
    proven = bool(start.holds) or course.method.name == "fa*"
    open_start = () if proven else (replace(start, holds=None),)
    size = course.Y.square().sum((1, 2)).sqrt().clamp(min=torch.finfo(course.Y.dtype).tiny)
    measured = (course["error"][:, -1] / size)[:, None]
    return TheoremCheck(
        name="Convergence for r ≥ rank Y" + ("" if proven else ", seen but not proven from this start,"),
        source=SOURCE,
        reading=f"error at the end at most {tolerance:g} of |Y|, in units of that",
        assumptions=(*within_reach(course), *open_start, small_step(course), long_enough(course, tolerance)),
        bound=torch.ones_like(measured),
        measured=measured / tolerance,
        scale=torch.ones_like(size),
    )


@recording
def stationary_limit(course: Course, tolerance: float = 1e-8) -> TheoremCheck:
    """Check that ZW ends at ``Y (BY)⁺ BY``, and its error at ``|Y(I - P_BY)|``, where r < rank Y too.

    Proof: at rest ``RWᵀ = 0`` makes ZW the projection of Y on the rows of W, and ``BR = 0`` puts the rows of BY among
    those; if BY has rank r, they are the same.

    Args:
        course: Of fa or fa*, with ``distance`` and ``error`` recorded.
        tolerance: Of |Y|, at the last recorded time.

    Raises:
        ValueError: it is of gd or not in float64, the tolerance is not positive, or what it needs was not recorded.

    Source: derived.
    """
    if course.method.name == "gd":
        raise ValueError("the statement is about fa and fa*, the course is of gd: its limit is optimum(Y, r)")
    judged(course)
    positive("tolerance", tolerance)
    size = course.Y.square().sum((1, 2)).sqrt().clamp(min=torch.finfo(course.Y.dtype).tiny)
    known = stationary_error(course.Y, course.B)
    beside = (course["error"][:, -1] - known).abs()
    ranks = torch.linalg.matrix_rank(course.B @ course.Y)
    measured = torch.stack([course["distance"][:, -1], beside], 1) / size[:, None]
    return TheoremCheck(
        name="Stationary function",
        source=SOURCE,
        reading=f"|ZW - Y(BY)⁺BY| and the difference of the errors at the end, in units of {tolerance:g} of |Y|",
        assumptions=(
            Assumption(
                name="rank of BY",
                statement="rank(BY) = min(r, rank Y)",
                measured=float(ranks.min()),
                needed=float(torch.linalg.matrix_rank(course.Y).clamp(max=course.B.shape[1]).max()),
                holds=bool((ranks == torch.linalg.matrix_rank(course.Y).clamp(max=course.B.shape[1])).all()),
            ),
            small_step(course),
            long_enough(course, tolerance),
        ),
        bound=torch.ones_like(measured),
        measured=measured / tolerance,
        scale=torch.ones_like(size),
    )
