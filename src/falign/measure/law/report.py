"""What the law says of a training, as a table."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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
        return sum(row.status in ("exact", "accounted") for row in self.laws)

    @property
    def holds(self) -> bool:
        """Whether every law that is exact or accounted for holds; true where there is none."""
        return not any(self._broken(row) for row in self.laws)

    def __bool__(self) -> bool:
        return self.holds

    def _broken(self, row: LawRow) -> bool:
        residual = row.residual
        return row.status in ("exact", "accounted") and not (residual is not None and residual <= self.tolerance)

    def rows(self) -> list[dict[str, Any]]:
        """A dict a layer."""
        return [asdict(row) for row in self.laws]

    def to_polars(self) -> "pl.DataFrame":
        """A row a layer.

        Raises:
            ImportError: polars is not installed.
        """
        return frame(self.rows())

    def __str__(self) -> str:
        head = f"conservation law after {self.steps} step{'s' * (self.steps != 1)}: "
        if not self.checked:
            head += "it holds exactly of no layer"
        else:
            layers = f"{self.checked} layer{'s' * (self.checked != 1)} of {len(self.laws)}"
            head += f"{'holds' if self.holds else 'IS BROKEN'} ({layers} checked, tolerance {self.tolerance:.0e})"
        table = [["layer", "feeds", "C of a neuron", "law", "drift", "residual", "why not exact: drift expected"]]
        for row in self.laws:
            why = f"{row.reason}: {row.order}" if row.order else row.reason
            mark = "BROKEN  " if self._broken(row) else ""
            numbers = ("-" if value is None else f"{value:.1e}" for value in (row.drift, row.residual))
            table.append([row.layer, _shortened(row.targets), row.form or "-", row.status, *numbers, mark + why])
        if not any(line[-1] for line in table[1:]):
            table = [line[:-1] for line in table]
        return "\n".join([head, *aligned(table, left=(0, 1, 2, 3, 6))])


def _shortened(targets: str) -> str:
    """The first of many layers, and how many more there are."""
    names = targets.split(", ")
    return targets if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
