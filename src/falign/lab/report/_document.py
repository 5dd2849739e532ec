"""The report as plain data: what a page shows, with all digits and the figures' data; and what an index reads of it."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from falign.lab.experiment import Check
from falign.lab.experiment._results import Verdict
from falign.lab.report._content import ClaimCounts, Counts, ExperimentPart, KeyFigure, Report
from falign.lab.report._figures import MissingFigure, RenderedFigure
from falign.lab.report._numbers import digits_of, format_number, interval, portable

FORMAT = 2
"""Raised when a reader of the file would have to change."""


def document(report: Report) -> dict[str, Any]:
    """A report as what JSON can hold.

    An open end of an interval is null; any other number that is not finite is "NaN", "Infinity" or "-Infinity".

    Args:
        report: The report.

    Returns:
        ``format``, ``written``, ``versions``, then the paper: ``name``, ``title``, ``authors``, ``venue``, ``address``,
        ``presets``, ``result``, ``figures``, ``summary``, ``interpretations`` and ``experiments``.
    """
    part, paper = report.part, report.part.paper
    return {
        "format": FORMAT,
        "written": report.when.isoformat(),
        "versions": report.versions,
        "name": paper.name,
        "title": paper.title,
        "authors": paper.authors,
        "venue": paper.venue,
        "address": paper.address,
        "presets": part.presets,
        "result": part.result,
        "figures": [{"headline": each.headline, **_check(each.check), **_shown(each)} for each in part.figures],
        "summary": _summary(part.counts),
        "interpretations": [{"question": each.question, "answer": each.answer} for each in paper.interpretations],
        "experiments": [_experiment_data(each) for each in part.experiments],
    }


def _shown(figure: KeyFigure) -> dict[str, Any]:
    check = figure.check
    return {
        "stated": figure.stated,
        "shown": format_number(check.measured, digits_of(check)),
        "interval": interval(check),
    }


def _experiment_data(part: ExperimentPart) -> dict[str, Any]:
    experiment = part.results.experiment
    return {
        "name": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "revision": experiment.revision,
        "preset": part.results.preset,
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
        "quotation": claim.quotation,
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


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A page in the index: what its JSON file says of it, or None if that cannot be read."""

    name: str
    numbers: dict[str, Any] | None
    when: datetime | None = None


def entries(folder: Path) -> Iterator[Entry]:
    """The pages of a folder, by name, of this format or not."""
    for path in sorted(folder.glob("*.html")):
        try:
            numbers = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if numbers["format"] != FORMAT or numbers["name"] != path.stem:
                raise ValueError("it is of another format, or of another paper")
            yield Entry(name=path.stem, numbers=numbers, when=datetime.fromisoformat(numbers["written"]))
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            yield Entry(name=path.stem, numbers=None)
