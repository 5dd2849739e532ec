"""Which numbers a mode may have, and the sentences that refuse others."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from falign.theory.inputs import floating

_LARGEST = 1e100

DEEPEST = 1000
"""Layers up to which 2^L is a number in float64."""


def finite(name: str, given: Any) -> Tensor:
    """Finite numbers, in float64 unless a tensor says otherwise.

    Raises:
        ValueError: they are no numbers, one is not finite, or they are in less than float32.
    """
    found = floating(name, given)
    if not found.isfinite().all():
        raise ValueError(f"{name} holds {float(found[~found.isfinite()].flatten()[0])}, expected finite numbers")
    beyond = found.abs() > _LARGEST
    if beyond.any():
        raise ValueError(
            f"{name} holds {float(found[beyond].flatten()[0]):g}, expected sizes up to {_LARGEST:g}: products of "
            "larger weights are no numbers any more"
        )
    return found


def in_range(found: Mapping[str, Tensor]) -> None:
    """Refuse λ < 0, a variance that is not positive, and feedback m of 0.

    Raises:
        ValueError: there is one.
    """
    for name, value in found.items():
        if name == "λ":
            bad, wanted = value < 0, "at least 0: flip the sign of λ and of θ_1 together, which changes nothing else"
        elif name == "the variance":
            bad, wanted = value <= 0, "above 0: an input direction without variance is not learned"
        else:
            bad, wanted = (value == 0) & name.startswith("m_"), "other than 0: B must be of full rank"
        if bad.any():
            raise ValueError(f"{name} is {float(value[bad].flatten()[0]):g}, expected {wanted}")
