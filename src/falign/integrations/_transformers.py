"""Callback of Transformers; see ``falign.integrations.transformers_callback``, which makes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falign.integrations._callbacks import transformers_loss
from falign.integrations._feedback_state import FeedbackState
from falign.measure import Logger, Monitor
from falign.measure._passes import Loss


class FeedbackAlignmentCallback(TrainerCallback):
    """Measure before every so many-th step, log, and keep the feedback in checkpoints.

    Attributes:
        monitor: The monitor, from the beginning of the training on; its records stay when it is closed.
    """

    def __init__(
        self,
        *,
        probe: Mapping[str, Any] | None,
        every: int,
        loss_fn: Loss | None,
        logger: Logger | None,
        resume: Path | None,
    ) -> None:
        self.monitor: Monitor | None = None
        self._probe, self._every, self._loss_fn = probe, every, loss_fn
        self._logger, self._resume = logger, resume

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure, and put back the feedback of the checkpoint that the training goes on from."""
        self.on_train_end(args, state, control)  # of a training that was broken off
        self._model = kwargs["model"]
        if self._probe is not None:
            to = _ToHistory(state, self._logger)
            self.monitor = Monitor(self._model, every=self._every, optimizer=kwargs["optimizer"], logger=to)
            device = next(self._model.parameters()).device
            batch = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in self._probe.items()}
            self._labels = batch.pop("labels")
            self._inputs = batch
            if self._loss_fn is None:
                self._loss_fn = transformers_loss(self._model)
        self._state = FeedbackState(self._model, self.monitor)
        if state.global_step:
            self._state.load(self._resume or _checkpoint(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, if it is a step to be measured."""
        if self.monitor is not None and self._loss_fn is not None:
            self.monitor.step(self._loss_fn, self._inputs, self._labels)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the feedback into the checkpoint that was just written."""
        if args.should_save:
            self._state.save(_checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the monitor off the model."""
        if self.monitor is not None:
            self.monitor.close()


class _ToHistory:
    """Logger into the history of a trainer, and another one."""

    def __init__(self, state: TrainerState, other: Logger | None) -> None:
        self._state, self._other = state, other
        self.histogram = getattr(other, "histogram", lambda name, values, step: None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._state.log_history.append({**values, "step": step})
        if self._other is not None:
            self._other.log(values, step)

    def close(self) -> None:
        """Leave all of them open: they are others'."""


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
