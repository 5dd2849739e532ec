"""The conservation law of a model's neurons, found and checked while it trains."""

from falign.measure.law._conservation import ConservationLaw
from falign.measure.law._laws import Law
from falign.measure.law._report import LawReport, LawRow
from falign.measure.law._trace import Connection, Followed, follow

__all__ = ["Connection", "ConservationLaw", "Followed", "Law", "LawReport", "LawRow", "follow"]
