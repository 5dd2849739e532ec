"""Activations that are gates, ``φ(z) = φ'(z) z``: those under which the conservation law holds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from falign.theory.door import typed
from falign.theory.inputs import told


@typed
@dataclass(frozen=True, kw_only=True)
class Gate:
    """An activation φ, elementwise.

    Attributes:
        name: What the table calls it.
        value: z -> φ(z).
        slope: z -> φ'(z), with ``slope(z) z = value(z)`` everywhere if the law is to hold.
        smooth: Whether φ' is continuous: gradient flow is then an ordinary differential equation.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    smooth: bool = False


_LEAK = 0.1

GATES: dict[str, Gate] = {
    gate.name: gate
    for gate in (
        Gate(name="linear", value=lambda z: z, slope=torch.ones_like, smooth=True),
        Gate(name="relu", value=torch.relu, slope=lambda z: (z > 0).to(z.dtype)),
        Gate(
            name="leaky",
            value=lambda z: torch.where(z > 0, z, _LEAK * z),
            slope=lambda z: (z > 0).to(z.dtype) * (1 - _LEAK) + _LEAK,
        ),
        Gate(name="abs", value=torch.abs, slope=torch.sign),
    )
}
"""name -> gate; ``leaky`` has slope 0.1 below 0."""


def gate(name: str) -> Gate:
    """The gate of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in GATES:
        raise ValueError(f"unknown gate {told(name)}: choose one of {', '.join(GATES)}")
    return GATES[name]
