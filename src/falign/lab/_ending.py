"""End of a run: its tables, the verdict of the conservation law, its pictures and its status; or how it failed."""

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

_TRACEBACK = 1 << 20
"""Letters of a traceback that are kept, the last ones."""


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """End of a run, as the command reports it.

    Attributes:
        run: Folder of the run.
        status: "done", "interrupted", "diverged" or "failed".
        step: Steps done; of a diverged run the step at which it diverged.
        message: One sentence.
        failure: Sentence about a conservation law that does not hold though it should; empty if there is none.
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
    """Write tables, pictures and status of a run, and print the report of the conservation law if it was checked.

    The status comes last: a run whose status is "done" has everything.

    Args:
        run: Folder of the run.
        learner: The trained network.
        state: How far the run is, with all measurements.
        console: Console for the report of the conservation law.
        status: "done", "interrupted" or "diverged".
        step: Steps done.
        message: One sentence.
        details: Further entries of the status.

    Returns:
        The outcome.

    Raises:
        WriteError: Something cannot be written.
    """
    law = None if learner.law is None else _judge_law(learner.law, learner)
    tables = state.tables(None if law is None else law.table)
    run.write_tables(tables)
    if law is not None:
        print_plain(console, law.text)
        details["law"] = law.verdict
    if status != "interrupted":  # whoever pressed Ctrl-C shall not wait for pictures, which are drawn when it goes on
        draw(run, tables, learner.config)
    run.write_status(status, step=step, epoch=state.epoch, message=message, **details)
    return TrainingOutcome(
        run=run, status=status, step=step, message=message, failure="" if law is None else law.failure
    )


def fail(run: RunFolder, state: TrainingState, error: BaseException) -> TrainingOutcome:
    """Write traceback, tables and status of a run that an error has ended, most often one of the user's own model.

    Args:
        run: Folder of the run.
        state: How far the run is, with all measurements.
        error: The error.

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
    return any((frame.filename, frame.name) == (file, function) for frame in traceback.extract_tb(error.__traceback__))


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


# The verdict of the conservation law on a run: a report, and a table with a row for each neuron.

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
    """Verdict of the conservation law on a run.

    Attributes:
        verdict: "holds", "too little moved" (to tell), "fails", "drift" (it is not exact here, and was measured how far
            off it is), "none" (no neuron obeys it) or "not checked".
        text: Report for the terminal, several lines.
        table: One row for each neuron; None where nothing was checked.
        failure: Sentence about a layer whose law does not hold though it should; empty if there is none.
    """

    verdict: str
    text: str
    table: pl.DataFrame | None = None
    failure: str = ""


def _judge_law(law: ConservationLaw, learner: Learner) -> LawVerdict:
    """Judge the conservation law after a training.

    Args:
        law: The instrument that followed the training.
        learner: The trained network.

    Returns:
        The verdict.
    """
    if not law.steps:
        return LawVerdict(verdict="not checked", text="the conservation law was not checked: no step was made")
    if not is_finite(learner.model):
        return LawVerdict(verdict="not checked", text="the conservation law was not checked: the run diverged")
    report = law.report()
    if report.holds:
        statuses = {layer.status for layer in law.laws}
        exact = "holds" if report.conclusive else "too little moved"
        verdict = exact if report.checked else "drift" if "drift" in statuses else "none"
        return LawVerdict(verdict=verdict, text=str(report), table=_neurons(law))
    worst = max((row for row in report.laws if row.broken), key=lambda row: row.leap or 0.0)
    failure = (
        f"the conservation law does not hold for layer {worst.layer!r}, off by {worst.leap:.1e} of its size within "
        f"{STRETCH} steps, where rounding explains {worst.tolerance:.1e}: a gradient or an update was not the rule's"
    )
    return LawVerdict(verdict="fails", text=str(report), table=_neurons(law), failure=failure)


def _neurons(law: ConservationLaw) -> pl.DataFrame:
    changes, drift, residual = law.changes(), law.drift(), law.residual()
    tables = [
        pl.DataFrame(
            {
                "layer": layer.name,
                "targets": ", ".join(layer.targets),
                "form": layer.form,
                "status": layer.status,
                "neuron": range(layer.neurons),
                "weights": changes[layer.name][0].tolist(),
                "alignment": changes[layer.name][1].tolist(),
                "drift": drift[layer.name].tolist(),
                "residual": residual[layer.name].tolist(),
            },
            schema=_SCHEMA,
        )
        for layer in law.laws
        if layer.name in changes
    ]
    return pl.concat(tables) if tables else pl.DataFrame(schema=_SCHEMA)
