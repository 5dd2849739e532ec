"""Deep fully connected networks, many at once, with the backward pass of every rule written out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_floating, describe, named, non_negative, positive, step_count
from falign.theory._coerce import public, typed
from falign.theory.conservation._rules import FeedbackRule, rule

# Activations that are activations, ``φ(z) = φ'(z) z``: those under which the conservation law holds.


@typed
@dataclass(frozen=True, kw_only=True)
class Activation:
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

ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(name="linear", value=lambda z: z, slope=torch.ones_like, smooth=True),
        Activation(name="relu", value=torch.relu, slope=lambda z: (z > 0).to(z.dtype)),
        Activation(
            name="leaky",
            value=lambda z: torch.where(z > 0, z, _LEAK * z),
            slope=lambda z: (z > 0).to(z.dtype) * (1 - _LEAK) + _LEAK,
        ),
        Activation(name="abs", value=torch.abs, slope=torch.sign),
    )
}
"""name -> activation; ``leaky`` has slope 0.1 below 0."""


def activation(name: str) -> Activation:
    """Look up an activation by its name.

    Raises:
        ValueError: there is none.
    """
    return named("activation", name, ACTIVATIONS)


# Losses as means over the batch, and the error ``∂L/∂f`` that the output hands back.


@typed
@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss of the outputs f [runs n k] and targets y [n k].

    Attributes:
        name: What the table calls it.
        value: (f, y) -> the loss of each point, [runs n].
        slope: (f, y) -> its derivative in f, [runs n k].
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    @public
    def mean(self, f: Float[Tensor, "runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, " runs"]:
        """The loss ``L``, a mean over the points."""
        return self.value(f, y).mean(-1)

    @public
    def error(self, f: Float[Tensor, "runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, "runs n k"]:
        """``δ = ∂L/∂f``, the 1/n of the mean included."""
        return self.slope(f, y) / f.shape[-2]


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(name="squared", value=lambda f, y: (f - y).square().sum(-1) / 2, slope=lambda f, y: f - y),
        Loss(
            name="softmax",
            value=lambda f, y: -(y * f.log_softmax(-1)).sum(-1),
            slope=lambda f, y: y.sum(-1, keepdim=True) * f.softmax(-1) - y,
        ),
        Loss(
            name="logistic",
            value=lambda f, y: torch.nn.functional.softplus(-y * f).sum(-1),
            slope=lambda f, y: -y * torch.sigmoid(-y * f),
        ),
    )
}
"""``squared``: ½|f - y|². ``softmax``: cross-entropy, y class probabilities. ``logistic``: y = ±1, outputs summed."""


def loss(name: str) -> Loss:
    """Look up a loss by its name.

    Raises:
        ValueError: there is none.
    """
    return named("loss", name, LOSSES)


# Refusals of layers that do not fit each other, and of data and batches that do not fit a network.


def check_layers(W: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Refuse weights [runs out in] that are no chain, and biases of other shapes.

    Raises:
        ValueError: they do not fit.
    """
    shapes, biases = [tuple(part.shape) for part in W], [tuple(part.shape) for part in b]
    chained = bool(shapes) and all(len(shape) == 3 for shape in shapes)
    chained = chained and all(one[:2] == (other[0], other[2]) for one, other in pairwise(shapes))
    if not chained or (biases and biases != [shape[:2] for shape in shapes]):
        raise ValueError(f"weights {shapes} and biases {biases} are no network: expected [runs out in] and [runs out]")


def check_inputs(W: Tensor, X: Tensor) -> None:
    """Refuse inputs of another shape or type than the first layer's.

    Raises:
        ValueError: they do not fit.
    """
    check_floating(inputs=X)
    if X.ndim not in (2, 3) or X.shape[-1] != W.shape[-1] or (X.ndim == 3 and len(X) not in (1, len(W))):
        raise ValueError(
            f"inputs have shape {tuple(X.shape)}, the network wants (points, {W.shape[-1]}) for all of its "
            f"{len(W)} runs or for each"
        )
    if X.dtype != W.dtype:
        raise ValueError(f"inputs are {X.dtype}, the weights {W.dtype}: pass X.to(W.dtype)")


def check_targets(f: Tensor, y: Tensor) -> None:
    """Refuse targets of another shape than the outputs.

    Raises:
        ValueError: they do not fit.
    """
    check_floating(targets=y)
    if y.ndim not in (2, 3) or y.shape[-2:] != f.shape[-2:] or (y.ndim == 3 and len(y) not in (1, len(f))):
        raise ValueError(f"targets have shape {tuple(y.shape)}, the outputs {tuple(f.shape)}: one row a point")


def count_steps(steps: int | Tensor, n: int) -> int:
    """Count steps, given their number or, as a tensor [steps batch], the indices of each batch's points among n.

    Raises:
        ValueError: the number is not whole or negative, or an index is not whole or out of range.
    """
    if not isinstance(steps, Tensor):
        return step_count(steps)
    indices = not steps.is_floating_point() and not steps.is_complex() and steps.dtype != torch.bool
    if steps.ndim != 2 or not indices or (steps.numel() and not 0 <= int(steps.min()) <= int(steps.max()) < n):
        raise ValueError(f"batches of shape {tuple(steps.shape)} must be [steps batch] whole numbers below {n}")
    return len(steps)


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
        check_layers(self.W, self.b)
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
        activation: φ of the hidden layers.
        rule: How the error returns.
        loss: Of the output.
        rates: r_l, one number or one a layer.
        decays: λ_l, one number or one a layer; of weights and biases, and of learned feedback.
        tracking: ρ of ``adafa``, whose α a step is ηρ.

    Raises:
        ValueError: a rate is not positive, a decay or ρ is negative, or activation, rule or loss is only a name.
    """

    activation: Activation = field(default_factory=lambda: activation("relu"))
    rule: FeedbackRule = field(default_factory=lambda: rule("fa"))
    loss: Loss = field(default_factory=lambda: loss("squared"))
    rates: float | tuple[float, ...] = 1.0
    decays: float | tuple[float, ...] = 0.0
    tracking: float = 1.0

    def __post_init__(self) -> None:
        for name, part, kind in (
            ("activation", self.activation, Activation),
            ("rule", self.rule, FeedbackRule),
            ("loss", self.loss, Loss),
        ):
            if not isinstance(part, kind):
                raise ValueError(
                    f"{name} is {describe(part)}, expected what {name}(name) gives: a value of {kind.__name__}"
                )
        for rate in self.rates if isinstance(self.rates, tuple) else (self.rates,):
            positive("a layer's rate", rate)  # the law divides by it
        decays = self.decays if isinstance(self.decays, tuple) else (self.decays,)
        for name, value in (*(("a decay", decay) for decay in decays), ("tracking", self.tracking)):
            non_negative(name, value)

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
    check_targets(f, y)
    return dynamics.loss.mean(f, y)


@public
def gradients(state: State, dynamics: Dynamics, X: Points, y: Points, *, true: bool = False) -> State:
    """``ĝ_l = δ_lᵀ h_{l-1}`` of all layers, ``δ_l = φ'(z_l) ⊙ (δ_{l+1} M_{l+1})`` or, direct, ``φ'(z_l) ⊙ (δ_L D_l)``.

    Args:
        state: The network.
        dynamics: Its activation, rule and loss.
        X: Inputs of the batch.
        y: Targets.
        true: The loss's own gradient, M = W.

    Returns:
        Gradients in the place of W and b; no feedback.
    """
    inputs, sums = _forward(state, dynamics, X)
    check_targets(sums[-1], y)
    errors = [dynamics.loss.error(sums[-1], y)]
    matrices = state.W[1:] if true else feedback_matrices(state, dynamics)
    for layer in range(state.depth - 2, -1, -1):
        above = errors[-1] if true or not dynamics.rule.direct else errors[0]
        errors.append(dynamics.activation.slope(sums[layer]) * (above @ matrices[layer]))
    errors.reverse()
    return State(
        W=tuple(error.mT @ h for error, h in zip(errors, inputs, strict=True)),
        b=tuple(error.sum(-2) for error in errors) if state.b else (),
    )


def feedback_matrices(state: State, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """M of hidden layers 1, …, L - 1: what carries an error to each."""
    if dynamics.rule.direct:
        return stored_feedback(state, dynamics)
    pairs = zip(stored_feedback(state, dynamics), state.W[1:], strict=True)
    return tuple(dynamics.rule.feedback_matrix(B, W) for B, W in pairs)


def stored_feedback(state: State, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """B as the rule stores it, for hidden layers 1, …, L - 1; W where the rule stores none.

    Raises:
        ValueError: the state has no such feedback.
    """
    if dynamics.rule.init_feedback is None and not state.B:
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
    check_layers(state.W, state.b)
    check_inputs(state.W[0], X)
    inputs, sums = [X.expand(state.W[0].shape[0], *X.shape[-2:])], []
    for layer, W in enumerate(state.W):
        z = inputs[-1] @ W.mT
        sums.append(z + state.b[layer].unsqueeze(-2) if state.b else z)
        if layer < state.depth - 1:
            inputs.append(dynamics.activation.value(sums[-1]))
    return inputs, sums
