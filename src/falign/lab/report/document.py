"""The report as plain data: what the page shows, with all digits and the figures' data."""

import math
from typing import Any

from falign.lab.experiment import Check
from falign.lab.experiment.results import Verdict
from falign.lab.report.content import ExperimentPart, PaperPart, Report, Tally
from falign.lab.report.drawing import Drawn, NotDrawn
from falign.lab.report.numbers import portable

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
        "summary": _tally(report.tally),
        "papers": [_paper(part) for part in report.papers],
    }


def _paper(part: PaperPart) -> dict[str, Any]:
    paper = part.paper
    return {
        "name": paper.name,
        "title": paper.title,
        "authors": paper.authors,
        "venue": paper.venue,
        "address": paper.address,
        "preset": part.preset,
        "summary": _tally(part.tally),
        "choices": [{"question": choice.question, "taken": choice.taken} for choice in paper.choices],
        "experiments": [_experiment(each) for each in part.experiments],
    }


def _experiment(part: ExperimentPart) -> dict[str, Any]:
    experiment = part.results.experiment
    return {
        "name": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "revision": experiment.revision,
        "anchor": part.anchor,
        "summary": _tally(part.tally),
        "claims": [_claim(verdict) for verdict in part.verdicts],
        "figures": [_figure(each) for each in part.figures],
        "unfinished": [
            {"status": run.status, "point": portable(run.point), "seed": run.seed, "message": run.message}
            for run in part.unfinished
        ],
        "untold": part.untold,
        "provenance": portable(part.results.provenance),
    }


def _tally(tally: Tally) -> dict[str, Any]:
    return {
        "claims": {"holds": tally.holds, "fails": tally.fails, "not run": tally.not_run},
        "runs": {name: getattr(tally, name) for name in ("done", "diverged", "failed", "missing")},
        "seconds": portable(tally.seconds),
    }


def _claim(verdict: Verdict) -> dict[str, Any]:
    claim, reading = verdict.claim, verdict.reading
    return {
        "name": claim.name,
        "statement": claim.statement,
        "place": claim.place,
        "how": claim.how,
        "because": claim.because,
        "verdict": verdict.verdict,
        "message": verdict.message,
        "note": "" if reading is None else reading.note,
        "checks": [] if reading is None else [_check(check) for check in reading.checks],
    }


def _check(check: Check) -> dict[str, Any]:
    return {
        "label": check.label,
        "measured": portable(float(check.measured)),
        "low": None if check.low == -math.inf else portable(float(check.low)),
        "high": None if check.high == math.inf else portable(float(check.high)),
        "holds": bool(check.holds),
    }


def _figure(figure: Drawn | NotDrawn) -> dict[str, Any]:
    shown = {"name": figure.picture.name, "caption": figure.picture.caption}
    if isinstance(figure, NotDrawn):
        return {**shown, "status": figure.status, "reason": figure.reason, "data": None}
    if figure.csv is None:
        reason = f"its data have {figure.data.height} rows, which are too many for this file"
        return {**shown, "status": "drawn", "reason": reason, "data": None}
    columns = portable(figure.data.to_dict(as_series=False))
    return {**shown, "status": "drawn", "reason": None, "data": columns}
