"""How a run ends: the tables, what the conservation law found, the status, the pictures."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from falign.lab.checkpoints import Course
from falign.lab.law import judge
from falign.lab.learner import Learner
from falign.lab.pictures import draw
from falign.lab.runs import Run


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: Its folder.
        status: "done", "interrupted" or "diverged".
        step: Steps done; of a diverged run the step at which it diverged.
        message: One sentence.
        failure: What the conservation law found wrong, in a sentence; empty if nothing.
    """

    run: Run
    status: str
    step: int
    message: str
    failure: str = ""


def end(
    run: Run, learner: Learner, course: Course, console: Console, status: str, step: int, message: str, **details: Any
) -> Outcome:
    """Write what there is at the end of a run, and print what the conservation law found if it was checked.

    Args:
        run: Where to.
        learner: What was trained.
        course: What was measured.
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
    found = None if learner.law is None else judge(learner.law, learner)
    tables = course.tables(None if found is None else found.table)
    run.write_tables(tables)
    if found is not None:
        console.print(found.text, highlight=False, markup=False, soft_wrap=True)
        details["law"] = found.verdict
    run.write_status(status, step=step, epoch=course.epoch, message=message, **details)
    draw(run, tables, learner.config)
    return Outcome(run=run, status=status, step=step, message=message, failure="" if found is None else found.failure)
