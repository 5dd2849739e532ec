"""Experiments: functions of a grid's axes, a store of their runs, and a paper's claims, read off these."""

from falign.lab.experiment._specification import (
    PRESETS,
    Check,
    Claim,
    Evidence,
    Experiment,
    Interpretation,
    LazyExperiments,
    Missing,
    Outcome,
    Paper,
    Picture,
    Point,
    Scalar,
    Setting,
    Task,
    grid,
)

__all__ = [
    "PRESETS",
    "Check",
    "Claim",
    "Evidence",
    "Experiment",
    "Interpretation",
    "LazyExperiments",
    "Missing",
    "Outcome",
    "Paper",
    "Picture",
    "Point",
    "Scalar",
    "Setting",
    "Task",
    "grid",
]
