"""The conservation law of a model's neurons, found and checked while it trains."""

from falign.measure.law.conservation import ConservationLaw
from falign.measure.law.follow import Connection, Followed, follow
from falign.measure.law.laws import Law
from falign.measure.law.report import LawReport, LawRow

__all__ = ["Connection", "ConservationLaw", "Followed", "Law", "LawReport", "LawRow", "follow"]
