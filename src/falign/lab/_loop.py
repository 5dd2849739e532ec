"""The training loop: step, measure, save, and stop when asked to or when there is nothing finite left."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, isfinite, log
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from falign.lab import _checkpoints
from falign.lab._batches import order
from falign.lab._checkpoints import Course
from falign.lab._divergence import ABOVE, FAR, LONG, Diverged, finite
from falign.lab._files import WriteError
from falign.lab._interrupt import Interrupt
from falign.lab._run_folder import WHOLE, Run, finite_or_none, layer_rows, neurons
from falign.lab._text import plain, print_plain
from falign.lab._train import Setting
from falign.measure import Alignment
from falign.measure._monitor import write, writer

# What a run shows while it goes: a line for each epoch, and in a terminal a bar under them.

_LISTED = 6
"""Up to so many layers are shown one by one, more in summary."""
_PAUSE = 0.1
"""Seconds between two updates of the bar."""


class Display:
    """The lines and the bar of one run; a context manager.

    Args:
        console: Where to; without a terminal there is no bar.
        epochs: Of the whole run.
        steps: Steps of an epoch.
        done: Steps done before.
    """

    def __init__(self, console: Console, *, epochs: int, steps: int, done: int) -> None:
        self._console = console
        self._epochs = epochs
        self._steps = steps
        self._latest = ""
        self._next = 0.0
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=max(1, epochs * steps), completed=done, epoch=self._epoch(done // steps), figures=""
        )

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        print_plain(self._console, text)

    def step(self, done: int, loss: float, accuracy: float) -> None:
        """Move the bar, ten times a second at most.

        Args:
            done: Steps done.
            loss: Mean training loss of the running epoch.
            accuracy: Share of its images that were right.
        """
        if self._bar.disable or monotonic() < self._next:
            return
        self._next = monotonic() + _PAUSE
        figures = f"loss {loss:.4g}  train {accuracy:.1%}  {self._latest}"
        self._bar.update(self._task, completed=done, epoch=self._epoch(done // self._steps), figures=figures)

    def measured(self, row: Mapping[str, Any]) -> None:
        """Show a measured point: in the bar, and if it ends an epoch as a line."""
        self._latest = plain(angles_of(row))
        if row["test_loss"] is None:
            return
        trained = (
            "" if row["train_loss"] is None else f"loss {row['train_loss']:<8.4g} train {row['train_accuracy']:6.2%}  "
        )
        self.say(
            f"epoch {self._epoch(round(row['epoch']))}  {trained or ' ' * 30}"
            f"test {row['test_accuracy']:6.2%}  {angles_of(row)}  {_dominance_of(row)}{row['seconds']:.1f} s"
        )

    def _epoch(self, number: int) -> str:
        return f"{number:{len(str(self._epochs))}}/{self._epochs}"


def _dominance_of(row: Mapping[str, Any]) -> str:
    return "" if row["dominance"] is None else f"D {row['dominance']:.2f}  "


def angles_of(row: Mapping[str, Any]) -> str:
    """The angles of a record, layer by layer, or their range where there are many layers."""
    angles = {key.removeprefix("angle_"): row[key] for key in row if key.startswith("angle_") and row[key] is not None}
    if len(angles) <= _LISTED:
        return "angles " + " ".join(f"{name} {value:.0f}°" for name, value in angles.items())
    values = list(angles.values())
    mean = sum(values) / len(values)
    return f"angles {min(values):.0f}°-{max(values):.0f}°, mean {mean:.0f}° of {len(values)} layers"


# Events of a run for TensorBoard: loss, accuracy and everything that is measured of the alignment.

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """The steps of one run.

    Attributes:
        setting: Network and data.
        run: Where records and checkpoints go.
        course: Where the run is; it moves.
        display: Where progress is shown.
        interrupt: Asked after every step.
        events: Where TensorBoard reads, if it is wanted.
    """

    setting: Setting
    run: Run
    course: Course
    display: Display
    interrupt: Interrupt
    events: Events | None

    def go(self) -> bool:
        """Train to the last epoch.

        Returns:
            Whether it got there; False if it was asked to stop, and then it can go on from a checkpoint.

        Raises:
            Diverged: A loss, a weight or a buffer is not finite, or the losses stay far above where they began.
            WriteError: Records or checkpoint cannot be written.
        """
        config, course = self.setting.learner.config, self.course
        began = perf_counter() - course.seconds
        if not course.rows:
            self.display.measured(self._measure(began, ends_epoch=True))
        while course.epoch < config.epochs:
            images = order(config.seed, course.epoch, len(self.setting.train)).to(self.setting.x.device)
            batches = images.split(config.batch_size)
            self.setting.learner.begin(course.epoch)
            for batch in batches[course.position :]:
                self._step(*self.setting.train.take(batch))
                ends_epoch, measured = course.position == len(batches), None
                if ends_epoch or (config.measure_every and course.step % config.measure_every == 0):
                    measured = self._measure(began, ends_epoch=ends_epoch)
                if ends_epoch:
                    course.end_epoch()
                if ends_epoch or self.interrupt.requested:
                    self._save(began)
                if measured:  # shown after it is saved: showing may fail where nobody reads any more
                    self.display.measured(measured)
                if self.interrupt.requested and course.epoch < config.epochs:
                    return False
        if course.level > log(ABOVE):
            raise self._runaway("at its end")
        return True

    def _step(self, x: Tensor, y: Tensor) -> None:
        course = self.course
        loss, right = self.setting.learner.step(x, y, course.step)
        course.end_step(loss=loss, right=right, size=len(x))
        course.level = self.setting.start.level(course.level, loss, course.rows[0]["test_loss"])
        if course.level > log(FAR) and course.far and course.level > course.low - log(2):
            course.far += 1
        else:
            course.far, course.low = int(course.level > log(FAR)), course.level
        self.display.step(course.step, course.loss / course.seen, course.right / course.seen)
        if course.far >= LONG:
            raise self._runaway(f"after {LONG} steps above {FAR:g} times")

    def _runaway(self, when: str) -> Diverged:
        """What to raise where the running loss stays far above where it began."""
        start, course = self.setting.start, self.course
        began = start.loss(course.rows[0]["test_loss"])
        layer, growth = start.grown(self.setting.learner.model)
        how = (
            f"its training loss runs at {began * exp(course.level):.3g}, {exp(course.level):.3g} times the {began:.3g} "
            f"that it began with, {when}; the weights of layer {layer!r} grew most, to {growth:.3g} times their norm"
        )
        return Diverged(step=course.step, layer=layer, what="loss", how=how)

    def _measure(self, began: float, *, ends_epoch: bool) -> dict[str, Any]:
        """Add a record: training so far in this epoch, alignment, and at the end of an epoch the test."""
        setting, course = self.setting, self.course
        learner = setting.learner
        test_loss, test_accuracy = learner.test(setting.test) if ends_epoch else (None, None)
        if not finite(learner.model) or not isfinite(test_loss or 0.0):
            raise learner.fault(setting.x, course.step)
        row: dict[str, Any] = {
            "step": course.step,
            "epoch": course.epoch + course.seen / len(setting.train),
            "train_loss": course.loss / course.seen if course.seen else None,
            "train_accuracy": course.right / course.seen if course.seen else None,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }
        found = self._alignment()
        layers = layer_rows(found, step=course.step, epoch=row["epoch"])
        row |= {
            f"angle_{each['layer']}": each["gradient_angle"] for each in layers if each["gradient_norm"] is not None
        }
        row |= {name: finite_or_none(getattr(found, name)) for name in WHOLE}
        row["seconds"] = perf_counter() - began
        course.rows.append(row)
        course.layers += layers
        course.neurons = neurons(found)
        if self.events is not None:
            self.events.add(row, found)
        return row

    def _alignment(self) -> Alignment:
        """Of the images it is measured on.

        Raises:
            Diverged: Their loss is not finite.
        """
        x, y, learner = self.setting.x, self.setting.y, self.setting.learner
        try:
            return learner.alignment(x, y)
        except ValueError:
            if learner.is_finite(x, y):
                raise
            raise learner.fault(x, self.course.step) from None

    def _save(self, began: float) -> None:
        self.course.seconds = perf_counter() - began
        self.run.write_tables(self.course.tables())
        _checkpoints.save(self.run, self.setting.learner, self.course)
        self.run.write_status("running", step=self.course.step, epoch=self.course.epoch)
