"""Loggers of measured numbers into the trackers that people use already: the protocol is ``falign.measure.Logger``."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from falign._validation import describe

if TYPE_CHECKING:
    import wandb
    from mlflow.entities import Run

_AT_ONCE = 1000
"""Numbers that MLflow takes in one call."""


class _Closing:
    """Context manager that closes a logger at its end."""

    def close(self) -> None:
        """Write what still waits, and end."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardLogger(_Closing):
    """Events in a folder that ``tensorboard --logdir`` opens; what was logged is on the disk at once.

    Args:
        folder: Where to.
        begin: Step from which on what an earlier logger wrote there is void, in a run that is resumed.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path, *, begin: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError('TensorBoard is not installed: pip install "falign[tensorboard]"') from None
        self._writer = SummaryWriter(str(folder), purge_step=begin)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of one step, by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # its thread would write what waits even into a folder that was given away meanwhile

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Write the distribution of some numbers, of any shape."""
        self._writer.add_histogram(name, values, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflowLogger(_Closing):
    """Metrics of a run of MLflow.

    What MLflow allows in no name becomes an underscore.

    Args:
        run: The run, which ``mlflow.start_run()`` gave; its store is where ``mlflow.set_tracking_uri`` points now.

    Raises:
        TypeError: It is no run of MLflow.
    """

    def __init__(self, run: "Run") -> None:
        identity = getattr(getattr(run, "info", None), "run_id", None)
        if not isinstance(identity, str):
            raise TypeError(f"run is {describe(run)}, expected what mlflow.start_run() gives")
        from mlflow import MlflowClient

        self._identity = identity
        self._client = MlflowClient()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of one step, by name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in values.items()]
        for some in (metrics[at : at + _AT_ONCE] for at in range(0, len(metrics), _AT_ONCE)):
            self._client.log_batch(self._identity, some)

    def close(self) -> None:
        """End the run as finished."""
        self._client.set_terminated(self._identity)


class WandbLogger(_Closing):
    """History of a run of Weights & Biases, also of one in offline mode.

    Weights & Biases keeps only steps that do not fall: what you log into the same run needs the same count of steps.

    Args:
        run: The run, which ``wandb.init(...)`` gave.

    Raises:
        TypeError: It is no run of Weights & Biases.
    """

    def __init__(self, run: "wandb.Run") -> None:
        if not (callable(getattr(run, "log", None)) and callable(getattr(run, "finish", None))):
            raise TypeError(f"run is {describe(run)}, expected what wandb.init() gives")
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of one step, by name."""
        self._run.log(dict(values), step=step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Write the distribution of some numbers, of any shape."""
        from wandb import Histogram

        self._run.log({name: Histogram(values.flatten().tolist())}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
