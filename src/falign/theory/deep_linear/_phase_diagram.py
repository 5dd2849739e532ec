"""Phase diagram of two-layer feedback alignment: where it learns large components first and where small ones."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import Numbers, one_of
from falign.theory._coerce import recording
from falign.theory.deep_linear._learning import learning_time_and_slope
from falign.theory.deep_linear._modes import finite, modes
from falign.theory.deep_linear._two_layer import critical_target

Branch: TypeAlias = Literal["output", "aligned", "anti-aligned"]
"""The start that has a given K: θ_1 = 0 and θ_2 = K, or θ_2 = 0 and θ_1 along or against m and λ, for mK ≤ 0."""


@dataclass(frozen=True, kw_only=True)
class PhaseDiagram:
    """Learning times over a grid.

    Attributes:
        branch: The start.
        invariants: K [invariants].
        targets: λ [targets].
        time: Learning time; nan where no such start has that K [invariants targets].
        slope: ``d ln t / d ln λ`` with the start held: below 0 larger components are learned first, above 0 smaller
            ones; nan where t is [invariants targets].
        critical: λ_c of each K, 0 where there is none [invariants].
    """

    branch: Branch
    invariants: Float[Tensor, " invariants"]
    targets: Float[Tensor, " targets"]
    time: Float[Tensor, "invariants targets"]
    slope: Float[Tensor, "invariants targets"]
    critical: Float[Tensor, " invariants"]

    @property
    def sign(self) -> Float[Tensor, "invariants targets"]:
        """-1 where it regularises (the time falls with λ), 1 where it anti-regularises (the time rises).

        The anti-aligned branch turns at ``λ_c/(1 - tolerance)``: up to there the mode comes within the tolerance where
        the fixed point was.
        """
        # PyTorch's sign of nan is 0.
        return self.slope.sign().where(~self.slope.isnan(), torch.nan)


@recording
def phase_diagram(
    invariants: Numbers,
    targets: Numbers,
    *,
    feedback: float | int = 1.0,
    branch: Branch = "output",
    tolerance: float = 0.1,
) -> PhaseDiagram:
    """Map the learning time over K and λ, by quadrature: nothing is simulated.

    Args:
        invariants: ``K = θ_2 - θ_1²/(2m)``, a list.
        targets: λ > 0, a list.
        feedback: m ≠ 0.
        branch: The start that K stands for.
        tolerance: Share of λ at which a mode counts as learned.

    Raises:
        ValueError: the branch is unknown, K or λ is no list, or a number is out of range or not finite.
    """
    one_of("branch", branch, get_args(Branch))
    K, λ = finite("invariants", invariants).double(), finite("targets", targets).double()
    if K.ndim != 1 or λ.ndim != 1 or not len(K) or not len(λ) or not (λ > 0).all():
        raise ValueError(f"K has shape {tuple(K.shape)} and λ {tuple(λ.shape)}: expected a list each, and λ above 0")
    m = finite("feedback", feedback)
    if m.ndim:
        raise ValueError(f"feedback has shape {tuple(m.shape)}, expected one number: make a diagram for each")
    depth = -2 * m * K
    # Along m and λ ≥ 0: with m < 0 the sign of an aligned θ_1 turns, too.
    side = {"output": 0.0, "aligned": 1.0, "anti-aligned": -1.0}[branch] * m.sign()
    weights = (
        [torch.zeros_like(K), K] if branch == "output" else [side * depth.clamp(min=0).sqrt(), torch.zeros_like(K)]
    )
    time, slope = learning_time_and_slope(modes(λ, [weight[:, None] for weight in weights], feedback=m), tolerance)
    there = torch.ones_like(K, dtype=torch.bool) if branch == "output" else depth >= 0
    return PhaseDiagram(
        branch=branch,
        invariants=K,
        targets=λ,
        time=time.where(there[:, None], torch.nan),
        slope=slope.where(there[:, None], torch.nan),
        critical=critical_target(K, m),
    )
