"""What can be recorded of a network on its way, by name, and the record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.conservation import law
from falign.theory.conservation.network import Dynamics, State, gradients, loss_of
from falign.theory.inputs import listed, told

Measurement = Callable[[State, Dynamics, Tensor, Tensor], Tensor]


def _descent(state: State, dynamics: Dynamics, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per layer [runs layers], biases included: what both gradients are and agree on, and D."""
    true, taken = gradients(state, dynamics, X, y, true=True), gradients(state, dynamics, X, y)
    rates = state.W[0].new_tensor(dynamics.of_layers(state)[0])
    descent, square = _dot(true, taken), _dot(true, true)
    return {
        "descent": descent,
        "gradient_norm": square.sqrt(),
        "taken_norm": _dot(taken, taken).sqrt(),
        "dominance": (rates * descent)[:, :-1].sum(-1) / (rates * square)[:, -1],
    }


def _dot(one: State, other: State) -> Float[Tensor, "runs layers"]:
    """Inner products of two gradients, a layer's weights and bias together."""
    weights = torch.stack([(a * b).sum((-1, -2)) for a, b in zip(one.W, other.W, strict=True)], -1)
    if not one.b:
        return weights
    return weights + torch.stack([(a * b).sum(-1) for a, b in zip(one.b, other.b, strict=True)], -1)


def _part(name: str) -> Measurement:
    return lambda state, dynamics, X, y: _descent(state, dynamics, X, y)[name]


ACCOUNT = "account"
"""What the exact identity says that C has gained since the start [runs neurons]: kept on the way."""

MEASUREMENTS: dict[str, Measurement] = {
    "loss": loss_of,
    "incoming": lambda state, dynamics, X, y: law.incoming(state, dynamics),
    "potential": lambda state, dynamics, X, y: law.potential(state, dynamics),
    "invariant": lambda state, dynamics, X, y: law.invariant(state, dynamics),
    "alignment": lambda state, dynamics, X, y: law.alignment(state, dynamics),
    "map": lambda state, dynamics, X, y: reduce(lambda below, W: W @ below, state.W),
    **{name: _part(name) for name in ("descent", "gradient_norm", "taken_norm", "dominance")},
}
"""name -> what it is at a state.

``loss`` and ``dominance`` D [runs]; ``incoming`` P, ``potential`` V,
``invariant`` C and ``alignment`` ⟨M, W⟩ [runs neurons]; ``descent`` ⟨g_l, f_l⟩, ``gradient_norm`` |g_l| and
``taken_norm`` |f_l| [runs layers], of a layer's weights and bias. Where layers differ in rate, D weighs each
by its own. ``map`` W_L…W_1 [runs outputs inputs]: with the linear gate and without biases, what the network computes.
"""


def known(names: Sequence[str]) -> dict[str, Measurement]:
    """Those of ``MEASUREMENTS`` that are named.

    Raises:
        ValueError: a name is unknown.
    """
    names = listed("names", names)
    for name in names:
        if not isinstance(name, str) or (name not in MEASUREMENTS and name != ACCOUNT):
            raise ValueError(f"unknown measurement {told(name)}: choose from {', '.join(MEASUREMENTS)}, {ACCOUNT}")
    return {name: MEASUREMENTS[name] for name in names if name != ACCOUNT}


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a block of runs went through.

    Attributes:
        dynamics: How it learned.
        start: Where from.
        end: Where to.
        rate: η of the steps; 0 in gradient flow.
        times: Recorded times [times]; of steps, η times their number.
        values: name -> [runs times …]: those asked for.
    """

    dynamics: Dynamics
    start: State
    end: State
    rate: float
    times: Float[Tensor, " times"]
    values: Mapping[str, Float[Tensor, "runs times ..."]]

    def __getitem__(self, name: str) -> Tensor:
        """The recorded values of that name.

        Raises:
            ValueError: it was not recorded.
        """
        if name not in self.values:
            raise ValueError(
                f"{told(name)} was not recorded, only {', '.join(self.values)}: name it when the run is made"
            )
        return self.values[name]
