"""Measurements of a model that learns by a rule: its errors beside the true gradient, and the law that says why."""

from falign._jacobian import feedback_cosines, mean_jacobian
from falign.measure._alignment import alignment, gradient_angles
from falign.measure._angles import angle
from falign.measure._compare import Comparison, SuppliedLayer, compare
from falign.measure._consistency import Consistency, LayerConsistency, consistency
from falign.measure._monitor import Logger, Monitor
from falign.measure._report import Alignment, LayerAlignment
from falign.measure.law import ConservationLaw, Law, LawReport, LawRow

__all__ = [
    "Alignment",
    "Comparison",
    "ConservationLaw",
    "Consistency",
    "Law",
    "LawReport",
    "LawRow",
    "LayerAlignment",
    "LayerConsistency",
    "Logger",
    "Monitor",
    "SuppliedLayer",
    "alignment",
    "angle",
    "compare",
    "consistency",
    "feedback_cosines",
    "gradient_angles",
    "mean_jacobian",
]
