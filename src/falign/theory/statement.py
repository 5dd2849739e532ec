"""What checking a theorem gives: its assumptions as measured, its bound beside what happened, and a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROUNDING = 1e-12
"""A bound may be missed by that much of ``scale``: rounding of the error itself."""

_RESOLVED = 1e-9
"""Slack is read only where the bound is above that much of ``scale``, so that rounding does not decide it."""


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One condition of a theorem.

    Attributes:
        name: A few words.
        statement: The condition, as a formula.
        measured: What it is here; of a block of runs the worst.
        needed: What it must reach; None where the paper names a constant without its value.
        holds: Whether it does; None where the paper's constant has no value, ``measured`` then being that constant
            as this run implies it.
    """

    name: str
    statement: str
    measured: float
    needed: float | None = None
    holds: bool | None = None

    def __str__(self) -> str:
        needed = "" if self.needed is None else f" where {self.needed:.4g} is the limit"
        return f"{self.name}: {self.statement}; measured {self.measured:.4g}{needed}"


@dataclass(frozen=True, kw_only=True)
class TheoremCheck:
    """A theorem tried on a block of runs.

    Attributes:
        name: The theorem's number or name.
        source: Paper and place.
        reading: How the printed statement was read where it leaves a choice.
        assumptions: All of them, held or not.
        bound: The bound [runs times].
        measured: What it bounds [runs times].
        relation: Whether ``measured`` is claimed to be at most or at least ``bound``.
        scale: What rounding is relative to [runs]: |y| for errors, 1 for cosines.
        share_needed: Share of the runs in which the bound must hold at all times: 1 - δ.
        constants: Further numbers measured, by name.
        series: Further series [runs times], by name.
    """

    name: str
    source: str
    reading: str
    assumptions: tuple[Assumption, ...]
    bound: Float[Tensor, "runs times"]
    measured: Float[Tensor, "runs times"]
    relation: Literal["at most", "at least"] = "at most"
    scale: Float[Tensor, " runs"]
    share_needed: float = 1.0
    constants: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Float[Tensor, "runs times"]] = field(default_factory=dict)

    @property
    def margin(self) -> Float[Tensor, "runs times"]:
        """How far the claim is from failing, in the units of ``measured``; negative where it does fail."""
        margin = self.bound - self.measured
        return margin if self.relation == "at most" else -margin

    @property
    def held(self) -> Bool[Tensor, " runs"]:
        """Whether the bound held at all times, to rounding; a run that is not finite did not hold."""
        return (self.margin >= -_ROUNDING * self.scale[:, None]).all(1)

    @property
    def share(self) -> float:
        """Share of the runs in which it held."""
        return float(self.held.double().mean())

    @property
    def slack(self) -> float:
        """Least margin over runs and times, as a share of the bound; nan if no bound is above rounding."""
        size = self.bound.abs()
        relative = torch.where(size > _RESOLVED * self.scale[:, None], self.margin / size, torch.inf)
        least = float(relative.min())
        return least if least < float("inf") else float("nan")

    @property
    def failing(self) -> tuple[Assumption, ...]:
        """The assumptions that do not hold."""
        return tuple(assumption for assumption in self.assumptions if assumption.holds is False)

    @property
    def verdict(self) -> Literal["holds", "fails", "assumption fails"]:
        """``assumption fails`` goes first: the theorem then says nothing, whatever the inequality did."""
        if self.failing:
            return "assumption fails"
        return "holds" if self.share >= self.share_needed else "fails"

    @property
    def sentence(self) -> str:
        """The verdict in words, with the assumption that fails and how the inequality did."""
        held = int(self.held.sum())
        needed = f"a share of {self.share_needed:.3g} is needed; " if self.share_needed < 1 else ""
        inequality = f"the inequality held in {held} of {len(self.held)} runs ({needed}least slack {self.slack:.3g})"
        if self.verdict == "assumption fails":
            return f"{self.name} says nothing here: {'; '.join(map(str, self.failing))}. As measured, {inequality}."
        if self.verdict == "holds":
            return f"{self.name} holds: {inequality}."
        open_constants = [assumption.name for assumption in self.assumptions if assumption.holds is None]
        cause = (
            f", unless what the paper leaves open is not met ({', '.join(open_constants)})" if open_constants else ""
        )
        return f"{self.name} fails: {inequality}{cause}."
