"""Train PyTorch networks without weight transport: feedback alignment and its relatives."""

from falign import init, measure
from falign._convert import (
    ConversionError,
    backprop,
    check,
    convert,
    feedback_state,
    load_feedback_state,
    revert,
    targets,
)
from falign._transport import Transported, transport
from falign._verify import Verification, verify
from falign.rules import ALL_RULES, Rule

__version__ = "0.1.0"

__all__ = [
    "ALL_RULES",
    "ConversionError",
    "Rule",
    "Transported",
    "Verification",
    "__version__",
    "backprop",
    "check",
    "convert",
    "feedback_state",
    "init",
    "load_feedback_state",
    "measure",
    "revert",
    "targets",
    "transport",
    "verify",
]
