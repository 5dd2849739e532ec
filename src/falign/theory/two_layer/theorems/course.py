"""A block of runs followed step by step: the norms that the theorems bound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.inputs import bearable
from falign.theory.two_layer.measures import warn_of_divergence
from falign.theory.two_layer.schedules import Penalty
from falign.theory.two_layer.trajectory import Engine

_FARTHEST = {"weight_change", "beta_change", "cosine"}


@dataclass(frozen=True, kw_only=True)
class Course:
    """What was followed; a run is a seed with a penalty, those of one seed side by side.

    Attributes:
        error: |e(0)|, …, |e(steps)| [runs times].
        y: |y| [runs].
        strengths: λ(0), …, λ(steps - 1) [runs steps].
        farthest: name -> its largest value [runs] at the steps measured: of |cosine|, and of ``weight_change`` and
            ``beta_change`` where the engine knows them.
    """

    error: Float[Tensor, "runs times"]
    y: Float[Tensor, " runs"]
    strengths: Float[Tensor, "runs steps"]
    farthest: Mapping[str, Float[Tensor, " runs"]]


def follow(
    engine: Engine, *, penalties: Sequence[Penalty], y: Float[Tensor, " seeds"], steps: int, measurements: int = 20
) -> Course:
    """Run ``steps`` steps, with |e| at each and what else there is at about ``measurements`` of them.

    Args:
        engine: At its start.
        penalties: Those that it was made with.
        y: |y| of each seed.
        steps: How many.
        measurements: How often the changes of the weights are looked at.

    Raises:
        ValueError: fewer than one step, or an engine that does not run in float64, whose rounding the bounds allow for.
    """
    if bearable(steps) < 1:
        raise ValueError(f"a bound on a step needs at least one step, got {steps}")
    if engine.error().dtype != torch.float64:
        raise ValueError(f"theorems are checked in float64, got {engine.error().dtype}: draw the start in float64")
    every = max(1, steps // measurements)
    norms = [engine.error().norm(dim=-1)]
    farthest: dict[str, Tensor] = {}
    for t in range(1, steps + 1):
        engine.advance(1)
        norms.append(engine.error().norm(dim=-1))
        if t % every == 0 or t == steps:
            measured = engine.measure()
            for name in _FARTHEST & measured.keys():
                now = measured[name].abs()
                farthest[name] = torch.maximum(farthest.get(name, now), now)
    error = torch.stack(norms, dim=-1)
    warn_of_divergence(error.flatten(0, 1), range(steps + 1))
    strengths = torch.stack([penalty.values(steps) for penalty in penalties]).to(error)
    return Course(
        error=error.flatten(0, 1),
        y=y.repeat_interleave(len(penalties)),
        strengths=strengths.repeat(len(y), 1),
        farthest={name: value.flatten() for name, value in farthest.items()},
    )


def step_bound(
    course: Course, gamma: Float[Tensor, " runs"], *, rate: float, share: float, pull: float
) -> Float[Tensor, "runs steps"]:
    """``(1 - η·share·γ - ηλ(t)) |e(t)| + pull·λ(t) |y|``: what theorems 3.2, 4.2 and 4.3 allow |e(t+1)| to be."""
    keep = 1 - rate * share * gamma[:, None] - rate * course.strengths
    return keep * course.error[:, :-1] + pull * course.strengths * course.y[:, None]
