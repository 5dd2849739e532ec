"""Callback of Lightning; see ``falign.integrations.lightning_callback``, which makes it."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from falign._convert import convert
from falign._wiring import wirings
from falign.integrations._feedback_state import FeedbackState
from falign.measure import Logger, Monitor
from falign.measure._passes import Loss
from falign.rules import Rule


class FeedbackAlignmentCallback(Callback):
    """Convert at setup, measure before every so many-th batch, log, and keep the feedback in checkpoints.

    Attributes:
        monitor: The monitor, from the beginning of the training on; its records stay when it is closed.
    """

    def __init__(
        self,
        rule: str | Rule | type[Rule] | None,
        *,
        module: str,
        options: Mapping[str, Any],
        loss_fn: Loss | None,
        every: int,
        unpack: Callable[[Any], tuple[Any, Any]] | None,
        logger: Logger | None,
    ) -> None:
        self.monitor: Monitor | None = None
        self._rule, self._module, self._options = rule, module, options
        self._loss_fn, self._every, self._logger = loss_fn, every, logger
        self._unpack = unpack if unpack is not None else _pair
        self._model: nn.Module | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module, if it is not converted yet."""
        if stage != "fit":
            return
        self._model = pl_module.get_submodule(self._module)
        if self._rule is not None and not wirings(self._model):
            example = pl_module.example_input_array
            options = self._options if example is None else {"example": example, **self._options}
            convert(self._model, self._rule, **options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure: now the optimizers are there, and the state of a checkpoint was read."""
        if self._loss_fn is None:
            return
        assert self._model is not None
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        to = _ToTrainer(trainer, self._logger)
        self.monitor = Monitor(self._model, every=self._every, optimizer=optimizer, logger=to)
        if self._restored is not None:
            self.monitor.load_state_dict(self._restored)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure, if it is a batch to be measured."""
        if self.monitor is not None and self._loss_fn is not None:
            self.monitor.step(self._loss_fn, *self._unpack(batch))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the monitor off the model, also where the training was interrupted."""
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the monitor off the model."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Copy the feedback and the records, for a checkpoint."""
        return {} if self._model is None else FeedbackState(self._model, self.monitor).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the feedback of a checkpoint back; the model was converted just before."""
        if self._model is not None and "feedback" in state_dict:
            FeedbackState(self._model).load_state_dict(state_dict)
            self._restored = state_dict.get("monitor")


class _ToTrainer:
    """Logger into all loggers of a trainer, and another one, at the trainer's own count of steps."""

    def __init__(self, trainer: Trainer, other: Logger | None) -> None:
        self._trainer, self._other = trainer, other
        self.histogram = getattr(other, "histogram", lambda name, values, step: None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step=self._trainer.global_step)
        if self._other is not None:
            self._other.log(values, step)

    def close(self) -> None:
        """Leave all of them open: they are others'."""


def _pair(batch: Any) -> tuple[Any, Any]:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise TypeError(
            f"a batch is a {type(batch).__name__}, expected a pair (x, y): give unpack=, a function of the batch that "
            "returns x and y"
        )
    return batch[0], batch[1]
