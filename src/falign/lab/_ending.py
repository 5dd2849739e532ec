"""How a run ends: the tables, what the conservation law found, the pictures, the status; or what it failed with."""

import traceback
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from rich.console import Console

from falign.lab import _learner, _loop
from falign.lab._checkpoints import TrainingState
from falign.lab._divergence import is_finite
from falign.lab._files import FolderLost, WriteError
from falign.lab._learner import Learner
from falign.lab._pictures import draw
from falign.lab._run_folder import TRACEBACK, RunFolder
from falign.lab._text import one_line, print_plain
from falign.measure.law import ConservationLaw
from falign.measure.law._balance import STRETCH

# What the conservation law says of a run: a report, a table of every neuron, a verdict.

_SCHEMA = {
    "layer": pl.String,
    "targets": pl.String,
    "form": pl.String,
    "status": pl.String,
    "neuron": pl.Int64,
    "weights": pl.Float64,
    "alignment": pl.Float64,
    "drift": pl.Float64,
    "residual": pl.Float64,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LawVerdict:
    """What was found.

    Attributes:
        verdict: "holds", "too little moved" (to tell), "fails", "drift" (it is not exact here, and how far off was
            measured), "none" (no neuron obeys it) or "not checked".
        text: For the terminal, several lines.
        table: A row a neuron; None where nothing was checked.
        failure: What does not hold though it should, in a sentence; empty if nothing.
    """

    verdict: str
    text: str
    table: pl.DataFrame | None = None
    failure: str = ""


def judge_law(law: ConservationLaw, learner: Learner) -> LawVerdict:
    """Read the law off after a training.

    Args:
        law: What watched it.
        learner: What was trained.

    Returns:
        The judgement.
    """
    if not law.steps:
        return LawVerdict(verdict="not checked", text="the conservation law was not checked: no step was made")
    if not is_finite(learner.model):
        return LawVerdict(verdict="not checked", text="the conservation law was not checked: the run diverged")
    report = law.report()
    if report.holds:
        words = {each.status for each in law.laws}
        exact = "holds" if report.conclusive else "too little moved"
        verdict = exact if report.checked else "drift" if "drift" in words else "none"
        return LawVerdict(verdict=verdict, text=str(report), table=_neurons(law))
    worst = max((row for row in report.laws if row.broken), key=lambda row: row.leap or 0.0)
    failure = (
        f"the conservation law does not hold for layer {worst.layer!r}, off by {worst.leap:.1e} of its size within "
        f"{STRETCH} steps, where rounding explains {worst.tolerance:.1e}: a gradient or an update was not the rule's"
    )
    return LawVerdict(verdict="fails", text=str(report), table=_neurons(law), failure=failure)


def _neurons(law: ConservationLaw) -> pl.DataFrame:
    changes, drift, residual = law.changes(), law.drift(), law.residual()
    pieces = [
        pl.DataFrame(
            {
                "layer": each.name,
                "targets": ", ".join(each.targets),
                "form": each.form,
                "status": each.status,
                "neuron": range(each.neurons),
                "weights": changes[each.name][0].tolist(),
                "alignment": changes[each.name][1].tolist(),
                "drift": drift[each.name].tolist(),
                "residual": residual[each.name].tolist(),
            },
            schema=_SCHEMA,
        )
        for each in law.laws
        if each.name in changes
    ]
    return pl.concat(pieces) if pieces else pl.DataFrame(schema=_SCHEMA)


_LINE, _TRACEBACK = 300, 1 << 20
"""So many letters of an error's text and of its traceback are told."""


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """How a run ended.

    Attributes:
        run: Its folder.
        status: "done", "interrupted", "diverged" or "failed".
        step: Steps done; of a diverged run the step at which it diverged.
        message: One sentence.
        failure: What the conservation law found wrong, in a sentence; empty if nothing.
        signal: The number of the signal that interrupted it.
    """

    run: RunFolder
    status: str
    step: int
    message: str
    failure: str = ""
    signal: int | None = None


def end(
    run: RunFolder,
    learner: Learner,
    state: TrainingState,
    console: Console,
    status: str,
    step: int,
    message: str,
    **details: Any,
) -> TrainingOutcome:
    """Write what there is at the end of a run, and print what the conservation law found if it was checked.

    The status comes last: a run of which it says that it is done has everything.

    Args:
        run: Where to.
        learner: What was trained.
        state: What was measured.
        console: Where to print.
        status: "done", "interrupted" or "diverged".
        step: Steps done.
        message: One sentence.
        details: What else the status shall say.

    Returns:
        The outcome.

    Raises:
        WriteError: Something cannot be written.
    """
    found = None if learner.law is None else judge_law(learner.law, learner)
    tables = state.tables(None if found is None else found.table)
    run.write_tables(tables)
    if found is not None:
        print_plain(console, found.text)
        details["law"] = found.verdict
    draw(run, tables, learner.config)
    run.write_status(status, step=step, epoch=state.epoch, message=message, **details)
    return TrainingOutcome(
        run=run, status=status, step=step, message=message, failure="" if found is None else found.failure
    )


def fail(run: RunFolder, state: TrainingState, error: BaseException) -> TrainingOutcome:
    """Write what there is of a run that something in it has ended, most often the user's own model.

    Args:
        run: Where to.
        state: What was measured.
        error: What was raised.

    Returns:
        The outcome; its message names the step, the error and the file that holds the traceback.
    """
    message = f"the run failed {_place(error, state)} with {_describe(error)}"
    go_on = f"mend it, then go on with falign train --resume {run.folder}"
    try:
        run.write(TRACEBACK, _traceback(error).encode("utf-8", "backslashreplace"))
        message += f": the traceback is in {run.folder / TRACEBACK}; {go_on}"
        run.write_tables(state.tables())
        run.write_status("failed", step=state.step, epoch=state.epoch, message=message)
    except FolderLost as lost:
        message += f"; {lost}"
    except WriteError as second:
        message += f"; and {second}"
    return TrainingOutcome(run=run, status="failed", step=state.step, message=message)


def _place(error: BaseException, state: TrainingState) -> str:
    return f"in step {state.step + 1}" if _within(error, _loop.__file__, "_step") else f"after step {state.step}"


def _within(error: BaseException, file: str, function: str) -> bool:
    return any((each.filename, each.name) == (file, function) for each in traceback.extract_tb(error.__traceback__))


def _describe(error: BaseException) -> str:
    text = one_line(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        in_test = _within(error, _learner.__file__, "test")  # the options do not change how many images a test takes
        what = "network or image" if in_test else "--batch-size or --probe-size"
        kind, *rest = text.split(": ", 1)
        text = ": ".join([f"{kind} (a smaller {what} needs less memory)", *rest])
    return text


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))[-_TRACEBACK:]
    except Exception as another:
        return f"{type(error).__name__}, and its traceback cannot be written: {type(another).__name__}\n"
