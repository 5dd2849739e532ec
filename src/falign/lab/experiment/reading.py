"""What is read off the table of an experiment: figures, and claims beside what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import polars as pl
from matplotlib.figure import Figure


class Missing(LookupError):  # noqa: N818  # it is an answer, not a fault
    """A claim cannot be read: which runs the table lacks."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as a function of the table.

    Args:
        name: A short name of letters, digits and hyphens.
        caption: What is seen, in a sentence or two; where the paper has such a figure, its number.
        data: Table of the runs that were done -> what is drawn, which the report also offers as CSV.
        draw: What is drawn -> the figure.
    """

    name: str
    caption: str
    data: Callable[[pl.DataFrame], pl.DataFrame]
    draw: Callable[[pl.DataFrame], Figure]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A number beside the interval in which it should lie.

    Args:
        label: What the number is, such as "p = 1000".
        measured: The number.
        low: The interval's lower end.
        high: Its upper end.
    """

    label: str
    measured: float
    low: float = -inf
    high: float = inf

    @property
    def holds(self) -> bool:
        """Whether the number lies in the interval, ends included; NaN does not."""
        return bool(self.low <= self.measured <= self.high)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was measured for a claim, which holds if all its checks do.

    Args:
        checks: At least one.
        note: What else a reader should know, such as how many runs were read.
    """

    checks: tuple[Check, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.checks:
            raise ValueError("a reading without a check judges nothing: raise Missing if the table lacks the runs")

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper states, beside how it is measured.

    Args:
        name: A short name of letters, digits and hyphens.
        statement: What the paper states.
        place: Where it states it; or where else the statement comes from.
        how: How the number is read off the table.
        because: Why the interval is what it is: standard errors, a known scaling, a value of the paper.
        read: Table of the runs -> what was measured; raises Missing if these runs cannot tell. It is only called
            when every run of the scope is done.
        scope: Of which points the claim is about, as an expression of their columns; None is all.
    """

    name: str
    statement: str
    place: str
    how: str
    because: str
    read: Callable[[pl.DataFrame], Reading]
    scope: pl.Expr | None = None


@dataclass(frozen=True)
class Choice:
    """An ambiguity of a paper, the reading that was taken, and what depends on it."""

    question: str
    taken: str
