"""The report of the conservation law after some steps: a row a layer, and the table that it prints as."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from falign._show import Loud, Sheet, Tabular
from falign._style import Points, dots, height_of
from falign.measure.law._balance import STRETCH, Balance
from falign.measure.law._laws import Law


def _renamed(report: "LawRow | LawReport") -> bool:
    warnings.warn("told is now called conclusive", DeprecationWarning, stacklevel=3)
    return report.conclusive


_HEADS = (
    "layer", "feeds", "C of a neuron", "law", "drift", "residual", f"in {STRETCH}", "tolerance",
    "why not exact: drift expected",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LawRow:
    """One layer's law; the fields up to ``neurons`` are those of ``Law``.

    Attributes:
        layer: The layer whose neurons they are.
        targets: The layers that it feeds, separated by commas.
        form: C as text.
        status: "exact", "accounted", "drift" or "none".
        reason: Why it is not exact.
        order: The expected order of the drift.
        neurons: How many there are.
        drift: max_k |C_k(T) - C_k(0)| / size_k, size_k that of the terms of C_k; None where there is no C.
        residual: The largest part of that change which the identity does not account for, relative to size_k.
        moved: How far ½|w|² + ½b² and the alignment term moved, added and relative to size_k. A residual far below it
            shows that the law holds.
        leap: How far the residual moved within 16 steps, relative to size_k, at the neuron and in the steps where that
            comes nearest to the tolerance; None where the law does not promise that the residual is rounding.
        tolerance: The most that rounding can move the residual by there, relative to size_k.
    """

    layer: str
    targets: str
    form: str
    status: str
    reason: str
    order: str
    neurons: int
    drift: float | None
    residual: float | None
    moved: float | None
    leap: float | None = None
    tolerance: float | None = None

    @property
    def checked(self) -> bool:
        """True if the residual should be rounding."""
        return self.status in ("exact", "accounted")

    @property
    def broken(self) -> bool:
        """True if the residual moved by more than rounding can."""
        return self.leap is not None and self.tolerance is not None and not self.leap <= self.tolerance

    @property
    def conclusive(self) -> bool:
        """True if it is broken, or the terms of C have moved by so much that a broken law would have been seen."""
        moved, residual = self.moved or 0.0, self.residual or 0.0
        return self.checked and (self.broken or moved > (self.tolerance or 0.0) or residual < moved / 10)

    @property
    def told(self) -> bool:
        """Deprecated: the former name of ``conclusive``."""
        return _renamed(self)


@dataclass(frozen=True, kw_only=True)
class LawReport(Tabular):
    """The law of a model's neurons after some steps; it is true where the law holds, and prints as a table.

    Attributes:
        steps: Steps of the optimizer since the start.
        laws: A row a layer, in running order.
    """

    steps: int
    laws: tuple[LawRow, ...]

    @property
    def tolerance(self) -> float:
        """The largest tolerance of the layers; 0 where none has one."""
        return max((row.tolerance or 0.0 for row in self.laws), default=0.0)

    @property
    def checked(self) -> int:
        """Number of laws that are exact or accounted for."""
        return sum(row.checked for row in self.laws)

    @property
    def conclusive(self) -> bool:
        """True if weights moved enough in some law that is exact or accounted for; else ``holds`` proves nothing."""
        return any(row.conclusive for row in self.laws)

    @property
    def told(self) -> bool:
        """Deprecated: the former name of ``conclusive``."""
        return _renamed(self)

    @property
    def holds(self) -> bool:
        """True if no law that is exact or accounted for is broken, and where there is none: see ``conclusive``."""
        return not any(row.broken for row in self.laws)

    def __bool__(self) -> bool:
        return self.holds

    def rows(self) -> list[dict[str, Any]]:
        """The rows as dicts, with ``conclusive`` in the column "told"; None there where the law is not checked."""
        return [asdict(row) | {"told": row.conclusive if row.checked else None} for row in self.laws]

    def _sheet(self) -> Sheet:
        head = f"conservation law after {self.steps} step{'s' * (self.steps != 1)}: "
        if not self.laws:
            return Sheet(head=head + "no layer of this model feeds another, so there is nothing to check")
        if not self.checked:
            head += "it holds exactly of no layer"
        else:
            layers = f"{self.checked} layer{'s' * (self.checked != 1)} of {len(self.laws)}"
            verdict = "IS BROKEN" if not self.holds else "holds" if self.conclusive else "too little has moved to tell"
            head += f"{verdict} ({layers} checked)"
        table = [list(_HEADS)]
        for row in self.laws:
            why = f"{row.reason}: {row.order}" if row.order else row.reason
            still = row.checked and not row.conclusive
            mark = "BROKEN" if row.broken else "too little has moved to tell" if still else ""
            values = (row.drift, row.residual, row.leap, row.tolerance)
            numbers = ("-" if value is None else f"{value:.1e}" for value in values)
            text = "  ".join(filter(None, (mark, why)))
            cells = row.layer, _shortened(row.targets), row.form or "-", row.status, *numbers
            table.append([*cells, Loud(text) if mark else text])
        if not any(line[-1] for line in table[1:]):
            table = [line[:-1] for line in table]
        return Sheet(head=head, table=table, left=(0, 1, 2, 3, 8))

    def _size(self) -> tuple[float, float]:
        return 7.0, height_of(len(self.laws))

    def _draw(self, axes: Any) -> None:
        columns = ("drift", "residual", f"in {STRETCH}", "tolerance"), ("drift", "residual", "leap", "tolerance")
        series = [
            Points(label=label, values=[getattr(row, column) for row in self.laws])
            for label, column in zip(*columns, strict=True)
        ]
        remarks = ["BROKEN" if row.broken else "" if row.checked else f"law: {row.status}" for row in self.laws]
        names, xlabel = [row.layer for row in self.laws], "relative to the terms of C"
        dots(axes, names, series, xlabel=xlabel, title="conservation law", remarks=remarks, logarithmic=True)


def rows_of(
    laws: Sequence[Law],
    balances: dict[str, Balance],
    changes: dict[str, tuple[Tensor, Tensor]],
    residuals: dict[str, Tensor],
) -> tuple[LawRow, ...]:
    """Make a row a layer, of its neuron with the largest number relative to the size of the terms of C."""

    def largest(values: dict[str, Tensor], name: str) -> float | None:
        return float((values[name].abs() / balances[name].size()).max()) if name in values else None

    drifts = {name: incoming - outgoing for name, (incoming, outgoing) in changes.items()}
    moved = {name: incoming.abs() + outgoing.abs() for name, (incoming, outgoing) in changes.items()}
    worst = {law.name: balances[law.name].worst() for law in laws if law.holds_exactly}
    return tuple(
        LawRow(
            layer=law.name, targets=", ".join(law.targets), form=law.form, status=law.status, reason=law.reason,
            order=law.order, neurons=law.neurons, drift=largest(drifts, law.name),
            residual=largest(residuals, law.name), moved=largest(moved, law.name),
            leap=worst[law.name][0] if law.name in worst else None,
            tolerance=worst[law.name][1] if law.name in worst else None,
        )
        for law in laws
    )  # fmt: skip


def _shortened(targets: str) -> str:
    """Name the first of many layers, and how many more there are."""
    names = targets.split(", ")
    return targets if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
