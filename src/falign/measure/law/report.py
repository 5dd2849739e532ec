"""What the law says of a training, as a table."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from falign.measure.law.balance import Balance
from falign.measure.law.laws import Law
from falign.measure.report import aligned, frame

if TYPE_CHECKING:
    import polars as pl


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
        residual: The same of what the identity does not account for.
        moved: The same of how far ½|w|² + ½b² and the alignment term moved, added; what little of it is left in the
            residual shows that the law holds.
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

    @property
    def checked(self) -> bool:
        """Whether the residual should be rounding."""
        return self.status in ("exact", "accounted")

    def told(self, tolerance: float) -> bool:
        """Whether the terms of C have moved by so much that a residual within the tolerance says something."""
        moved, residual = self.moved or 0.0, self.residual or 0.0
        return moved > tolerance or residual < moved / 10


@dataclass(frozen=True, kw_only=True)
class LawReport:
    """The law of a model's neurons after some steps; true where it holds, and prints as a table.

    Attributes:
        steps: Steps of the optimizer since the start.
        tolerance: The largest relative residual that rounding explains: 1e-10 in float64, 1e-4 in float32, 5e-2 where
            a shorter type was at work.
        laws: A row a layer, in running order.
    """

    steps: int
    tolerance: float
    laws: tuple[LawRow, ...]

    @property
    def checked(self) -> int:
        """How many laws are exact or accounted for."""
        return sum(row.checked for row in self.laws)

    @property
    def told(self) -> bool:
        """Whether weights have moved enough in some law that is exact or accounted for; else ``holds`` says nothing."""
        return any(self._tells(row) for row in self.laws)

    @property
    def holds(self) -> bool:
        """Whether no law that is exact or accounted for is broken; true as well where there is none, see ``told``."""
        return not any(self._broken(row) for row in self.laws)

    def __bool__(self) -> bool:
        return self.holds

    def _broken(self, row: LawRow) -> bool:
        residual = row.residual
        return row.checked and not (residual is not None and residual <= self.tolerance)

    def _tells(self, row: LawRow) -> bool:
        return row.checked and (self._broken(row) or row.told(self.tolerance))

    def rows(self) -> list[dict[str, Any]]:
        """A dict a layer, with "told": whether its weights have moved enough to tell; None where C is not exact."""
        return [asdict(row) | {"told": self._tells(row) if row.checked else None} for row in self.laws]

    def to_polars(self) -> "pl.DataFrame":
        """A row a layer.

        Raises:
            ImportError: polars is not installed.
        """
        return frame(self.rows())

    def __str__(self) -> str:
        head = f"conservation law after {self.steps} step{'s' * (self.steps != 1)}: "
        if not self.laws:
            return head + "no layer of this model feeds another, so there is nothing to check"
        if not self.checked:
            head += "it holds exactly of no layer"
        else:
            layers = f"{self.checked} layer{'s' * (self.checked != 1)} of {len(self.laws)}"
            verdict = "IS BROKEN" if not self.holds else "holds" if self.told else "too little has moved to tell"
            head += f"{verdict} ({layers} checked, tolerance {self.tolerance:.0e})"
        table = [["layer", "feeds", "C of a neuron", "law", "drift", "residual", "why not exact: drift expected"]]
        for row in self.laws:
            why = f"{row.reason}: {row.order}" if row.order else row.reason
            still = row.checked and not self._tells(row)
            mark = (
                "BROKEN  " if self._broken(row) else "too little has moved to tell" + "  " * bool(why) if still else ""
            )
            numbers = ("-" if value is None else f"{value:.1e}" for value in (row.drift, row.residual))
            table.append([row.layer, _shortened(row.targets), row.form or "-", row.status, *numbers, mark + why])
        if not any(line[-1] for line in table[1:]):
            table = [line[:-1] for line in table]
        return "\n".join([head, *aligned(table, left=(0, 1, 2, 3, 6))])


def rows_of(
    laws: Iterable[Law],
    balances: dict[str, Balance],
    changes: dict[str, tuple[Tensor, Tensor]],
    residuals: dict[str, Tensor],
) -> tuple[LawRow, ...]:
    """A row a layer: the largest of its neurons, relative to the size of the terms of C."""

    def largest(values: dict[str, Tensor], name: str) -> float | None:
        return float((values[name].abs() / balances[name].size()).max()) if name in values else None

    drifts = {name: incoming - outgoing for name, (incoming, outgoing) in changes.items()}
    moved = {name: incoming.abs() + outgoing.abs() for name, (incoming, outgoing) in changes.items()}
    return tuple(
        LawRow(
            layer=law.name, targets=", ".join(law.targets), form=law.form, status=law.status, reason=law.reason,
            order=law.order, neurons=law.neurons, drift=largest(drifts, law.name),
            residual=largest(residuals, law.name), moved=largest(moved, law.name),
        )
        for law in laws
    )  # fmt: skip


def _shortened(targets: str) -> str:
    """The first of many layers, and how many more there are."""
    names = targets.split(", ")
    return targets if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
