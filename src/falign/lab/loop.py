"""The training loop: step, measure, save, and stop when asked to or when there is nothing finite left."""

from dataclasses import dataclass
from math import exp, isfinite, log
from time import perf_counter
from typing import Any

from torch import Tensor

from falign.lab import checkpoints
from falign.lab.batches import order
from falign.lab.checkpoints import Course
from falign.lab.display import Display
from falign.lab.divergence import ABOVE, FAR, LONG, Diverged, finite
from falign.lab.events import Events
from falign.lab.interrupt import Interrupt
from falign.lab.runs import Run
from falign.lab.setting import Setting
from falign.lab.tables import WHOLE, finite_or_none, layer_rows, neurons
from falign.measure import Alignment


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
        checkpoints.save(self.run, self.setting.learner, self.course)
        self.run.write_status("running", step=self.course.step, epoch=self.course.epoch)
