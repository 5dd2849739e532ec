"""Alignment as TensorBoard scalars and histograms."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from falign.measure.report import Alignment, LayerAlignment


@runtime_checkable
class Writer(Protocol):
    """What is asked of a TensorBoard writer, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""
        ...

    def add_histogram(self, tag: str, values: Tensor, global_step: int) -> Any:
        """Write a histogram."""
        ...


SCALARS = {
    "gradient_angle": "angle of the gradient",
    "delivered_angle": "angle of the error before the mask",
    "received_angle": "angle of the error behind the mask",
    "displacement_angle": "angle of the optimizer's step",
    "weight_angle": "angle of B to W",
    "norm_ratio": "norm of B over W",
    "sign_agreement": "share of equal signs",
    "aligned_neurons": "share of aligned neurons",
    "effective_rank": "effective rank of the error",
}
"""Column of a layer's row -> group of tags, one tag a layer in it."""


def writer(folder: str | Path, *, begin: int | None = None) -> Any:
    """A writer into a folder that ``tensorboard --logdir`` opens.

    Args:
        folder: Where to.
        begin: Step from which on what an earlier writer wrote there is void.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError('TensorBoard is not installed: pip install "falign[tensorboard]"') from None
    return SummaryWriter(str(folder), purge_step=begin)


def write(to: Writer, step: int, found: Alignment) -> None:
    """Write one measurement at a step."""
    network = {"loss": found.loss, "descent -dL_dt": found.descent, "dominance D": found.dominance}
    for name, value in network.items():
        if value is not None:
            to.add_scalar(f"network/{name}", value, step)
    for row in found.layers:
        write_row(to, step, row)
    for name, cosines in found.neuron_cosines.items():
        to.add_histogram(f"alignment of neurons/{name}", cosines, step)


def write_row(to: Writer, step: int, row: LayerAlignment) -> None:
    """Write one layer's numbers."""
    for column, group in SCALARS.items():
        value = getattr(row, column)
        if value is not None:
            to.add_scalar(f"{group}/{row.layer}", value, step)
