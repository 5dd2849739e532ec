"""Which numbers a mode may have, and the sentences that refuse others."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from falign.theory.inputs import numbers


def finite(name: str, given: Any) -> Tensor:
    """Finite numbers, in float64 unless a tensor says otherwise.

    Raises:
        ValueError: they are no numbers, one is not finite, or they are in less than float32.
    """
    found = given.detach() if isinstance(given, Tensor) and given.is_floating_point() else numbers(name, given).double()
    if found.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name} is in {found.dtype}, expected float32 or float64: pass .float() of it")
    if not found.isfinite().all():
        raise ValueError(f"{name} holds {float(found[~found.isfinite()].flatten()[0])}, expected finite numbers")
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
