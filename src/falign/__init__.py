"""Train PyTorch networks without weight transport: feedback alignment and its relatives."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falign import feedback, init, layers, measure, rules, transforms  # noqa: F401  # attributes that are not all in __all__
    from falign._convert import (
        ConversionError,
        backprop,
        calibrate,
        check,
        convert,
        feedback_state,
        load_feedback_state,
        revert,
        targets,
    )
    from falign._jacobian import follow
    from falign._mirror import mirror
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
    "calibrate",
    "check",
    "convert",
    "feedback_state",
    "follow",
    "init",
    "load_feedback_state",
    "measure",
    "mirror",
    "revert",
    "targets",
    "transport",
    "verify",
]

# Names are imported when they are first used: the command's help, and whatever needs another module of this package,
# would otherwise wait seconds for PyTorch.
_SUBMODULES = ("feedback", "init", "layers", "measure", "rules", "transforms")
_MODULES = {
    **dict.fromkeys(("ALL_RULES", "Rule"), "falign.rules"),
    "follow": "falign._jacobian",
    "mirror": "falign._mirror",
    **dict.fromkeys(("Transported", "transport"), "falign._transport"),
    **dict.fromkeys(("Verification", "verify"), "falign._verify"),
}
"""{name: module that defines it} of the names of ``__all__`` that are not from ``falign._convert``."""


def __getattr__(name: str) -> Any:
    """Import a public name, or one of the public submodules (PEP 562)."""
    if name in _SUBMODULES:
        return import_module(f"falign.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'falign' has no attribute {name!r}", name=name)
    value = getattr(import_module(_MODULES.get(name, "falign._convert")), name)
    globals()[name] = value  # it is not asked for again
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
