"""What can be recorded of a run on its way, by name, and the record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from falign.theory.factorisation.methods import Method
from falign.theory.factorisation.problem import State
from falign.theory.factorisation.subspace import row_basis
from falign.theory.inputs import listed, told


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What states of a course are compared with, in the coordinates in which it runs.

    Attributes:
        method: How the factors move.
        Y: What is to be factorised.
        B: Feedback.
        start: Where from.
        outside: |·| of what Y has outside these coordinates: a constant part of the error [runs].
        whole_B: |B| in all coordinates [runs].
        optimal_rows: The optimum's representation, orthonormal in all coordinates; called when first asked for.
    """

    method: Method
    Y: Float[Tensor, "runs p q"]
    B: Float[Tensor, "runs r p"]
    start: State
    outside: Float[Tensor, " runs"]
    whole_B: Float[Tensor, " runs"]
    optimal_rows: Callable[[], Tensor]

    @cached_property
    def invariant(self) -> Float[Tensor, "runs r r"]:
        """What the method conserves, at the start."""
        return self.method.invariant(*self.start, self.B)

    @cached_property
    def stationary(self) -> Float[Tensor, "runs p q"]:
        """``Y (BY)⁺ BY``."""
        rows = row_basis(self.B @ self.Y)
        return self.Y @ rows.mT @ rows

    @cached_property
    def optimum(self) -> Float[Tensor, "runs r q"]:
        """``optimal_rows``."""
        return self.optimal_rows()


@dataclass(frozen=True, kw_only=True)
class Here:
    """A state on the way, with what was kept since the start."""

    Z: Float[Tensor, "runs p r"]
    W: Float[Tensor, "runs r q"]
    R: Float[Tensor, "runs p q"]
    gained: Float[Tensor, "runs r r"]
    growth: Float[Tensor, " runs"]


Measurement = Callable[[Here, Reference], Tensor]

MEASUREMENTS: dict[str, Measurement] = {
    "error": lambda at, ref: (_square(at.R) + ref.outside.square()).sqrt(),
    "loss": lambda at, ref: (_square(at.R) + ref.outside.square()) / 2,
    "lyapunov": lambda at, ref: _square(ref.B @ at.R),
    "alignment": lambda at, ref: _trace(ref.B @ at.Z),
    "cosine": lambda at, ref: _trace(ref.B @ at.Z) / (ref.whole_B * _norm(at.Z)),
    "weighted": lambda at, ref: _trace(ref.B @ at.Z @ at.W @ at.W.mT),
    "invariant": lambda at, ref: _norm(ref.method.invariant(at.Z, at.W, ref.B)),
    "drift": lambda at, ref: _norm(ref.method.invariant(at.Z, at.W, ref.B) - ref.invariant),
    "account": lambda at, ref: _norm(ref.method.invariant(at.Z, at.W, ref.B) - ref.invariant - at.gained),
    "gram drift": lambda at, ref: _norm(at.W @ at.W.mT - ref.start.W @ ref.start.W.mT),
    "growth": lambda at, ref: at.growth,
    "distance": lambda at, ref: _norm(ref.Y - at.R - ref.stationary),
    "overlap": lambda at, ref: _square(row_basis(at.W) @ ref.optimum.mT) / at.W.shape[1],
}
"""name -> what it is at a state [runs].

``error`` |R|, ``loss`` ½|R|², ``lyapunov`` |BR|², ``alignment`` tr(BZ) = ⟨Bᵀ, Z⟩, its ``cosine`` (nan for Z = 0),
``weighted`` tr(BZWWᵀ), which is tr(BYWᵀ) under fa*; ``invariant`` |C| of what the method conserves, its ``drift``
|C - C(0)|, and ``account``, what is left of the drift once the exact gain of the steps, ``η² Σ BR(BR)ᵀ`` under fa and
fa*, is taken off; ``gram drift`` |WWᵀ - W(0)W(0)ᵀ|, ``growth`` η Σ |Ẇ|² (in flow ∫|Ẇ|²), ``distance`` of ZW from
Y(BY)⁺BY, ``overlap`` of the representation with the optimum's.
"""

KEPT = {"account", "growth"}
"""Names that need sums over all steps."""


def known(names: Sequence[str]) -> dict[str, Measurement]:
    """Those of ``MEASUREMENTS`` that are named.

    Raises:
        ValueError: a name is unknown.
    """
    names = listed("names", names)
    for name in names:
        if not isinstance(name, str) or name not in MEASUREMENTS:
            raise ValueError(f"unknown measurement {told(name)}: choose from {', '.join(MEASUREMENTS)}")
    return {name: MEASUREMENTS[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a block of runs went through.

    Attributes:
        method: How it learned.
        Y: What was to be factorised.
        B: Feedback.
        start: Where from; of fa*, with its Z.
        end: Where to.
        rate: η of the steps; 0 in gradient flow.
        times: Recorded times; of steps, η times their number.
        values: name -> those asked for; nan from where a run has diverged.
        diverged: The step after which a run was no longer finite, -1 where all were.
    """

    method: Method
    Y: Float[Tensor, "runs n m"]
    B: Float[Tensor, "runs r n"]
    start: State
    end: State
    rate: float
    times: Float[Tensor, " times"]
    values: Mapping[str, Float[Tensor, "runs times"]]
    diverged: Int[Tensor, " runs"]

    def __getitem__(self, name: str) -> Float[Tensor, "runs times"]:
        """The recorded values of that name.

        Raises:
            ValueError: it was not recorded.
        """
        if name not in self.values:
            raise ValueError(f"{told(name)} was not recorded: add it to names, beside {', '.join(self.values)}")
        return self.values[name]


def _square(A: Tensor) -> Tensor:
    return A.square().sum((-1, -2))


def _norm(A: Tensor) -> Tensor:
    return _square(A).sqrt()


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-1, dim2=-2).sum(-1)
