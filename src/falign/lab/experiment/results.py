"""What an experiment has left so far, and what its claims come to."""

from dataclasses import dataclass
from typing import Literal

import polars as pl

from falign.lab.experiment.reading import Claim, Missing, Reading
from falign.lab.experiment.specification import Experiment, Paper


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """What is there of an experiment at a preset.

    Args:
        experiment: The experiment.
        preset: The preset.
        table: Records of the runs that were done: columns of the point, ``seed``, columns of the records.
        runs: One row a run of the preset: ``key``, columns of the point, ``seed``, ``status`` ("done", "diverged",
            "failed", "no data" or "missing"), ``message`` (null if done), ``seconds`` (null if missing).
        provenance: The distinct settings that the runs were computed in: versions, commit, device, threads.
    """

    experiment: Experiment
    preset: str
    table: pl.DataFrame
    runs: pl.DataFrame
    provenance: tuple[dict, ...]

    def count(self, status: str) -> int:
        """Number of runs that have a status."""
        return self.runs.filter(pl.col("status") == status).height


@dataclass(frozen=True, kw_only=True, eq=False)
class PaperResults:
    """What is there of a paper at a preset, experiment by experiment."""

    paper: Paper
    preset: str
    results: tuple[Results, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim beside what was measured.

    Args:
        claim: The claim.
        verdict: Whether it holds.
        reading: What was measured; None if not run.
        message: Why it could not be read; None if it could.
    """

    claim: Claim
    verdict: Literal["holds", "fails", "not run"]
    reading: Reading | None = None
    message: str | None = None


def judge(claim: Claim, table: pl.DataFrame) -> Verdict:
    """Read a claim off a table.

    Args:
        claim: The claim.
        table: The records of the runs that were done.

    Returns:
        The verdict: not run if the table lacks what the claim needs.
    """
    if table.is_empty():
        return Verdict(claim=claim, verdict="not run", message="no run is done")
    try:
        reading = claim.read(table)
    except Missing as missing:
        return Verdict(claim=claim, verdict="not run", message=str(missing))
    except Exception as error:  # a fault of one claim, which must not take the others' verdicts with it
        message = f"the claim cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Verdict(claim=claim, verdict="not run", message=message)
    return Verdict(claim=claim, verdict="holds" if reading.holds else "fails", reading=reading)
