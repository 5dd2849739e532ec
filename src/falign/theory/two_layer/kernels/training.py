"""G and H followed along a run: their extreme eigenvalues."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.theory.door import public
from falign.theory.inputs import bearable
from falign.theory.two_layer.dual import Dual
from falign.theory.two_layer.kernels.finite import Kernels, kernels


@dataclass(frozen=True, kw_only=True)
class KernelCourse:
    """Extreme eigenvalues along a block of runs.

    Attributes:
        steps: Steps done at each recording.
        values: ``G_min``, ``G_max``, ``H_min``, ``H_max``, ``sum_min``, ``sum_max`` -> [seeds penalties times].
    """

    steps: Int[Tensor, " times"]
    values: dict[str, Float[Tensor, "seeds penalties times"]]


@public
def kernels_of_engine(engine: Dual) -> Kernels:
    """G and H [seeds penalties n n] at the engine's current weights."""
    X = engine.start.X.unsqueeze(1)
    return kernels(engine.U.mT, X @ X.mT, engine.beta, engine.start.b.unsqueeze(1), engine.activation)


@public
def follow_kernels(engine: Dual, at: Sequence[int]) -> KernelCourse:
    """Advance the engine to each step of ``at`` and record the extreme eigenvalues of G, H and G + H.

    ``e(t+1) ≈ (I - η(G + H)) e(t)``: the run contracts where ``sum_min`` is positive. Without ridge H stays O(1/√p);
    as β aligns with b it becomes positive.

    Args:
        engine: Wherever it stands.
        at: Steps to record at, increasing, none before ``engine.t``.

    Raises:
        ValueError: the steps do not increase or lie behind the engine.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 3.
    """
    if (
        not at
        or bearable(at[-1]) < 0
        or any(later <= earlier for earlier, later in zip([engine.t - 1, *at], at, strict=False))
    ):
        raise ValueError(f"recording steps must increase from the engine's t={engine.t} on, got {list(at)[:10]}")
    bearable(at[-1])
    columns: list[dict[str, Tensor]] = []
    for step in at:
        engine.advance(step - engine.t)
        columns.append(kernels_of_engine(engine).extremes())
    values = {name: torch.stack([column[name] for column in columns], -1) for name in columns[0]}
    return KernelCourse(steps=torch.tensor(list(at)), values=values)
