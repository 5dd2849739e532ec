"""Advance an engine and record what it measures at chosen steps."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign._validation import check_recording, check_steps
from falign.theory._coerce import outermost, public, recording
from falign.theory._simulate import Recorded, judged, measurements_named, record, warn_of_divergence

# Measurements that the engines share, of β, b and e.

ALWAYS = ("loss", "cosine", "beta_norm", "b_dot_beta", "beta_change", "weight_change", "weight_growth")
"""Measurements of every engine that knows each neuron's weights."""


def chosen(names: Collection[str] | None, known: Collection[str]) -> frozenset[str]:
    """The measurements asked for; all where none are named.

    Raises:
        ValueError: an engine knows no such measurement here, or none was asked for.
    """
    known = sorted(known)
    wanted = frozenset(measurements_named(names, known))
    if not wanted:
        raise ValueError(f"no measurement was named: choose from {', '.join(known)}")
    return wanted


def told_of_divergence(
    values: dict[str, Float[Tensor, "seeds penalties"]], step: int
) -> dict[str, Float[Tensor, "seeds penalties"]]:
    """Return the measurements, with a warning of lost runs unless a public function called that warns itself."""
    if outermost():
        found = judged({name: value.unsqueeze(-1) for name, value in values.items()}, [step], axes=2)
        warn_of_divergence(found["diverged"], found["lost"])
    return values


def ratio(dot: Float[Tensor, "*runs"], norms: Float[Tensor, "*runs"]) -> Float[Tensor, "*runs"]:
    """A cosine from inner product and product of norms, 0 where a vector is zero."""
    return dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def alignment(
    b: Float[Tensor, "seeds #penalties p k"], beta: Float[Tensor, "seeds penalties p k"]
) -> dict[str, Float[Tensor, "seeds penalties"]]:
    """``cos∠(b, β)``, ``|β|`` and ``<b, β>``, over neurons and outputs together."""
    dot = (b * beta).sum((-1, -2))
    norm = beta.square().sum((-1, -2)).sqrt()
    return {"cosine": ratio(dot, norm * b.square().sum((-1, -2)).sqrt()), "beta_norm": norm, "b_dot_beta": dot}


def largest(change: Float[Tensor, "*runs p width"]) -> Float[Tensor, "*runs"]:
    """``max_r |change_r|`` over the rows."""
    return change.square().sum(-1).amax(-1).sqrt()


def travelled(
    now: Float[Tensor, "seeds penalties p d"], before: Float[Tensor, "seeds p d"]
) -> dict[str, Float[Tensor, "seeds penalties"]]:
    """``max_r |w_r - w_r(0)|`` and ``½(|W|² - |W(0)|²)``, one seed after the other."""
    far, growth = [], []
    for after, start in zip(now, before, strict=True):
        change = after - start
        far.append(largest(change))
        growth.append((change * (start + change / 2)).sum((-1, -2)))
    return {"weight_change": torch.stack(far), "weight_growth": torch.stack(growth)}


def error_cosine(
    e: Float[Tensor, "seeds penalties n k"],
    b: Float[Tensor, "seeds #penalties p k"],
    beta: Float[Tensor, "seeds penalties p k"],
) -> Float[Tensor, "seeds penalties"]:
    """Mean over the points of ``cos∠(b e_i, β e_i)``, from the k × k products of b and β.

    Points whose error is 0 have no direction and are left out; errors are brought to size 1 first, as the squares of
    small ones would be lost.
    """
    size = e.abs().amax(-1, keepdim=True)
    seen = size[..., 0] > 0
    e = e / torch.where(size > 0, size, 1.0)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return ((e @ (left.mT @ right)) * e).sum(-1)

    norms = (product(b, b).clamp_min(0) * product(beta, beta).clamp_min(0)).sqrt()
    return ratio(product(b, beta), norms).sum(-1) / seen.sum(-1).clamp_min(1)


@runtime_checkable
class Engine(Protocol):
    """A block of runs [seeds penalties] that advance together."""

    @property
    def t(self) -> int:
        """Steps done."""
        ...

    def advance(self, steps: int) -> None:
        """Make that many steps."""
        ...

    def error(self) -> Tensor:
        """``e = y - f`` at the current weights, [seeds penalties n]."""
        ...

    def measure(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Numbers of each run at the current weights, [seeds penalties]; ``measure(names)`` only those named.

        An engine that always measures everything need not take names: it is asked for none then.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Trajectory(Recorded):
    """The measurements of a block of runs.

    Attributes:
        steps: Steps done at each recording.
        values: name -> numbers; nan from a run's first recording that was not finite onwards.
        diverged: The step of that recording, -1 where there was none.
        lost: name -> the step of its first recording that was not finite, -1 where there was none.
    """

    what: ClassVar[str] = "two-layer networks"
    axes: ClassVar[tuple[str, ...]] = ("seed", "penalty")
    apart: ClassVar[str] = "penalty"

    steps: Int[Tensor, " times"]
    diverged: Int[Tensor, "seeds penalties"]

    def _clock(self) -> tuple[str, list[float | int]]:
        return "step", self.steps.tolist()


@recording
def simulate(
    engine: Engine,
    at: Sequence[int],
    names: Collection[str] | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """Advance the engine to each step of ``at`` and measure there.

    A run that overflows stays in its block, where it disturbs no other, and is told from the others by
    ``diverged``: no number of it is handed out from then on. It is told by the numbers that are measured.

    Args:
        engine: Any of the engines, wherever it stands.
        at: Steps to record at, increasing, none before ``engine.t``.
        names: What to measure; None for all that the engine measures. In the dual engine how far the weights have
            come costs three to ten steps, the rest a tenth of one.
        progress: Told which share of the steps is done, a hundred times and at each recording.

    Raises:
        ValueError: the steps do not increase or lie behind the engine, or it has no measurement of a name.

    Warns:
        UserWarning: a run is no longer finite, with the step.
    """
    check_recording(engine.t, at)

    def measure() -> dict[str, Tensor]:
        latest = engine.measure() if names is None else engine.measure(names)
        return {name: value.detach().cpu() for name, value in latest.items()}

    recorded = record(at, engine.advance, measure, start=engine.t, axis=-1, progress=progress)
    found = judged(recorded, at, axes=2)
    warn_of_divergence(found["diverged"], found["lost"])
    return Trajectory(steps=torch.tensor(list(at)), **found)


@public
def spaced(steps: int, points: int) -> list[int]:
    """At most ``points`` recording steps from 0 to ``steps``, dense early: 0 and about equal ratios above.

    Raises:
        ValueError: steps is negative or there are fewer than 2 points.
    """
    check_steps(steps)
    if steps < 0 or points < 2:
        raise ValueError(f"recording wants at least 0 steps and 2 points, got {steps} and {points}")
    if steps + 1 <= points:
        return list(range(steps + 1))
    ratio = torch.linspace(0, 1, points - 1, dtype=torch.float64)
    return sorted({0, *(round(float(step)) for step in steps**ratio)})
