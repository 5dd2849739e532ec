"""The training loop: step, measure, save, and stop when asked to or when the training has diverged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, isfinite, log
from time import perf_counter
from typing import Any

from torch import Tensor

from falign.integrations import TensorBoardLogger
from falign.lab import _checkpoints
from falign.lab._batches import order
from falign.lab._checkpoints import TrainingState
from falign.lab._divergence import FINAL_FACTOR, RUNAWAY_FACTOR, RUNAWAY_STEPS, Diverged, is_finite
from falign.lab._files import WriteError
from falign.lab._progress import TrainingProgress
from falign.lab._run_folder import RunFolder
from falign.lab._setup import Setup
from falign.lab._signals import GracefulStop
from falign.lab._tables import NETWORK_COLUMNS, TEXT_COLUMNS, finite_or_none, layer_rows, neuron_table
from falign.measure import Alignment
from falign.measure._monitor import log_alignment

_LARGEST_EXPONENT = 709.0
"""Losses above it have a perplexity that no float holds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """The steps of one run.

    Attributes:
        setup: Network and data.
        run: Folder of the records and checkpoints.
        state: How far the run is and what it has measured; it changes with every step.
        progress: Display of the progress.
        stop: Asked after every step.
        events: Writer of events for TensorBoard; None if they are not wanted.
    """

    setup: Setup
    run: RunFolder
    state: TrainingState
    progress: TrainingProgress
    stop: GracefulStop
    events: "Events | None"

    def go(self) -> bool:
        """Train to the last epoch.

        Returns:
            Whether it got there; False if it was asked to stop, and then it can go on from a checkpoint.

        Raises:
            Diverged: A loss, a weight or a buffer is not finite, or the losses stay far above the initial one.
            WriteError: Records or checkpoint cannot be written.
        """
        config, state = self.setup.learner.config, self.state
        start = perf_counter() - state.seconds
        if not state.records:
            self.progress.log_record(self._measure(start, ends_epoch=True))
        while state.epoch < config.epochs:
            # The order depends on seed and epoch only, so a run that goes on in the middle of an epoch finds its place.
            places = order(config.seed, state.epoch, len(self.setup.train)).to(self.setup.probe_inputs.device)
            batches = places.split(config.batch_size)
            self.setup.learner.begin_epoch(state.epoch)
            for batch in batches[state.batch :]:
                self._step(*self.setup.train.take(batch))
                ends_epoch, record = state.batch == len(batches), None
                if ends_epoch or (config.measure_every and state.step % config.measure_every == 0):
                    record = self._measure(start, ends_epoch=ends_epoch)
                if ends_epoch:
                    state.end_epoch()
                if ends_epoch or self.stop.requested:
                    self._save(start)
                if record:  # shown after it is saved: printing fails where nobody reads the output any more
                    self.progress.log_record(record)
                if self.stop.requested and state.epoch < config.epochs:
                    return False
        if state.level > log(FINAL_FACTOR):
            raise self._runaway("at its end")
        return True

    def _step(self, x: Tensor, y: Tensor) -> None:
        state = self.state
        loss, correct = self.setup.learner.step(x, y, state.step)
        state.end_step(loss=loss, correct=correct, size=len(x))
        state.level = self.setup.baseline.update_level(state.level, loss, state.records[0]["test_loss"])
        # A loss far above the initial one may be on its way back: once it has halved, the steps are counted anew.
        if state.level > log(RUNAWAY_FACTOR) and state.far_steps and state.level > state.far_level - log(2):
            state.far_steps += 1
        else:
            state.far_steps, state.far_level = int(state.level > log(RUNAWAY_FACTOR)), state.level
        self.progress.update(state.step, state.loss_sum / state.seen, self._train_accuracy)
        if state.far_steps >= RUNAWAY_STEPS:
            raise self._runaway(f"after {RUNAWAY_STEPS} steps above {RUNAWAY_FACTOR:g} times")

    @property
    def _train_accuracy(self) -> float:
        """Share of the labels of the running epoch that were right."""
        return self.state.correct / (self.state.seen * self.setup.train.labels_each)

    def _runaway(self, when: str) -> Diverged:
        """Make the exception for a running loss that stays far above the initial one."""
        baseline, state = self.setup.baseline, self.state
        initial = baseline.loss(state.records[0]["test_loss"])
        layer, growth = baseline.most_grown(self.setup.learner.model)
        how = (
            f"its training loss runs at {initial * exp(state.level):.3g}, {exp(state.level):.3g} times the "
            f"{initial:.3g} that it began with, {when}; the weights of layer {layer!r} grew most, to {growth:.3g} "
            "times their norm"
        )
        return Diverged(step=state.step, layer=layer, what="loss", how=how)

    def _measure(self, start: float, *, ends_epoch: bool) -> dict[str, Any]:
        """Add a record: the running epoch so far, the alignment, and at the end of an epoch the test.

        Raises:
            Diverged: A weight, a buffer or a loss is not finite.
            WriteError: The events cannot be written.
        """
        setup, state = self.setup, self.state
        learner = setup.learner
        test_loss, test_accuracy = learner.test(setup.test) if ends_epoch else (None, None)
        if not is_finite(learner.model) or not isfinite(test_loss or 0.0):
            raise learner.locate_fault(setup.probe_inputs, state.step)
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": state.epoch + state.seen / len(setup.train),
            "train_loss": state.loss_sum / state.seen if state.seen else None,
            "train_accuracy": self._train_accuracy if state.seen else None,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }
        if setup.validation is not None:
            validation = learner.test(setup.validation) if ends_epoch else (None, None)
            perplexity = None if test_loss is None or test_loss > _LARGEST_EXPONENT else exp(test_loss)
            record |= dict(zip(TEXT_COLUMNS, (*validation, perplexity), strict=True))
        alignment = self._alignment()
        layers = learner.in_running_order(layer_rows(alignment, step=state.step, epoch=record["epoch"]))
        record |= {f"angle_{row['layer']}": row["gradient_angle"] for row in layers if row["gradient_norm"] is not None}
        record |= {name: finite_or_none(getattr(alignment, name)) for name in NETWORK_COLUMNS}
        record["unreadable"] = alignment.unreadable
        record["seconds"] = perf_counter() - start
        state.records.append(record)
        state.layer_rows += layers
        state.neurons = neuron_table(alignment)
        if self.events is not None:
            self.events.add(record, alignment)
        return record

    def _alignment(self) -> Alignment:
        """Measure the alignment on the probe.

        Raises:
            Diverged: Their loss is not finite.
        """
        x, y, learner = self.setup.probe_inputs, self.setup.probe_labels, self.setup.learner
        try:
            return learner.alignment(x, y)
        except ValueError:
            if learner.has_finite_loss(x, y):
                raise
            raise learner.locate_fault(x, self.state.step) from None

    def _save(self, start: float) -> None:
        # The order matters: a status never tells of a step whose checkpoint is not there yet.
        self.state.seconds = perf_counter() - start
        self.run.write_tables(self.state.tables())
        _checkpoints.save(self.run, self.setup.learner, self.state)
        self.run.write_status("running", step=self.state.step, epoch=self.state.epoch)


# Events for TensorBoard: loss, accuracy and everything that is measured of the alignment.

_SCALARS = ("train_loss", "validation_loss", "test_loss", "train_accuracy", "validation_accuracy", "test_accuracy")


class Events:
    """Writes the events of one record at a time.

    Args:
        run: Folder of the run.
        to: TensorBoard.
    """

    def __init__(self, run: RunFolder, to: TensorBoardLogger) -> None:
        self._run = run
        self._to = to

    def add(self, record: Mapping[str, Any], alignment: Alignment) -> None:
        """Write a record and the alignment measured with it.

        Raises:
            WriteError: It cannot be written, or the folder is no longer the run's.
        """
        self._run.check_lock()
        tested = {
            "/".join(reversed(name.split("_"))): record[name] for name in _SCALARS if record.get(name) is not None
        }
        if record.get("perplexity") is not None:
            tested["perplexity/test"] = record["perplexity"]
        with _write_errors(self._run):
            log_alignment(self._to, record["step"], alignment, **tested)


@contextmanager
def open_events(run: RunFolder, state: TrainingState, *, wanted: bool) -> Iterator[Events | None]:
    """Open the events of a run; those of steps that an earlier part made after its last checkpoint become void.

    Args:
        run: Folder of the run.
        state: How far the run is.
        wanted: Whether to write events at all.

    Yields:
        The writer; None if no events are wanted.

    Raises:
        WriteError: They cannot be written.
    """
    if not wanted:
        yield None
        return
    with _write_errors(run):
        to = TensorBoardLogger(run.events, begin=state.step + 1 if state.records else 0)
    try:
        yield Events(run, to)
    finally:
        with _write_errors(run):
            to.close()


@contextmanager
def _write_errors(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {run.events}: {error.strerror or error}") from None
