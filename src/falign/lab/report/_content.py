"""The content of a report: of each paper its claims, judged, and its experiments with figures and runs."""

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

import polars as pl

import falign
from falign.lab.experiment import Check, Paper
from falign.lab.experiment._results import PaperResults, Results, Verdict
from falign.lab.experiment._specification import RESERVED
from falign.lab.report._figures import MissingFigure, RenderedFigure, render
from falign.lab.report._numbers import portable

_PACKAGES = ("torch", "numpy", "polars", "matplotlib")
STATED, DERIVED = "The paper's claims", "What follows from the theory, and beyond"
"""Titles of the two tables of claims."""
_TOLD = 1000
"""So many runs of an experiment that diverged or failed are told one by one; the others are counted."""


@dataclass(frozen=True)
class ClaimCounts:
    """Numbers of claims, by verdict."""

    holds: int = 0
    fails: int = 0
    not_run: int = 0

    @property
    def total(self) -> int:
        """All claims."""
        return self.holds + self.fails + self.not_run

    def __add__(self, other: "ClaimCounts") -> "ClaimCounts":
        return ClaimCounts(self.holds + other.holds, self.fails + other.fails, self.not_run + other.not_run)


@dataclass(frozen=True)
class RunTotals:
    """Numbers of runs, by status, and the seconds that they took, added up."""

    done: int = 0
    diverged: int = 0
    failed: int = 0
    missing: int = 0
    seconds: float = 0.0

    def __add__(self, other: "RunTotals") -> "RunTotals":
        return RunTotals(
            self.done + other.done,
            self.diverged + other.diverged,
            self.failed + other.failed,
            self.missing + other.missing,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Claims and runs of an experiment, a paper or a report.

    Args:
        stated: Claims that the papers make themselves.
        derived: Claims that follow from their theory, or go beyond it.
        runs: Runs.
    """

    stated: ClaimCounts = ClaimCounts()
    derived: ClaimCounts = ClaimCounts()
    runs: RunTotals = RunTotals()

    @property
    def claims(self) -> ClaimCounts:
        """All claims."""
        return self.stated + self.derived

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            stated=self.stated + other.stated, derived=self.derived + other.derived, runs=self.runs + other.runs
        )


def count_verdicts(verdicts: Iterable[Verdict]) -> ClaimCounts:
    """Claims by verdict."""
    told = [verdict.verdict for verdict in verdicts]
    return ClaimCounts(told.count("holds"), told.count("fails"), told.count("not run"))


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A run that diverged or failed: where in the grid, and what it said."""

    status: str
    point: dict[str, Any]
    seed: int
    message: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperimentPart:
    """An experiment on the page.

    Args:
        anchor: Its id on the page.
        results: What is there of it.
        verdicts: Its claims, judged.
        figures: Its pictures, drawn.
    """

    anchor: str
    results: Results
    verdicts: tuple[Verdict, ...]
    figures: tuple[RenderedFigure | MissingFigure, ...]

    @cached_property
    def counts(self) -> Counts:
        """Its claims and runs, counted."""
        return Counts(
            stated=count_verdicts(each for each in self.verdicts if each.claim.origin == "paper"),
            derived=count_verdicts(each for each in self.verdicts if each.claim.origin != "paper"),
            runs=RunTotals(
                **{status: self.results.count(status) for status in ("done", "diverged", "failed")},
                missing=self.results.count("missing") + self.results.count("no data"),
                seconds=float(self.results.runs["seconds"].sum() or 0.0),
            ),
        )

    @property
    def untold(self) -> int:
        """Number of runs that diverged or failed beyond those of ``unfinished``."""
        return self._unfinished.height - len(self.unfinished)

    @property
    def _unfinished(self) -> pl.DataFrame:
        return self.results.runs.filter(pl.col("status").is_in(["diverged", "failed", "no data"]))

    @cached_property
    def unfinished(self) -> tuple[Unfinished, ...]:
        """The first runs that diverged or failed; of their points the axes along which the runs differ."""
        runs = self.results.runs
        axes = [name for name in runs.columns if name not in RESERVED and runs[name].n_unique() > 1]
        return tuple(
            Unfinished(
                status=row["status"],
                point={name: row[name] for name in axes if row[name] is not None},
                seed=row["seed"],
                message=row["message"] or "",
            )
            for row in self._unfinished.head(_TOLD).iter_rows(named=True)
        )

    def anchor_of(self, verdict: Verdict) -> str:
        """The id of a claim on the page."""
        return f"{self.anchor}.{verdict.claim.name}"


@dataclass(frozen=True, kw_only=True, eq=False)
class PaperPart:
    """A paper on the page."""

    anchor: str
    paper: Paper
    preset: str
    experiments: tuple[ExperimentPart, ...]

    @property
    def counts(self) -> Counts:
        """Its claims and runs, counted."""
        return sum((part.counts for part in self.experiments), Counts())

    @property
    def stated(self) -> list[tuple[ExperimentPart, Verdict]]:
        """The claims that the paper makes itself, with their experiments."""
        return [each for each in self._judged if each[1].claim.origin == "paper"]

    @property
    def derived(self) -> list[tuple[ExperimentPart, Verdict]]:
        """The claims that follow from its theory or go beyond it, with their experiments."""
        return [each for each in self._judged if each[1].claim.origin != "paper"]

    @property
    def _judged(self) -> list[tuple[ExperimentPart, Verdict]]:
        return [(part, verdict) for part in self.experiments for verdict in part.verdicts]

    @cached_property
    def provenance(self) -> dict[str, list[str]]:
        """{what: its distinct values over all runs}; nested settings are named by their path."""
        values: dict[str, list[str]] = {}
        for part in self.experiments:
            for setting in part.results.provenance:
                for name, value in _flat(setting):
                    if value not in values.setdefault(name, []):
                        values[name].append(value)
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that the page and the JSON file say.

    Args:
        when: When it was written, in UTC.
        versions: Of the packages that it was written with.
        papers: Its papers.
    """

    when: datetime
    versions: dict[str, str]
    papers: tuple[PaperPart, ...]

    @property
    def counts(self) -> Counts:
        """All claims and runs, counted."""
        return sum((part.counts for part in self.papers), Counts())

    @property
    def presets(self) -> list[str]:
        """The presets, each once."""
        return list(dict.fromkeys(part.preset for part in self.papers))

    @property
    def failing(self) -> dict[str, list[tuple[str, Verdict]]]:
        """The claims that fail, with their ids on the page: those of the papers, and the others."""
        return {
            title: [
                (part.anchor_of(verdict), verdict)
                for paper in self.papers
                for part, verdict in (paper.stated if title == STATED else paper.derived)
                if verdict.verdict == "fails"
            ]
            for title in (STATED, DERIVED)
        }


def compose(papers: Sequence[PaperResults]) -> Report:
    """Judge all claims and draw all pictures.

    Args:
        papers: What is there of each paper.

    Returns:
        What the report says.
    """
    names = [each.paper.name for each in papers]
    return Report(
        when=datetime.now(UTC).replace(microsecond=0),
        versions={
            "falign": falign.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        papers=tuple(_paper(each, alone=names.count(each.paper.name) == 1) for each in papers),
    )


def _paper(results: PaperResults, *, alone: bool) -> PaperPart:
    suffix = "" if alone else f"-{results.preset}"  # a paper may be shown at two presets
    return PaperPart(
        anchor=f"{results.paper.name}{suffix}",
        paper=results.paper,
        preset=results.preset,
        experiments=tuple(_experiment(each, suffix) for each in results.results),
    )


def _experiment(results: Results, suffix: str) -> ExperimentPart:
    experiment, anchor = results.experiment, f"{results.experiment.name}{suffix}"
    return ExperimentPart(
        anchor=anchor,
        results=results,
        verdicts=results.verdicts,
        figures=tuple(
            render(picture, results.table, f"{anchor}.{picture.name}".replace(".", "-"))
            for picture in experiment.pictures
        ),
    )


def _flat(setting: dict[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for name, value in setting.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name} ")
        elif isinstance(value, (list, tuple)):
            yield f"{path}{name}", " ".join(map(str, value))
        elif value is not None:
            yield f"{path}{name}", ("yes" if value else "no") if isinstance(value, bool) else str(value)


# The report as plain data: what the page shows, with all digits and the figures' data.

FORMAT = 1
"""Raised when a reader of the file would have to change."""


def document(report: Report) -> dict[str, Any]:
    """A report as what JSON can hold.

    An open end of an interval is null; any other number that is not finite is "NaN", "Infinity" or "-Infinity".

    Args:
        report: The report.

    Returns:
        ``format``, ``written``, ``presets``, ``versions``, ``summary`` and ``papers``.
    """
    return {
        "format": FORMAT,
        "written": report.when.isoformat(),
        "presets": report.presets,
        "versions": report.versions,
        "summary": _summary(report.counts),
        "papers": [_paper_data(part) for part in report.papers],
    }


def _paper_data(part: PaperPart) -> dict[str, Any]:
    paper = part.paper
    return {
        "name": paper.name,
        "title": paper.title,
        "authors": paper.authors,
        "venue": paper.venue,
        "address": paper.address,
        "preset": part.preset,
        "summary": _summary(part.counts),
        "interpretations": [{"question": each.question, "answer": each.answer} for each in paper.interpretations],
        "experiments": [_experiment_data(each) for each in part.experiments],
    }


def _experiment_data(part: ExperimentPart) -> dict[str, Any]:
    experiment = part.results.experiment
    return {
        "name": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "revision": experiment.revision,
        "anchor": part.anchor,
        "summary": _summary(part.counts),
        "claims": [_claim(verdict) for verdict in part.verdicts],
        "figures": [_figure(each) for each in part.figures],
        "unfinished": [
            {"status": run.status, "point": portable(run.point), "seed": run.seed, "message": run.message}
            for run in part.unfinished
        ],
        "untold": part.untold,
        "provenance": portable(part.results.provenance),
    }


def _summary(counts: Counts) -> dict[str, Any]:
    runs = counts.runs
    return {
        "claims": _verdicts(counts.claims),
        "stated": _verdicts(counts.stated),
        "derived": _verdicts(counts.derived),
        "runs": {"done": runs.done, "diverged": runs.diverged, "failed": runs.failed, "missing": runs.missing},
        "seconds": portable(runs.seconds),
    }


def _verdicts(claims: ClaimCounts) -> dict[str, int]:
    return {"holds": claims.holds, "fails": claims.fails, "not run": claims.not_run}


def _claim(verdict: Verdict) -> dict[str, Any]:
    claim, evidence = verdict.claim, verdict.evidence
    return {
        "name": claim.name,
        "statement": claim.statement,
        "origin": claim.origin,
        "reference": claim.reference,
        "method": claim.method,
        "tolerance_reason": claim.tolerance_reason,
        "verdict": verdict.verdict,
        "message": verdict.message,
        "note": "" if evidence is None else evidence.note,
        "checks": [] if evidence is None else [_check(check) for check in evidence.checks],
    }


def _check(check: Check) -> dict[str, Any]:
    return {
        "label": check.label,
        "measured": portable(float(check.measured)),
        "low": None if check.low == -math.inf else portable(float(check.low)),
        "high": None if check.high == math.inf else portable(float(check.high)),
        "holds": bool(check.holds),
    }


def _figure(figure: RenderedFigure | MissingFigure) -> dict[str, Any]:
    shown = {"name": figure.picture.name, "caption": figure.picture.caption}
    if isinstance(figure, MissingFigure):
        return {**shown, "status": figure.status, "reason": figure.reason, "data": None}
    if figure.csv is None:
        reason = f"its data have {figure.data.height} rows, which are too many for this file"
        return {**shown, "status": "drawn", "reason": reason, "data": None}
    columns = portable(figure.data.to_dict(as_series=False))
    return {**shown, "status": "drawn", "reason": None, "data": columns}
