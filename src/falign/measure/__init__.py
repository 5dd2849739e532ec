"""Measurements of a model that learns by a rule: its errors beside the true gradient, and the law that says why."""

from falign.measure._alignment import alignment, gradient_angles
from falign.measure._angles import angle
from falign.measure._monitor import Monitor
from falign.measure._report import Alignment, LayerAlignment
from falign.measure.law import ConservationLaw, Law, LawReport, LawRow

__all__ = [
    "Alignment",
    "ConservationLaw",
    "Law",
    "LawReport",
    "LawRow",
    "LayerAlignment",
    "Monitor",
    "alignment",
    "angle",
    "gradient_angles",
]
