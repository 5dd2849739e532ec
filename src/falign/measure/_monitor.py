"""Alignment along a training loop of one's own."""

import io
import os
from collections.abc import Callable, Mapping
from math import nan
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn

from falign._show import Loud, Sheet, Tabular, evenly
from falign._style import INK, law, literal, nothing_to_draw, sequence
from falign._validation import describe
from falign._wiring import Wiring, converted, unwrapped, unwrapped_optimizer
from falign.measure._alignment import PendingRecord, measure_alignment, trained_parameters
from falign.measure._passes import Loss
from falign.measure._report import RIGHT_ANGLE, Alignment
from falign.measure._steps import check_step_size


@runtime_checkable
class Logger(Protocol):
    """Destination of measured numbers: TensorBoard, MLflow, Weights & Biases (``falign.integrations``), or your own.

    One that also has a method ``histogram(name, values, step)``, values a tensor (neurons,), is given the alignment of
    the neurons of every layer.
    """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of one step, by name."""
        ...

    def close(self) -> None:
        """Write what still waits, and end."""
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
    "growth": "growth of the activations",
    "loss_change": "loss change of a step of the layer",
}
"""Column of a layer's row -> group of names, one name a layer in it."""


def named_values(report: Alignment) -> dict[str, float]:
    """Name the numbers of one measurement: of the network, and of every layer, grouped by what they are."""
    network = {"loss": report.loss, "descent -dL_dt": report.descent, "dominance D": report.dominance}
    network["unreadable layers"] = float(report.unreadable)
    values = {f"network/{name}": value for name, value in network.items()}
    for row in report.layers:
        values |= {f"{group}/{row.layer}": getattr(row, column) for column, group in SCALARS.items()}
    return {name: value for name, value in values.items() if value is not None}


def log_alignment(to: Logger, step: int, report: Alignment, **others: float) -> None:
    """Log one measurement at a step, with other numbers of that step."""
    to.log(others | named_values(report), step)
    histogram = getattr(to, "histogram", None)
    if histogram is not None:
        for name, cosines in report.neuron_cosines.items():
            histogram(f"alignment of neurons/{name}", cosines, step)


_NOTHING = "nothing was measured yet: call step(loss_fn, x, y) in the training loop"
_SHOWN = 6
"""Measurements that are shown in the table at most."""
_NAMED, _MARKED = 12, 12
"""Layers of a picture that are all named, and points of a line that get markers, at most."""


def _is_lost(record: dict[str, Any]) -> bool:
    return "gradient" in (record["unreadable"] or "").split(", ")


def _angle(record: dict[str, Any]) -> str:
    if _is_lost(record):
        return Loud("unreadable")
    return "-" if record["gradient_angle"] is None else f"{record['gradient_angle']:.1f}°"


#: The monitor at work on a converted model; held weakly, so one that was dropped does not bar the way.
_MONITORS: WeakKeyDictionary[Wiring, ReferenceType["Monitor"]] = WeakKeyDictionary()


class Monitor(Tabular):
    """Measure the alignment of a model every so many steps of any training loop.

    ::

        with falign.measure.Monitor(model, every=100, optimizer=optimizer) as monitor:
            for x, y in batches:
                monitor.step(loss_fn, x, y)
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        monitor.save("alignment.parquet")

    Called before the optimizer's step with its batch, it also compares the displacement that the optimizer really made
    (momentum, clipping and all) with the true gradient of that batch; that part of a record is there once the
    optimizer has stepped. Measuring changes nothing of the training. ``descending`` says how often what a layer took
    went downhill.

    Args:
        model: A converted model, also within ``torch.compile`` or DDP.
        every: Measure at the first call and at every so many-th after it.
        optimizer: The one that trains the model, for the displacements.
        logger: Where every measurement is logged as well; it is yours to close.
        step_size: With it, the loss after a step of each layer alone is measured too, a forward a layer; see
            ``falign.measure.alignment``.

    Attributes:
        count: Calls of ``step`` so far.
        records: A flat dict a measured step and layer: "step", "loss", "dominance", "total_descent", and the columns of
            ``LayerAlignment``.

    Raises:
        ValueError: The model is not converted or has a monitor already, ``every`` is no positive whole number, or the
            optimizer holds none of the model's parameters.
        TypeError: The logger has no ``log``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        optimizer: torch.optim.Optimizer | None = None,
        logger: Logger | None = None,
        step_size: float | None = None,
    ) -> None:
        self._model, optimizer = unwrapped(model), unwrapped_optimizer(optimizer)
        self._wirings = converted(self._model)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {describe(every)}, expected a whole number of steps from 1 on")
        if any(wiring in _MONITORS and _MONITORS[wiring]() is not None for wiring in self._wirings):
            raise ValueError("the model has a monitor already: use that one, or close() it first")
        check_step_size(step_size)
        self._step_size = step_size
        self._moved = {} if optimizer is None else trained_parameters(self._model, optimizer)
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise TypeError(
                f"logger is {describe(logger)}, expected an object with log(values, step) and close(), such as "
                "falign.integrations.TensorBoardLogger(folder)"
            )
        self._logger = logger
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(_telling(ref(self)))
        for wiring in self._wirings:
            _MONITORS[wiring] = ref(self)
        self.every = every
        self.count = 0
        self.records: list[dict[str, Any]] = []
        self._waiting: PendingRecord | None = None

    def step(self, loss_fn: Loss, x: Any, y: Any) -> Alignment | None:
        """Count a step, and measure if it is one to be measured.

        Args:
            loss_fn: (model output, y) -> scalar.
            x: The batch; see ``falign.measure.alignment``.
            y: Its targets.

        Returns:
            What was measured, or None.

        Raises:
            ValueError: As ``falign.measure.alignment``, or the monitor is closed.
        """
        if not self._wirings:
            raise ValueError("the monitor is closed: make another one")
        now, self.count = self.count, self.count + 1
        if now % self.every:
            return None
        self._finish()
        report, true = measure_alignment(self._model, loss_fn, x, y, step_size=self._step_size)
        network = {"step": now, "loss": report.loss, "dominance": report.dominance, "total_descent": report.descent}
        rows = [network | row for row in report.rows()]
        self.records += rows
        self._waiting = PendingRecord(now, report, rows, true, {n: p.detach().clone() for n, p in self._moved.items()})
        if not self._moved:
            self._finish()
        return report

    def descending(self) -> dict[str, float]:
        """Give {layer: share of the measured steps with ⟨g, f⟩ > 0}, "*" the whole network.

        Steps at which a layer's gradient rests on rounding are left out.
        """
        whole = {record["step"]: record["total_descent"] > 0 for record in self.records}
        signs: dict[str, list[bool]] = {"*": list(whole.values())}
        for record in self.records:
            if record["descent"] is not None:
                signs.setdefault(record["layer"], []).append(record["descent"] > 0)
        return {layer: sum(own) / len(own) for layer, own in signs.items() if own}

    def rows(self) -> list[dict[str, Any]]:
        """Give the records, a row a measured step and layer."""
        return [dict(record) for record in self.records]

    def _sheet(self) -> Sheet:
        lines = self._by_layer()
        if not lines:
            return Sheet(head=f"monitor, every {self.every} steps: {_NOTHING}")
        steps = sorted({record["step"] for record in self.records})
        shown, share = evenly(steps, _SHOWN), self.descending()
        table = [["layer", *(f"step {step}" for step in shown), "descends"]]
        for layer, records in lines.items():
            angles = [_angle(records[step]) if step in records else "-" for step in shown]
            table.append([layer, *angles, f"{share[layer]:.0%}" if layer in share else "-"])
        table.append(["*", *("" for _ in shown), f"{share['*']:.0%}"])
        head = f"monitor: {len(steps)} measurements in {self.count} steps, angle of the gradient to the true one"
        return Sheet(head=head, table=table, notes=["descends: share of the measured steps with ⟨g, f⟩ > 0"])

    def _draw(self, axes: Any) -> None:
        lines = self._by_layer()
        if not lines:
            nothing_to_draw(_NOTHING)
        named = list(lines) if len(lines) <= _NAMED else evenly(list(lines), 3)
        for (layer, records), colour in zip(lines.items(), sequence(len(lines)), strict=True):
            # Not a number breaks the line: where an angle cannot be read there is none.
            angles = [nan if (angle := record["gradient_angle"]) is None else angle for record in records.values()]
            marker = "o" if len(angles) <= _MARKED else None
            label = literal(layer) if layer in named else None
            axes.plot(list(records), angles, color=colour, marker=marker, label=label)
        unread = sorted({record["step"] for record in self.records if _is_lost(record)})
        if unread:
            edge = axes.get_xaxis_transform()
            axes.plot(
                unread, [1.0] * len(unread), color=INK, marker="x", linestyle="none", clip_on=False, transform=edge,
                label="unreadable in a layer",
            )  # fmt: skip
        steps = [record["step"] for record in self.records]
        law(axes, [min(steps), max(steps)], [RIGHT_ANGLE[0]] * 2, RIGHT_ANGLE[1])
        axes.set_ylim(-2.0, max(95.0, axes.get_ylim()[1]))
        axes.set_yticks(range(0, int(axes.get_ylim()[1]) + 1, 15))
        axes.set_xlabel("step")
        axes.set_ylabel("degrees to the true one")
        axes.set_title("gradients of the layers", loc="left")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    def _by_layer(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Sort the records: {layer: {step: record}}."""
        layers: dict[str, dict[int, dict[str, Any]]] = {}
        for record in self.records:
            layers.setdefault(record["layer"], {})[record["step"]] = record
        return layers

    def save(self, path: str | Path) -> None:
        """Write the records as a Parquet file, whole or not at all.

        Raises:
            ValueError: Nothing was measured yet.
            ImportError: polars is not installed.
        """
        if not self.records:
            raise ValueError(_NOTHING)
        content, path = io.BytesIO(), Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.to_polars().write_parquet(content)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_bytes(content.getvalue())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Give count and records, for a run that is to be resumed."""
        return {"count": self.count, "records": [dict(record) for record in self.records]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.count, self.records = state["count"], [dict(record) for record in state["records"]]

    def close(self) -> None:
        """Take the monitor off the model and the optimizer; the records stay."""
        self._finish()
        for wiring in self._wirings:
            _MONITORS.pop(wiring, None)
        self._wirings = []
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stepped(self) -> None:
        """Complete the waiting record: the optimizer has made its step."""
        waiting = self._waiting
        if waiting is None:
            return
        steps = {name: before - self._moved[name].detach() for name, before in waiting.before.items()}
        waiting.compare(self._model, steps)
        self._finish()

    def _finish(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self._logger is not None:
            log_alignment(self._logger, waiting.step, waiting.report)


def _telling(monitor: "ReferenceType[Monitor]") -> Callable[..., None]:
    """Make a post-hook of the optimizer's step that keeps no monitor alive."""

    def stepped(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if (alive := monitor()) is not None:
            alive._stepped()

    return stepped
