"""How claims are read off groups of runs."""

from collections.abc import Iterator, Sequence

import polars as pl

from falign.lab.experiment import Check, Reading


def groups(table: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[str, pl.DataFrame]]:
    """(such as "digits, fa, r = 8", its rows) of each group, sorted."""
    for values, own in table.sort(by).group_by(by, maintain_order=True):
        words = (
            value if isinstance(value, str) else f"{name} = {value:.4g}" for name, value in zip(by, values, strict=True)
        )
        yield ", ".join(words), own


def most(table: pl.DataFrame, value: pl.Expr, by: Sequence[str], high: float, note: str = "") -> Reading:
    """The largest value of each group beside a limit."""
    rows = table.with_columns(value=value)
    return Reading(
        checks=tuple(
            Check(label=f"{label}: most", measured=float(own["value"].to_numpy().max()), high=high)
            for label, own in groups(rows, by)
        ),
        note=note,
    )
