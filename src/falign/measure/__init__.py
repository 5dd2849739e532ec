"""How well what a rule does agrees with the true gradient, and the law that says why."""

from falign.measure.alignment import alignment, gradient_angles
from falign.measure.angles import angle
from falign.measure.law import ConservationLaw, Law, LawReport, LawRow
from falign.measure.monitor import Monitor
from falign.measure.report import Alignment, LayerAlignment

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
