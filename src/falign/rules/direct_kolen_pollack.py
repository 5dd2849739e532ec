"""Direct Kolen-Pollack: direct feedback that learns from what a layer sees and from the output's error."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules._direct import DirectRule

__all__ = ["DirectKolenPollack"]


@dataclass(frozen=True, kw_only=True)
class DirectKolenPollack(DirectRule):
    """Direct feedback whose matrix is a readout of its layer's input, trained with the output's error.

    ``error at x_l = e B_l`` as under ``dfa``; B_l (outputs, features of x_l) is a parameter whose gradient is
    ``Σ eᵀ x_l``, the correlation of the two that its synapses see. For the last layer that is the gradient of W itself
    (Kolen-Pollack); for the others B_l takes the steps of a linear readout of x_l that would be trained with the
    network's error in place of its own.

    Args:
        positions: as for ``dfa``.

    Needs: an optimizer made from ``model.parameters()`` after ``convert``. Limits: B is (outputs, features), a readout
    a layer; B learns also where its layer's weight is frozen.

    Source: Webster, Choi and Ahn 2021 (Learning the connections in direct feedback alignment).
    """

    name: ClassVar[str] = "dkp"
    learned: ClassVar[bool] = True
    size: ClassVar[float] = 0.5
