"""Experiments: what is run, where its runs are kept, and how what a paper states is read off them."""

from falign.lab.experiment.reading import Check, Choice, Claim, Missing, Picture, Reading
from falign.lab.experiment.specification import (
    PRESETS,
    Experiment,
    Outcome,
    Paper,
    Point,
    Scalar,
    Setting,
    Task,
    grid,
)

__all__ = [
    "PRESETS",
    "Check",
    "Choice",
    "Claim",
    "Experiment",
    "Missing",
    "Outcome",
    "Paper",
    "Picture",
    "Point",
    "Reading",
    "Scalar",
    "Setting",
    "Task",
    "grid",
]
