"""The problem ``min ½|ZW - Y|²`` for many draws of the feedback B: sizes, starts, and what cannot be taken."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import (
    as_list,
    check_finite,
    check_floating,
    check_full_rank,
    check_memory,
    check_same_format,
    is_whole,
    non_negative,
    positive,
)
from falign.feedback import generator
from falign.theory._coerce import public

_STREAM = "factorisation"


class State(NamedTuple):
    """Both factors of every run."""

    Z: Float[Tensor, "runs n r"]
    W: Float[Tensor, "runs r m"]


Start: TypeAlias = State | tuple[Tensor, Tensor]
"""A state, or its Z and W as a plain pair."""


def frobenius(A: Float[Tensor, "... rows columns"]) -> Float[Tensor, "..."]:
    """``|A|``, of every run."""
    return A.square().sum((-1, -2)).sqrt()


@public
def feedback(n: int, r: int, *, seeds: Sequence[int], scale: float = 1.0) -> Float[Tensor, "runs r n"]:
    """Fixed random feedback B with entries N(0, scale²/n), in float64 on the CPU.

    From a zero start the scale sets the unit of time only: B → cB is ``W = c^{1/3}W̃``, ``Z = c^{-1/3}Z̃`` and
    ``t = τ/c^{2/3}``. A run's draw depends on its seed alone.

    Args:
        n: Rows of Y, the outputs of the second layer.
        r: Inner dimension.
        seeds: One run each.
        scale: What B does to the norm of an error, in the mean, times √(r/n).

    Raises:
        ValueError: a size or the scale is not positive, or there is no seed.
    """
    positive("scale", scale)
    return _normal("feedback", (r, n), seeds) * (scale / sqrt(n))


@public
def zero(Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"]) -> State:
    """``Z = 0`` and ``W = 0`` for every draw of B: ``C = 0``, so that what is conserved makes |BR| fall."""
    Y = fitting(Y, B)
    r = B.shape[1]
    return State(Y.new_zeros(*Y.shape[:2], r), Y.new_zeros(len(B), r, Y.shape[2]))


@public
def normal(
    Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], *, seeds: Sequence[int], scale: float = 1.0
) -> State:
    """Z and W with entries N(0, scale²), one seed a run.

    Raises:
        ValueError: the scale is negative, or the seeds are not as many as the runs.
    """
    non_negative("scale", scale)
    still = zero(Y, B)
    draws = [
        _normal(name, (part.shape[1], part.shape[2]), _one_a_run(seeds, B)).to(part) * scale
        for name, part in still._asdict().items()
    ]
    return State(*draws)


@public
def orthonormal(Y: Float[Tensor, "... n m"], B: Float[Tensor, "runs r n"], *, seeds: Sequence[int]) -> State:
    """``Z = 0`` and W with orthonormal rows, ``WWᵀ = I``, uniformly distributed: the start of fa*'s sharpest statement.

    Raises:
        ValueError: the seeds are not as many as the runs.
    """
    still = zero(Y, B)
    r, m = still.W.shape[1:]
    drawn = torch.linalg.qr(_normal("W", (m, r), _one_a_run(seeds, B)))
    return still._replace(W=(drawn.Q * drawn.R.diagonal(dim1=1, dim2=2).sign()[:, None]).mT.contiguous().to(Y))


def fitting(Y: Tensor, B: Tensor, state: State | None = None) -> Float[Tensor, "runs n m"]:
    """Y of every run, after a look at all sizes and numbers.

    Raises:
        ValueError: they do not fit, are not finite, B is not of full rank, or r > min(n, m).
    """
    expanded = sized(Y, B, state)
    for name, part in _given(Y, B, state).items():
        check_finite(name, part)
    check_full_rank("B", B)
    return expanded


def sized(Y: Tensor, B: Tensor, state: State | None = None) -> Float[Tensor, "runs n m"]:
    """Y of every run, after a look at all shapes and types alone.

    Raises:
        ValueError: they do not fit, or r > min(n, m).
    """
    given = _given(Y, B, state)
    check_floating(**given)
    if Y.ndim not in (2, 3) or B.ndim != 3 or not len(B) or (Y.ndim == 3 and len(Y) != len(B)) or not Y.numel():
        raise ValueError(
            f"Y has shape {tuple(Y.shape)} and B {tuple(B.shape)}, expected (n, m) or (runs, n, m) and (runs, r, n)"
        )
    check_same_format(**given)
    (runs, r, columns), (n, m) = B.shape, Y.shape[-2:]
    if columns != n:
        raise ValueError(f"B carries errors of {columns} outputs, Y has {n} rows: B is (runs, r, n)")
    if not 1 <= r <= min(n, m):
        raise ValueError(f"r is {r}, expected 1 to min(n, m) = {min(n, m)}: more does not raise the rank of ZW")
    if state is not None:
        for name, shape in (("Z", (runs, n, r)), ("W", (runs, r, m))):
            if given[name].shape != shape:
                raise ValueError(f"{name} has shape {tuple(given[name].shape)}, expected {shape} by Y and B")
    return Y.expand(runs, n, m)


def _given(Y: Tensor, B: Tensor, state: State | None) -> dict[str, Tensor]:
    return {"Y": Y, "B": B} | ({} if state is None else state._asdict())


def independent(W: Float[Tensor, "runs r m"]) -> None:
    """Refuse rows of W(0) that nearly depend on each other: fa* divides by the least singular value of W.

    Raises:
        ValueError: the condition number of a run's is above a tenth of the root of the precision (6.7e6 in float64).
    """
    check_full_rank("W(0), of which fa* takes the best output layer,", W)
    sizes, most = torch.linalg.svdvals(W), 0.1 * torch.finfo(W.dtype).eps ** -0.5
    condition = sizes[:, 0] / sizes[:, -1]
    if bool((condition > most).any()):
        run = int((condition > most).nonzero()[0])
        raise ValueError(
            f"W(0), of which fa* takes the best output layer, has condition number {float(condition[run]):.3g} in run "
            f"{run}, expected at most {most:.2g}: draw rows that differ more, such as orthonormal(Y, B, seeds=...)"
        )


def _one_a_run(seeds: Sequence[int], B: Tensor) -> list[int]:
    seeds = as_list("seeds", seeds)
    if len(seeds) != len(B):
        raise ValueError(f"{len(seeds)} seeds for {len(B)} draws of B: one a run")
    return seeds


def _normal(purpose: str, shape: tuple[int, int], seeds: Sequence[int]) -> Float[Tensor, "runs rows columns"]:
    seeds = as_list("seeds", seeds)
    if not seeds:
        raise ValueError("seeds are empty, expected a whole number for every run, such as range(8)")
    if not all(map(is_whole, seeds)) or not all(is_whole(size) and size > 0 for size in shape):
        raise ValueError(f"sizes are {shape} and seeds {seeds}, expected sizes above 0 and a whole number a run")
    check_memory("a matrix a run", len(seeds), *shape)
    drawn = [torch.randn(*shape, dtype=torch.float64, generator=generator(s, _STREAM, purpose)) for s in seeds]
    return torch.stack(drawn)
