"""Deep fully connected networks, many at once, with the backward pass of every rule written out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.conservation.fits import fits_inputs, fits_layers, fits_targets
from falign.theory.conservation.gates import Gate, gate
from falign.theory.conservation.losses import Loss, loss
from falign.theory.conservation.rules import FeedbackRule, rule
from falign.theory.door import public, typed
from falign.theory.inputs import number, told

Points = Float[Tensor, "*#runs n _"]
"""Inputs, or targets, of all runs alike [n d] or of each [runs n d]."""


class State(NamedTuple):
    """Weights, biases and feedback of a block of runs; velocities and gradients have the same form.

    Attributes:
        W: W_1, …, W_L [runs out in].
        b: Their biases [runs out]; empty where there are none.
        B: Feedback as the rule stores it, that of layer l at place l: of W_{l+1}'s shape for l = 1, …, L - 1, or
            [runs outputs neurons] for a direct rule.
    """

    W: tuple[Float[Tensor, "runs _ _"], ...]
    b: tuple[Float[Tensor, "runs _"], ...] = ()
    B: tuple[Float[Tensor, "runs _ _"], ...] = ()

    def map(self, change: Callable[..., Tensor], *others: "State") -> "State":
        """``change`` of every tensor and of those in its place in the others."""
        places = zip(self, *others, strict=True)
        return State(*(tuple(change(*tensors) for tensors in zip(*parts, strict=True)) for parts in places))

    def fits(self, name: str) -> None:
        """Refuse weights that are no chain, and biases or feedback of other numbers of runs or other number formats.

        Raises:
            ValueError: a layer does not fit the others.
        """
        fits_layers(self.W, self.b)
        first, parts = self.W[0], (*self.W, *self.b, *self.B)
        if any(
            part.ndim < 2 or len(part) != len(first) or (part.dtype, part.device) != (first.dtype, first.device)
            for part in parts
        ):
            kinds = [f"{list(part.shape)} {part.dtype} on {part.device}" for part in parts]
            raise ValueError(f"layers of {name} are {', '.join(kinds)}: expected one number of runs, format and device")

    @property
    def depth(self) -> int:
        """L."""
        return len(self.W)


@typed
@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """How a network learns: ``Ẇ_l = -r_l (ĝ_l + λ_l W_l)``, biases likewise; in steps, η times that.

    Attributes:
        gate: φ of the hidden layers.
        rule: How the error returns.
        loss: Of the output.
        rates: r_l, one number or one a layer.
        decays: λ_l, one number or one a layer; of weights and biases, and of learned feedback.
        tracking: ρ of ``adafa``, whose α a step is ηρ.

    Raises:
        ValueError: a rate is not positive, a decay or ρ is negative, or gate, rule or loss is only a name.
    """

    gate: Gate = field(default_factory=lambda: gate("relu"))
    rule: FeedbackRule = field(default_factory=lambda: rule("fa"))
    loss: Loss = field(default_factory=lambda: loss("squared"))
    rates: float | tuple[float, ...] = 1.0
    decays: float | tuple[float, ...] = 0.0
    tracking: float = 1.0

    def __post_init__(self) -> None:
        for name, part, kind in (
            ("gate", self.gate, Gate),
            ("rule", self.rule, FeedbackRule),
            ("loss", self.loss, Loss),
        ):
            if not isinstance(part, kind):
                raise ValueError(f"{name} is {told(part)}, expected a {kind.__name__}, such as {name}(name) gives")
        for rate in self.rates if isinstance(self.rates, tuple) else (self.rates,):
            if not (number(rate) and rate > 0):
                raise ValueError(f"a layer's rate is {told(rate)}, expected a positive number: the law divides by it")
        decays = self.decays if isinstance(self.decays, tuple) else (self.decays,)
        for name, value in (*(("a decay", decay) for decay in decays), ("tracking", self.tracking)):
            if not (number(value) and value >= 0):
                raise ValueError(f"{name} is {told(value)}, expected a number of at least 0")

    @public
    def of_layers(self, state: State) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(r_1, …, r_L), (λ_1, …, λ_L).

        Raises:
            ValueError: there are as many rates or decays as there are no layers.
        """
        found = []
        for name, value in (("rates", self.rates), ("decays", self.decays)):
            given = value if isinstance(value, tuple) else (value,) * state.depth
            if len(given) != state.depth:
                raise ValueError(f"{len(given)} {name} for {state.depth} layers: pass one number, or one a layer")
            found.append(given)
        return found[0], found[1]


@public
def output(state: State, dynamics: Dynamics, X: Points) -> Float[Tensor, "runs n k"]:
    """The outputs f at the inputs."""
    return _forward(state, dynamics, X)[1][-1]


@public
def loss_of(state: State, dynamics: Dynamics, X: Points, y: Points) -> Float[Tensor, " runs"]:
    """The mean loss, without any penalty."""
    f = output(state, dynamics, X)
    fits_targets(f, y)
    return dynamics.loss.mean(f, y)


@public
def gradients(state: State, dynamics: Dynamics, X: Points, y: Points, *, true: bool = False) -> State:
    """``ĝ_l = δ_lᵀ h_{l-1}`` of all layers, ``δ_l = φ'(z_l) ⊙ (δ_{l+1} M_{l+1})`` or, direct, ``φ'(z_l) ⊙ (δ_L D_l)``.

    Args:
        state: The network.
        dynamics: Its gate, rule and loss.
        X: Inputs of the batch.
        y: Targets.
        true: The loss's own gradient, M = W.

    Returns:
        Gradients in the place of W and b; no feedback.
    """
    inputs, sums = _forward(state, dynamics, X)
    fits_targets(sums[-1], y)
    errors = [dynamics.loss.error(sums[-1], y)]
    matrices = state.W[1:] if true else carriers(state, dynamics)
    for layer in range(state.depth - 2, -1, -1):
        above = errors[-1] if true or not dynamics.rule.direct else errors[0]
        errors.append(dynamics.gate.slope(sums[layer]) * (above @ matrices[layer]))
    errors.reverse()
    return State(
        W=tuple(error.mT @ h for error, h in zip(errors, inputs, strict=True)),
        b=tuple(error.sum(-2) for error in errors) if state.b else (),
    )


def carriers(state: State, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """M of hidden layers 1, …, L - 1: what carries an error to each."""
    if dynamics.rule.direct:
        return stored(state, dynamics)
    pairs = zip(stored(state, dynamics), state.W[1:], strict=True)
    return tuple(dynamics.rule.effective(B, W) for B, W in pairs)


def stored(state: State, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """B as the rule stores it, for hidden layers 1, …, L - 1; W where the rule stores none.

    Raises:
        ValueError: the state has no such feedback.
    """
    if dynamics.rule.stored is None and not state.B:
        return state.W[1:]
    top = state.W[-1].shape[-2]
    wanted = [(top, W.shape[-1]) if dynamics.rule.direct else tuple(W.shape[-2:]) for W in state.W[1:]]
    if (found := [tuple(B.shape[-2:]) for B in state.B]) != wanted:
        raise ValueError(
            f"feedback has shapes {found}, {dynamics.rule.name!r} wants {wanted}: draw the state with the same dynamics"
        )
    return state.B


@public
def velocity(state: State, dynamics: Dynamics, X: Points, y: Points) -> State:
    """Ẇ, ḃ and Ḃ of gradient flow."""
    rates, decays = dynamics.of_layers(state)
    taken = gradients(state, dynamics, X, y)
    W = tuple(-r * (g + k * w) for r, k, g, w in zip(rates, decays, taken.W, state.W, strict=True))
    b = tuple(-r * (g + k * w) for r, k, g, w in zip(rates, decays, taken.b, state.b, strict=False))
    pulls = [r * k for r, k in zip(rates, decays, strict=True)]
    return State(W=W, b=b, B=_feedback_motion(state, dynamics, W, pulls))


def _feedback_motion(
    state: State, dynamics: Dynamics, dW: tuple[Tensor, ...], pulls: list[float]
) -> tuple[Tensor, ...]:
    if dynamics.rule.direct:
        return tuple(torch.zeros_like(B) for B in state.B)
    parts = zip(state.B, state.W[1:], dW[1:], pulls[1:], strict=False)
    return tuple(dynamics.rule.motion(B, W, change, pull, dynamics.tracking) for B, W, change, pull in parts)


def _forward(state: State, dynamics: Dynamics, X: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs h_0, …, h_{L-1} of the layers and their sums z_1, …, z_L."""
    fits_layers(state.W, state.b)
    fits_inputs(state.W[0], X)
    inputs, sums = [X.expand(state.W[0].shape[0], *X.shape[-2:])], []
    for layer, W in enumerate(state.W):
        z = inputs[-1] @ W.mT
        sums.append(z + state.b[layer].unsqueeze(-2) if state.b else z)
        if layer < state.depth - 1:
            inputs.append(dynamics.gate.value(sums[-1]))
    return inputs, sums
