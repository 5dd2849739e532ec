"""Records that an experiment has left so far, and the verdicts on its claims."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import polars as pl

from falign.lab._text import explained
from falign.lab.experiment._specification import Check, Claim, Evidence, Experiment, Missing, Paper
from falign.lab.experiment._validation import RESERVED


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """Runs and records of an experiment that are there at a preset.

    Args:
        experiment: The experiment.
        preset: The preset.
        table: Records of the runs that were done: columns of the point, ``seed``, columns of the records.
        runs: One row a run of the preset: ``key``, columns of the point, ``seed``, ``status`` ("done", "diverged",
            "failed", "no data" or "missing"), ``message`` (null if done), ``seconds`` (null if missing).
        provenance: The distinct settings that the runs were computed in: versions, commit, device, threads.
        others: Number of runs of other revisions of the experiment.
    """

    experiment: Experiment
    preset: str
    table: pl.DataFrame
    runs: pl.DataFrame
    provenance: tuple[dict, ...]
    others: int = 0

    @cached_property
    def verdicts(self) -> tuple["Verdict", ...]:
        """Its claims, judged once: terminal, page and JSON file tell the same verdicts."""
        return tuple(judge(claim, self) for claim in self.experiment.claims)

    def count(self, status: str) -> int:
        """Number of runs that have a status."""
        return self.runs.filter(pl.col("status") == status).height


@dataclass(frozen=True, kw_only=True, eq=False)
class PaperResults:
    """Results of a paper, experiment by experiment; each has its own preset."""

    paper: Paper
    results: tuple[Results, ...]


UNREADABLE = "the claim cannot be read"
"""Beginning of the message of a claim whose reading raised an error."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim beside what was measured.

    Args:
        claim: The claim.
        verdict: Whether it holds.
        evidence: What was measured; None if not run.
        message: Why it could not be read; None if it could.
    """

    claim: Claim
    verdict: Literal["holds", "fails", "not run"]
    evidence: Evidence | None = None
    message: str | None = None

    @property
    def broken(self) -> bool:
        """True if the reading raised an error."""
        return (self.message or "").startswith(UNREADABLE)


def judge(claim: Claim, results: Results) -> Verdict:
    """Read a claim off the runs of its scope, if all of them are done.

    A part of the runs could hold up a claim by accident, and the mean over the runs that did not diverge says nothing
    of the others: then the claim is not run. Points of which no run has its data set here are no part of the scope.

    Args:
        claim: The claim.
        results: What is there of its experiment.

    Returns:
        The verdict: not run if runs are lacking, or if they cannot tell.
    """
    try:
        lacking = _lacking(_within(results.runs, claim.scope))
        evidence = None if lacking else _sound(claim.read(_within(results.table, claim.scope)))
        verdict = "holds" if evidence is not None and evidence.holds else "fails"
    except Missing as missing:
        return Verdict(claim=claim, verdict="not run", message=str(missing))
    except Exception as error:  # a fault of one claim, which must not take the others' verdicts with it
        return Verdict(claim=claim, verdict="not run", message=f"{UNREADABLE}: {explained(error, claim.read)}")
    if evidence is None:
        return Verdict(claim=claim, verdict="not run", message=lacking)
    return Verdict(claim=claim, verdict=verdict, evidence=evidence)


def _within(table: pl.DataFrame, scope: pl.Expr | None) -> pl.DataFrame:
    """The rows of a scope; a large table of which it has all is not copied."""
    if scope is None or table.is_empty():
        return table
    inside = table.select(inside=scope)["inside"]
    return table if inside.len() == table.height and inside.all(ignore_nulls=False) else table.filter(scope)


def _sound(evidence: object) -> Evidence:
    """Evidence that can be shown: claims may be written by anyone.

    Raises:
        TypeError: It is no evidence, or holds what is no number or no text.
    """
    if not isinstance(evidence, Evidence):
        raise TypeError(f"it gives a {type(evidence).__name__}, expected Evidence")
    for check in evidence.checks:
        if not (isinstance(check, Check) and isinstance(check.label, str) and isinstance(evidence.note, str)):
            raise TypeError("its checks or their labels are of another type")
        for value in (check.measured, check.low, check.high):
            float(value)
    return evidence


def _lacking(runs: pl.DataFrame) -> str | None:
    """A sentence on the runs of a scope that are lacking; None if all are done that have their data here."""
    point = [name for name in runs.columns if name not in RESERVED]
    absent = (pl.col("status") == "no data").all().over(point) if point else pl.col("status") == "no data"
    there = runs.filter(~absent)
    if there.is_empty():
        return "no run that it is about has its data here"
    lacking = there.filter(pl.col("status") != "done")
    if lacking.is_empty():
        return None
    if lacking.height == there.height and set(lacking["status"]) == {"missing"}:
        return "no run is done"
    counts = ", ".join(f"{count} {status}" for status, count in lacking["status"].value_counts().sort("status").rows())
    return f"{lacking.height} of its {there.height} runs are not done: {counts}"
