"""Statements about a trajectory of the factorisation: what is conserved, what falls and where it ends."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import positive
from falign.theory._coerce import recording
from falign.theory.factorisation._closed_forms import stationary_error
from falign.theory.factorisation._methods import conserved, row_basis, sufficient_rate
from falign.theory.factorisation._problem import frobenius
from falign.theory.factorisation._simulate import Trajectory
from falign.theory.statement import Assumption, TheoremCheck

# Assumptions of the statements, as measured on a trajectory.


def _within_reach(trajectory: Trajectory) -> tuple[Assumption, ...]:
    """R ≥ rank Y, B injective on the columns of Y, and Z(0) in them (fa)."""
    r, ranks = trajectory.B.shape[1], torch.linalg.matrix_rank(trajectory.Y)
    seen = torch.linalg.matrix_rank(trajectory.B @ trajectory.Y)
    columns = row_basis(trajectory.Y.mT)
    Z = trajectory.start.Z
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
    size = frobenius(Z)
    left = frobenius(Z - columns.mT @ (columns @ Z))
    return float((left / size.clamp(min=torch.finfo(Z.dtype).tiny)).max())


def _small_step(trajectory: Trajectory) -> Assumption:
    """η ≤ η_max; of flow, η = 0."""
    limit = float(sufficient_rate(trajectory.method.name, trajectory.Y, trajectory.B, trajectory.start).min())
    return Assumption(
        name="step size", statement="η ≤ η_max", measured=trajectory.rate, needed=limit, holds=trajectory.rate <= limit
    )


def _negative_invariant(trajectory: Trajectory) -> Assumption:
    """C(0) ⪯ 0 (fa)."""
    largest = torch.linalg.eigvalsh(conserved(*trajectory.start, trajectory.B))[:, -1]
    return Assumption(
        name="negative invariant",
        statement="λ_max(C(0)) ≤ 0",
        measured=float(largest.max()),
        needed=0.0,
        holds=bool((largest <= 1e-12 * largest.abs().max().clamp(min=1)).all()),
    )


def _long_enough(trajectory: Trajectory, tolerance: float) -> Assumption:
    """The run ended so near rest that ZW is within tolerance·|Y| of where it rests.

    With P onto the rows of W, ``|ZW - YP| = |RP| ≤ |RWᵀ|/σ(W)``, and ``BY(I - P) = BR(I - P)`` makes ``YP`` miss
    ``Y(BY)⁺BY`` by at most ``|Y||BR|/σ(BY)``; σ is the least singular value above the root of the precision.
    """
    Z, W = trajectory.end
    R, BY = trajectory.Y - Z @ W, trajectory.B @ trajectory.Y
    size = frobenius(trajectory.Y).clamp(min=torch.finfo(R.dtype).tiny)
    left = frobenius(R @ W.mT) / (_least(W) * size) + frobenius(trajectory.B @ R) / _least(BY)
    measured = float(left.max())
    return Assumption(
        name="long enough",
        statement="|RWᵀ|/(σ(W)|Y|) + |BR|/σ(BY) at the end within the tolerance",
        measured=measured,
        needed=tolerance,
        holds=measured <= tolerance,
    )


def finite(trajectory: Trajectory, *names: str) -> Assumption:
    """No run overflowed, so far as these names tell; the step (in flow the time) is of the first that did."""
    sound = torch.stack([trajectory[name] for name in names]).isfinite().all(0)
    steps = trajectory.times / (trajectory.rate or 1.0)
    first = [float(steps[int((~run).nonzero()[0])]) for run in sound if not run.all()]
    first += trajectory.diverged[trajectory.diverged >= 0].double().tolist()
    return Assumption(
        name="finite",
        statement="no run overflows (the step at which the first one does, -1 if none)",
        measured=min(first, default=-1.0),
        holds=not first,
    )


def judged(trajectory: Trajectory, *methods: str) -> None:
    """Refuse a trajectory that the statement is not about, or of a precision for which its tolerances are not meant.

    Raises:
        ValueError: it is of another method, or not in float64.
    """
    if methods and trajectory.method.name not in methods:
        raise ValueError(
            f"the statement is about {' and '.join(methods)}, the trajectory is of {trajectory.method.name}"
        )
    if trajectory.Y.dtype != torch.float64:
        raise ValueError(
            f"the trajectory is in {trajectory.Y.dtype}, judged to float64 rounding: take Y, B, start .double()"
        )


def later(trajectory: Trajectory) -> None:
    """Refuse a trajectory that has only its start.

    Raises:
        ValueError: nothing was recorded after time 0, or only one time.
    """
    if len(trajectory.times) < 2:
        raise ValueError("nothing was recorded after the first time: take steps, and record more (at)")


def _least(A: Float[Tensor, "runs rows columns"]) -> Float[Tensor, " runs"]:
    """The least singular value above the root of the precision; inf where there is none, as of 0."""
    sizes = torch.linalg.svdvals(A.nan_to_num(0.0, 0.0, 0.0))
    counts = sizes > torch.finfo(A.dtype).eps ** 0.5 * sizes[:, :1]
    return torch.where(counts, sizes, torch.inf).amin(1)


def orthogonal(trajectory: Trajectory) -> Assumption:
    """Rows of W(0) are orthogonal and of equal length."""
    gram = trajectory.start.W @ trajectory.start.W.mT
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


SOURCE = "derived; after Garg and Vempala 2022 (AISTATS)"


@recording
def conservation(trajectory: Trajectory, tolerance: float | None = None) -> TheoremCheck:
    """Check that ``C(t) = C(0) + η² Σ BR(BR)ᵀ`` at every recorded time, C of the trajectory's method.

    Proof for fa: ``WWᵀ`` gains ``η(BRWᵀ + WRᵀBᵀ) + η²BR(BR)ᵀ`` in a step, and ``BZ + (BZ)ᵀ`` the first bracket. Under
    fa*, ``RWᵀ = 0`` removes the bracket, and WWᵀ itself is what gains; under gd WWᵀ - ZᵀZ gains
    ``η²(ZᵀRRᵀZ - WRᵀRWᵀ)``. In flow nothing is gained.

    Args:
        trajectory: With ``invariant``, ``drift`` and ``account`` recorded.
        tolerance: Of what |C| is at most, or |WWᵀ| at the end; None for 1e-10 in steps and 1e-6 in flow.

    Raises:
        ValueError: the tolerance is not positive, what it needs was not recorded, or the trajectory is not in float64.

    Source: derived.
    """
    judged(trajectory)
    method = trajectory.method
    tolerance = (1e-10 if trajectory.rate else 1e-6) if tolerance is None else positive("tolerance", tolerance)
    gram = frobenius(trajectory.end.W @ trajectory.end.W.mT)
    scale = torch.maximum(trajectory["invariant"].amax(1), gram).clamp(min=torch.finfo(gram.dtype).tiny)
    residual = trajectory["account"] / scale[:, None]
    return TheoremCheck(
        name="Conservation",
        source=SOURCE,
        reading=f"{method.name}: C = {method.law}, less the exact gain of the steps; in tolerances",
        assumptions=(finite(trajectory, "invariant", "account"),),
        bound=torch.ones_like(residual),
        measured=residual / tolerance,
        scale=torch.ones_like(scale),
        constants={"relative residual": float(residual.max())},
        series={"drift": trajectory["drift"]},
    )


@recording
def descent_of_feedback(trajectory: Trajectory) -> TheoremCheck:
    """Check that ``V = |BR|²`` does not increase from one recorded time to the next under fa.

    Proof in flow: ``V̇ = -2|BRWᵀ|² - |WᵀBR|² + tr(C BR(BR)ᵀ)``, and the last term is at most 0 where ``C ⪯ 0``, as
    from a zero start. In steps C gains O(η), and η must be small.

    Args:
        trajectory: Of fa, with ``lyapunov`` recorded.

    Raises:
        ValueError: it is of another method or not in float64, or too little was recorded.

    Source: derived.
    """
    judged(trajectory, "fa")
    later(trajectory)
    V = trajectory["lyapunov"]
    size = V[:, 0].clamp(min=torch.finfo(V.dtype).tiny)
    return TheoremCheck(
        name="Descent of |BR|²",
        source=SOURCE,
        reading="each recorded value is at most the one before",
        assumptions=(_negative_invariant(trajectory), _small_step(trajectory)),
        bound=V[:, :-1],
        measured=V[:, 1:],
        scale=size,
        constants={"left": float((V[:, -1] / size).max())},
    )


@recording
def optimum_reached(trajectory: Trajectory, tolerance: float = 1e-6) -> TheoremCheck:
    """Check that the error ends below ``tolerance · |Y|`` where r ≥ rank Y: "converges to the optimum".

    Proof for fa from ``C ⪯ 0``: V falls and is bounded below, so ``V̇ → 0``, and with it ``BRWᵀ`` and ``WᵀBR``; V → 0
    (LaSalle; Z and W bounded, as ``|WWᵀ|² ≤ 2|W||BZW|``). R keeps its columns in those of Y as long as Z(0) does, and
    B is injective there, so ``BR → 0`` is ``R → 0``. For fa* see ``optimal_output_bound``. What Z(0) has outside the
    columns of Y decays with λ_min(WWᵀ) only: slowly. From other starts fa is seen to converge as well, unproven here:
    the check then says so in its name, and leaves the assumption on C(0) open.

    Args:
        trajectory: Of fa or fa*, with ``error`` recorded.
        tolerance: Of |Y|, at the last recorded time.

    Raises:
        ValueError: it is of gd or not in float64, the tolerance is not positive, or the error was not recorded.

    Source: derived; the abstract: "converges to the optimum when r ≥ rank(Y)".
    """
    judged(trajectory, "fa", "fa*")
    positive("tolerance", tolerance)
    start = _negative_invariant(trajectory)
    proven = bool(start.holds) or trajectory.method.name == "fa*"
    open_start = () if proven else (replace(start, holds=None),)
    size = frobenius(trajectory.Y).clamp(min=torch.finfo(trajectory.Y.dtype).tiny)
    measured = (trajectory["error"][:, -1] / size)[:, None]
    return TheoremCheck(
        name="Convergence for r ≥ rank Y" + ("" if proven else ", seen but not proven from this start,"),
        source=SOURCE,
        reading=f"error at the end at most {tolerance:g} of |Y|, in units of that",
        assumptions=(
            *_within_reach(trajectory),
            *open_start,
            _small_step(trajectory),
            _long_enough(trajectory, tolerance),
        ),
        bound=torch.ones_like(measured),
        measured=measured / tolerance,
        scale=torch.ones_like(size),
    )


@recording
def stationary_limit(trajectory: Trajectory, tolerance: float = 1e-8) -> TheoremCheck:
    """Check that ZW ends at ``Y (BY)⁺ BY``, and its error at ``|Y(I - P_BY)|``, where r < rank Y too.

    Proof: at rest ``RWᵀ = 0`` makes ZW the projection of Y on the rows of W, and ``BR = 0`` puts the rows of BY among
    those; if BY has rank r, they are the same.

    Args:
        trajectory: Of fa or fa*, with ``distance`` and ``error`` recorded.
        tolerance: Of |Y|, at the last recorded time.

    Raises:
        ValueError: it is of gd or not in float64, the tolerance is not positive, or what it needs was not recorded.

    Source: derived.
    """
    if trajectory.method.name == "gd":
        raise ValueError("the statement is about fa and fa*, the trajectory is of gd: its limit is optimum(Y, r)")
    judged(trajectory)
    positive("tolerance", tolerance)
    size = frobenius(trajectory.Y).clamp(min=torch.finfo(trajectory.Y.dtype).tiny)
    known = stationary_error(trajectory.Y, trajectory.B)
    beside = (trajectory["error"][:, -1] - known).abs()
    ranks = torch.linalg.matrix_rank(trajectory.B @ trajectory.Y)
    measured = torch.stack([trajectory["distance"][:, -1], beside], 1) / size[:, None]
    return TheoremCheck(
        name="Stationary function",
        source=SOURCE,
        reading=f"|ZW - Y(BY)⁺BY| and the difference of the errors at the end, in units of {tolerance:g} of |Y|",
        assumptions=(
            Assumption(
                name="rank of BY",
                statement="rank(BY) = min(r, rank Y)",
                measured=float(ranks.min()),
                needed=float(torch.linalg.matrix_rank(trajectory.Y).clamp(max=trajectory.B.shape[1]).max()),
                holds=bool((ranks == torch.linalg.matrix_rank(trajectory.Y).clamp(max=trajectory.B.shape[1])).all()),
            ),
            _small_step(trajectory),
            _long_enough(trajectory, tolerance),
        ),
        bound=torch.ones_like(measured),
        measured=measured / tolerance,
        scale=torch.ones_like(size),
    )


# FA*: the alignment grows by what is left to learn; as it is bounded, that vanishes.


@recording
def alignment_growth(trajectory: Trajectory, tolerance: float = 1e-8) -> TheoremCheck:
    """Check ``tr(BYWᵀ)(t) - tr(BYWᵀ)(0) = η Σ |BR|²``: exact in steps of any size, and ∫|BR|² in flow.

    Proof: a step adds ``η tr(BY(BR)ᵀ)``, and ``tr(BR(BY)ᵀ) = |BR|²`` as ``R(ZW)ᵀ = RWᵀZᵀ = 0``.

    Args:
        trajectory: Of fa*, with ``weighted`` (which is tr(BYWᵀ)) and ``growth`` recorded.
        tolerance: Of the largest of both, and of ``|BY||W|``, whose rounding either may be.

    Raises:
        ValueError: it is of another method or not in float64, the tolerance is not positive, or what it needs was not
            recorded.

    Source: derived.
    """
    judged(trajectory, "fa*")
    gained = trajectory["weighted"] - trajectory["weighted"][:, :1]
    size = frobenius(trajectory.B @ trajectory.Y) * frobenius(trajectory.end.W)
    scale = (size + (gained.abs() + trajectory["growth"]).amax(1)).clamp(min=torch.finfo(gained.dtype).tiny)
    residual = (gained - trajectory["growth"]).abs() / scale[:, None]
    return TheoremCheck(
        name="Growth of the alignment",
        source=SOURCE,
        reading="tr(BZWWᵀ) = tr(BYWᵀ); in units of the tolerance",
        assumptions=(finite(trajectory, "weighted", "growth"),),
        bound=torch.ones_like(residual),
        measured=residual / positive("tolerance", tolerance),
        scale=torch.ones_like(scale),
        series={"gained": gained},
    )


@recording
def monotone_alignment(trajectory: Trajectory, tolerance: float = 1e-8) -> TheoremCheck:
    """Check that ``tr(BZ) = ⟨Bᵀ, Z⟩`` does not fall where ``W(0)W(0)ᵀ = c I``: Bᵀ and Z come closer.

    Proof in flow: WWᵀ is conserved, so ``tr(BZ) = tr(BYWᵀ)/c``, and that grows by |BR|²/c. Steps make WWᵀ gain
    ``η² Σ BR(BR)ᵀ``, which is why η must be small. In steps, with G = WWᵀ and S = BR(BR)ᵀ, tr(BZ) gains
    ``η tr((I - ηBZ) S (G + η²S)⁻¹)``: at least 0 where ``η|BZ| ≤ 1``, as η ≤ η_max makes it, and G = cI, as it is in
    the first step; of later ones this is seen, not proven. Neither the loss nor the cosine need be monotone.

    Args:
        trajectory: Of fa*, with ``alignment`` recorded.
        tolerance: How much it may fall between two recorded times.

    Raises:
        ValueError: it is of another method or not in float64, the tolerance is not positive, or too little was
            recorded.

    Source: derived; the abstract: "the forward and feedback matrices come closer during the updates".
    """
    judged(trajectory, "fa*")
    later(trajectory)
    trace = trajectory["alignment"]
    return TheoremCheck(
        name="Monotone alignment",
        source=SOURCE,
        reading="each recorded tr(BZ) is at least the one before; proven in flow and for the first step",
        assumptions=(orthogonal(trajectory), _small_step(trajectory)),
        bound=trace[:, :-1] - positive("tolerance", tolerance),
        measured=trace[:, 1:],
        relation="at least",
        scale=trace.abs().amax(1),
        constants={"gained": float((trace[:, -1] - trace[:, 0]).min())},
    )


@recording
def gram_drift(trajectory: Trajectory) -> TheoremCheck:
    """Check ``|WWᵀ - W(0)W(0)ᵀ| ≤ η · (2√c |BY|_* + η |BY|_*²)``, c = |W(0)|²: O(η), and 0 in flow.

    Proof: the drift is ``η² Σ BR(BR)ᵀ``, its norm at most η times the growth G = η Σ |BR|², and G has the bound of
    ``optimal_output_bound``. ``series["by its own growth"]`` is ηG.

    Args:
        trajectory: Of fa*, in steps, with ``gram drift`` and ``growth`` recorded.

    Raises:
        ValueError: it is of another method, in flow or not in float64, or what it needs was not recorded.

    Source: derived.
    """
    judged(trajectory, "fa*")
    if not trajectory.rate:
        raise ValueError("the trajectory is a flow, whose WWᵀ does not drift: take it in steps")
    measured = trajectory["gram drift"]
    bound = (trajectory.rate * _most_growth(trajectory))[:, None].expand_as(measured)
    return TheoremCheck(
        name="Drift of WWᵀ",
        source=SOURCE,
        reading="|·| is Frobenius' norm",
        assumptions=(finite(trajectory, "gram drift", "growth"),),
        bound=bound,
        measured=measured,
        scale=frobenius(trajectory.start.W @ trajectory.start.W.mT),
        series={"by its own growth": trajectory.rate * trajectory["growth"]},
    )


@recording
def optimal_output_bound(trajectory: Trajectory) -> TheoremCheck:
    """Check ``min |BR|² ≤ (2√c |BY|_* + η|BY|_*²)/t``, c = |W(0)|² and |·|_* the sum of the singular values.

    Proof: ``G = η Σ |BR|² = tr(BYWᵀ)(t) - tr(BYWᵀ)(0) ≤ (|W(t)| + |W(0)|) |BY|_*`` in spectral norms, and
    ``|W(t)|² ≤ c + ηG``; solved for G this is ``G ≤ 2√c |BY|_* + η |BY|_*²``. The least |BR|² is at most the mean,
    G/t. So |BR| → 0, and where B is injective on the columns of Y, with r ≥ rank Y, R → 0.

    Args:
        trajectory: Of fa*, with ``growth`` recorded, from which the mean G/t is taken.

    Raises:
        ValueError: it is of another method or not in float64, nothing was recorded after time 0, or the growth was not.

    Source: derived.
    """
    judged(trajectory, "fa*")
    after = trajectory.times > 0
    if not bool(after.any()):
        raise ValueError("nothing was recorded after time 0: record more (at)")
    times = trajectory.times[after].to(trajectory.Y)
    most = _most_growth(trajectory)
    return TheoremCheck(
        name="Vanishing of BR",
        source=SOURCE,
        reading="the mean of |BR|² over the steps so far, which the least is at most",
        assumptions=(finite(trajectory, "growth"),),
        bound=most[:, None] / times,
        measured=trajectory["growth"][:, after] / times,
        scale=most,
        series={"growth": trajectory["growth"][:, after]},
    )


def _most_growth(trajectory: Trajectory) -> Float[Tensor, " runs"]:
    """``2√c |BY|_* + η |BY|_*²``."""
    root_c = torch.linalg.matrix_norm(trajectory.start.W, ord=2)
    nuclear = torch.linalg.matrix_norm(trajectory.B @ trajectory.Y, ord="nuc")
    return 2 * root_c * nuclear + trajectory.rate * nuclear.square()
