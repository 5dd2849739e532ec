"""FA*: alignment grows by what is left to learn, and being bounded makes that vanish."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import recording
from falign.theory.factorisation.assumptions import finite, judged, later, orthogonal, small_step
from falign.theory.factorisation.measurements import Course
from falign.theory.factorisation.theorems import SOURCE
from falign.theory.inputs import positive
from falign.theory.statement import TheoremCheck


@recording
def alignment_growth(course: Course, tolerance: float = 1e-8) -> TheoremCheck:
    """Check ``tr(BYWᵀ)(t) - tr(BYWᵀ)(0) = η Σ |BR|²``: exact in steps of any size, and ∫|BR|² in flow.

    Proof: a step adds ``η tr(BY(BR)ᵀ)``, and ``tr(BR(BY)ᵀ) = |BR|²`` as ``R(ZW)ᵀ = RWᵀZᵀ = 0``.

    Args:
        course: Of fa*, with ``weighted`` (which is tr(BYWᵀ)) and ``growth`` recorded.
        tolerance: Of the largest of both, and of ``|BY||W|``, whose rounding either may be.

    Raises:
        ValueError: it is of another method or not in float64, the tolerance is not positive, or what it needs was not
            recorded.

    Source: derived.
    """
    judged(course, "fa*")
    gained = course["weighted"] - course["weighted"][:, :1]
    size = (course.B @ course.Y).square().sum((1, 2)).sqrt() * course.end.W.square().sum((1, 2)).sqrt()
    scale = (size + (gained.abs() + course["growth"]).amax(1)).clamp(min=torch.finfo(gained.dtype).tiny)
    residual = (gained - course["growth"]).abs() / scale[:, None]
    return TheoremCheck(
        name="Growth of the alignment",
        source=SOURCE,
        reading="tr(BZWWᵀ) = tr(BYWᵀ); in units of the tolerance",
        assumptions=(finite(course, "weighted", "growth"),),
        bound=torch.ones_like(residual),
        measured=residual / positive("tolerance", tolerance),
        scale=torch.ones_like(scale),
        series={"gained": gained},
    )


@recording
def monotone_alignment(course: Course, tolerance: float = 1e-8) -> TheoremCheck:
    """Check that ``tr(BZ) = ⟨Bᵀ, Z⟩`` does not fall where ``W(0)W(0)ᵀ = c I``: Bᵀ and Z come closer.

    Proof in flow: WWᵀ is conserved, so ``tr(BZ) = tr(BYWᵀ)/c``, and that grows by |BR|²/c. Steps make WWᵀ gain
    ``η² Σ BR(BR)ᵀ``, which is why η must be small. In steps, with G = WWᵀ and S = BR(BR)ᵀ, tr(BZ) gains
    ``η tr((I - ηBZ) S (G + η²S)⁻¹)``: at least 0 where ``η|BZ| ≤ 1``, as η ≤ η_max makes it, and G = cI, as it is in
    the first step; of later ones this is seen, not proven. Neither the loss nor the cosine need be monotone.

    Args:
        course: Of fa*, with ``alignment`` recorded.
        tolerance: How much it may fall between two recorded times.

    Raises:
        ValueError: it is of another method or not in float64, the tolerance is not positive, or too little was
            recorded.

    Source: derived; the abstract: "the forward and feedback matrices come closer during the updates".
    """
    judged(course, "fa*")
    later(course)
    trace = course["alignment"]
    return TheoremCheck(
        name="Monotone alignment",
        source=SOURCE,
        reading="each recorded tr(BZ) is at least the one before; proven in flow and for the first step",
        assumptions=(orthogonal(course), small_step(course)),
        bound=trace[:, :-1] - positive("tolerance", tolerance),
        measured=trace[:, 1:],
        relation="at least",
        scale=trace.abs().amax(1),
        constants={"gained": float((trace[:, -1] - trace[:, 0]).min())},
    )


@recording
def gram_drift(course: Course) -> TheoremCheck:
    """Check ``|WWᵀ - W(0)W(0)ᵀ| ≤ η · (2√c |BY|_* + η |BY|_*²)``, c = |W(0)|²: O(η), and 0 in flow.

    Proof: the drift is ``η² Σ BR(BR)ᵀ``, its norm at most η times the growth G = η Σ |BR|², and G has the bound of
    ``optimal_output_bound``. ``series["by its own growth"]`` is ηG.

    Args:
        course: Of fa*, in steps, with ``gram drift`` and ``growth`` recorded.

    Raises:
        ValueError: it is of another method, in flow or not in float64, or what it needs was not recorded.

    Source: derived.
    """
    judged(course, "fa*")
    if not course.rate:
        raise ValueError("the course is a flow, whose WWᵀ does not drift: take it in steps")
    measured = course["gram drift"]
    bound = (course.rate * _most_growth(course))[:, None].expand_as(measured)
    return TheoremCheck(
        name="Drift of WWᵀ",
        source=SOURCE,
        reading="|·| is Frobenius' norm",
        assumptions=(finite(course, "gram drift", "growth"),),
        bound=bound,
        measured=measured,
        scale=(course.start.W @ course.start.W.mT).square().sum((1, 2)).sqrt(),
        series={"by its own growth": course.rate * course["growth"]},
    )


@recording
def optimal_output_bound(course: Course) -> TheoremCheck:
    """Check ``min |BR|² ≤ (2√c |BY|_* + η|BY|_*²)/t``, c = |W(0)|² and |·|_* the sum of the singular values.

    Proof: ``G = η Σ |BR|² = tr(BYWᵀ)(t) - tr(BYWᵀ)(0) ≤ (|W(t)| + |W(0)|) |BY|_*`` in spectral norms, and
    ``|W(t)|² ≤ c + ηG``; solved for G this is ``G ≤ 2√c |BY|_* + η |BY|_*²``. The least |BR|² is at most the mean,
    G/t. So |BR| → 0, and where B is injective on the columns of Y, with r ≥ rank Y, R → 0.

    Args:
        course: Of fa*, with ``growth`` recorded, from which the mean G/t is taken.

    Raises:
        ValueError: it is of another method or not in float64, nothing was recorded after time 0, or the growth was not.

    Source: derived.
    """
    judged(course, "fa*")
    after = course.times > 0
    if not bool(after.any()):
        raise ValueError("nothing was recorded after time 0: record more (at)")
    times = course.times[after].to(course.Y)
    most = _most_growth(course)
    return TheoremCheck(
        name="Vanishing of BR",
        source=SOURCE,
        reading="the mean of |BR|² over the steps so far, which the least is at most",
        assumptions=(finite(course, "growth"),),
        bound=most[:, None] / times,
        measured=course["growth"][:, after] / times,
        scale=most,
        series={"growth": course["growth"][:, after]},
    )


def _most_growth(course: Course) -> Float[Tensor, " runs"]:
    """``2√c |BY|_* + η |BY|_*²``."""
    root_c = torch.linalg.matrix_norm(course.start.W, ord=2)
    nuclear = torch.linalg.matrix_norm(course.B @ course.Y, ord="nuc")
    return 2 * root_c * nuclear + course.rate * nuclear.square()
