"""Events of a run for TensorBoard: loss, accuracy and everything that is measured of the alignment."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from falign.lab.checkpoints import Course
from falign.lab.runs import Run
from falign.lab.writing import WriteError
from falign.measure import Alignment
from falign.measure.tracking import write, writer

_SCALARS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")


class Events:
    """Writes a measured point at a time.

    Args:
        run: Where to.
        to: TensorBoard's writer.
    """

    def __init__(self, run: Run, to: Any) -> None:
        self._run = run
        self._to = to

    def add(self, row: Mapping[str, Any], found: Alignment) -> None:
        """Write a record and the alignment measured with it, at once: what waits would be written whatever comes.

        Raises:
            WriteError: It cannot be written, or the folder is no longer the run's.
        """
        self._run.check()
        with _naming(self._run):
            for name in _SCALARS:
                if row[name] is not None:
                    kind, what = name.split("_")
                    self._to.add_scalar(f"{what}/{kind}", row[name], row["step"])
            write(self._to, row["step"], found)
            self._to.flush()


@contextmanager
def events(run: Run, course: Course, *, wanted: bool) -> Iterator[Events | None]:
    """Open the events of a run; what an earlier part wrote of steps that are to come is void.

    Args:
        run: Where to.
        course: Where the run is.
        wanted: Whether there shall be any.

    Raises:
        WriteError: They cannot be written.
    """
    if not wanted:
        yield None
        return
    with _naming(run):
        to = writer(run.events, begin=course.step + 1 if course.rows else 0)
    try:
        yield Events(run, to)
    finally:
        with _naming(run):
            to.close()


@contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {run.events}: {error.strerror or error}") from None
