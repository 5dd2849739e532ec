"""Ridge on the output weights: how strong it is at a step, and how much of it there is in a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, expm1, floor, inf, isfinite

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_memory, check_steps, named
from falign.theory._coerce import public, typed


def _constant(strength: float, steps: float, t: int) -> float:
    """``λ(t) = λ``."""
    return strength


def _cutoff(strength: float, steps: float, t: int) -> float:
    """``λ(t) = λ`` for t ≤ T, then 0."""
    return strength if t <= steps else 0.0


def _inverse_square(strength: float, steps: float, t: int) -> float:
    """``λ(t) = λ / (1 + t/T)²``."""
    return strength / (1 + t / steps) ** 2


def _exponential(strength: float, steps: float, t: int) -> float:
    """``λ(t) = λ exp(-t/T)``."""
    return strength * exp(-t / steps)


SCHEDULES: dict[str, Callable[[float, float, int], float]] = {
    "constant": _constant,
    "cutoff": _cutoff,
    "inverse-square": _inverse_square,
    "exponential": _exponential,
}
"""name -> (λ, T, t) -> λ(t), t the steps done before this one: the first step has t = 0."""


_SMALLEST = 1e-100
"""Rates below it are no numbers once they meet an error."""

_AHEAD = 1024
"""Steps whose penalties are worked out at once."""


@typed
@dataclass(frozen=True)
class Penalty:
    """The ridge ``½ λ(t)|β|²``: descent on it makes ``β ← (1 - ηλ(t)) β - …``.

    Args:
        strength: λ, at least 0.
        schedule: A name of ``SCHEDULES``.
        steps: T, in steps, above 0; None for the constant schedule, which has none.

    Raises:
        ValueError: the schedule is unknown, or λ or T is missing, superfluous or out of range.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), equation 4.1, theorem 4.6 and the schedules named with it.
    """

    strength: float | int = 0.0
    schedule: str = "constant"
    steps: float | int | None = None

    def __post_init__(self) -> None:
        named("schedule", self.schedule, SCHEDULES)
        if not (isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"a penalty needs a finite strength of at least 0, got {self.strength}")
        if self.schedule == "constant":
            if self.steps is not None:
                raise ValueError(f"the constant schedule takes no time T, got steps={self.steps}")
        elif self.steps is None or not (isfinite(self.steps) and self.steps > 0):
            raise ValueError(f"the schedule {self.schedule} needs a finite time T above 0, got steps={self.steps}")

    @public
    def at(self, t: int) -> float:
        """``λ(t)``, t the steps done before this one."""
        return SCHEDULES[self.schedule](float(self.strength), 1.0 if self.steps is None else float(self.steps), t)

    @public
    def values(self, steps: int, dtype: torch.dtype = torch.float64, *, start: int = 0) -> Float[Tensor, " steps"]:
        """``λ(start), …, λ(start + steps - 1)``."""
        check_memory("λ", max(steps, 0), 8)
        return torch.tensor([self.at(t) for t in range(start, start + steps)], dtype=dtype)

    @public
    def total(self, steps: float | int = inf) -> float:
        """``Σ_{t<steps} λ(t)`` in closed form, of the whole run for ``inf``: what theorems 4.2 and 4.3 bound."""
        if self.strength == 0 or steps <= 0:
            return 0.0
        time = self.steps
        if time is None:
            return self.strength * steps
        if self.schedule == "cutoff":
            return self.strength * min(floor(time) + 1, steps)
        if self.schedule == "inverse-square":
            rest = 0.0 if steps == inf else float(scipy.special.polygamma(1, time + steps))
            return self.strength * time**2 * (float(scipy.special.polygamma(1, time)) - rest)
        return self.strength * (1.0 if steps == inf else -expm1(-steps / time)) / -expm1(-1 / time)


def shrinkage(
    penalties: Sequence[Penalty], rate: float, start: int, steps: int, like: Tensor
) -> Iterator[Float[Tensor, " penalties"]]:
    """``1 - ηλ(t)`` of every penalty for t = start, …, start + steps - 1, computed in float64, in the type of ``like``.

    Raises:
        ValueError: a negative number of steps, as a run does not go back, or more than a run can make.
    """
    if steps < 0:
        raise ValueError(f"an engine advances by at least 0 steps, got {steps}: make a new one to begin again")
    check_steps(steps)
    # A stretch of steps at a time: λ(t) is a Python function, and a run may have 10⁹ steps.
    for first in range(start, start + steps, _AHEAD):
        ahead = min(_AHEAD, start + steps - first)
        yield from (1 - rate * torch.stack([one.values(ahead, start=first) for one in penalties], dim=1)).to(like)


def checked(rate: float, penalties: Sequence[Penalty]) -> tuple[float, tuple[Penalty, ...]]:
    """The rate and the penalties, or a sentence on what is wrong with them."""
    if not _SMALLEST <= rate < inf:
        raise ValueError(f"the rate η must be a positive number, got {rate}")
    if not penalties:
        raise ValueError("penalties is empty: give at least one, Penalty() for none")
    return rate, tuple(penalties)
