"""The check of a theorem on a block of runs: its assumptions as measured, its bound beside the runs, and a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from falign._show import Loud, Sheet
from falign.theory._course import Course, Trajectories, departures
from falign.theory._simulate import judged

__all__ = ["Assumption", "TheoremCheck"]

_ROUNDING = 1e-12
"""A bound still counts as held if it is missed by this share of ``scale``, the rounding of ``measured``."""

_RESOLVED = 1e-9
"""Slack is computed only where the bound is above this share of ``scale``; below, rounding would decide it."""


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One condition of a theorem.

    Attributes:
        name: A few words.
        statement: The condition, as a formula.
        measured: The measured number; of a block of runs the worst one.
        needed: The number that it must reach; None if the paper names a constant without giving its value.
        holds: Whether it does; None if the paper's constant has no value, where ``measured`` is the constant that this
            run implies.
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
class TheoremCheck(Trajectories):
    """A theorem checked on a block of runs; prints as a table of its assumptions.

    Attributes:
        name: The theorem's number or name.
        source: Paper and place.
        reading: Interpretation of the printed statement where it leaves a choice.
        assumptions: All of them, held or not.
        bound: The bound [runs times].
        measured: The quantity that is bounded [runs times].
        relation: Whether ``measured`` is claimed to be at most or at least ``bound``.
        scale: Size that rounding is relative to [runs]: |y| for errors, 1 for cosines.
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
        """Distance of the claim from failing, in the units of ``measured``; negative where it fails."""
        margin = self.bound - self.measured
        return margin if self.relation == "at most" else -margin

    @property
    def held(self) -> Bool[Tensor, " runs"]:
        """True if the bound held at all times, to rounding; a run that is not finite did not hold."""
        # A comparison with nan is false: so a run that is not finite did not hold.
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
        """The verdict; ``assumption fails`` comes first, for the theorem then says nothing about the inequality."""
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

    def _course(self) -> Course:
        times = self.measured.shape[1]
        values = {"measured": self.measured, "bound": self.bound, **self.series}
        values = {name: value for name, value in values.items() if value.shape == self.measured.shape}
        return Course(
            what=self.name, clock="record", at=range(times), axes=("run",), main="measured", limit="bound",
            **judged(values, range(times), undefined=values.keys() - {"measured"}),
        )  # fmt: skip

    def _sheet(self) -> Sheet:
        words = {True: "yes", False: Loud("NO"), None: "open"}
        table = [["assumption", "statement", "measured", "limit", "holds"]]
        for one in self.assumptions:
            table.append([one.name, one.statement, _number(one.measured), _number(one.needed), words[one.holds]])
        constants = ", ".join(f"{name} {_number(value)}" for name, value in self.constants.items())
        notes = [
            f"claimed: measured {self.relation} the bound",
            f"read as: {self.reading}",
            *[f"constants: {constants}"] * bool(constants),
            f"source: {self.source}",
            *map(Loud, departures(self._course())),
        ]
        return Sheet(head=self.sentence, table=table if self.assumptions else (), left=(0, 1, 4), notes=notes)


def _number(value: float | None) -> str:
    """Write a number; what is none, or beyond all numbers, is said in words."""
    if value is None or isnan(value):
        return "-"
    return f"{value:.4g}" if isfinite(value) else "infinite" if value > 0 else "minus infinite"
