"""Experiments: what is run, where its runs are kept, and how what a paper states is read off them."""

from falign.lab.experiment._specification import (
    PRESETS,
    Check,
    Choice,
    Claim,
    Experiment,
    Missing,
    Outcome,
    Paper,
    Picture,
    Point,
    Reading,
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
