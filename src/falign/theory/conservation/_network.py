"""Deep fully connected networks, a block of runs at once, with the backward pass of every rule written out.

The backward pass is written out, not left to autograd, so that the theory is a check of the rules of ``falign.convert``
that shares no code with them.
"""

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

# Activations with ``φ(z) = φ'(z) z``, homogeneous of degree one: the conservation law holds for these alone.


@typed
@dataclass(frozen=True, kw_only=True)
class Activation:
    """An activation φ, elementwise.

    Attributes:
        name: Its key in ``ACTIVATIONS``.
        value: z -> φ(z).
        slope: z -> φ'(z), with ``slope(z) z = value(z)`` everywhere if the law is to hold.
        smooth: Whether φ' is continuous, so that gradient flow can be integrated with long steps.
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


# Losses, means over the batch, and the error ``∂L/∂f`` at the output.


@typed
@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss of the outputs f [runs n k] and targets y [n k].

    Attributes:
        name: Its key in ``LOSSES``.
        value: (f, y) -> the loss of each point, [runs n].
        slope: (f, y) -> its derivative in f, [runs n k].
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    @public
    def mean(self, f: Float[Tensor, "runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, " runs"]:
        """Return the loss ``L``, a mean over the points."""
        return self.value(f, y).mean(-1)

    @public
    def error(self, f: Float[Tensor, "runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, "runs n k"]:
        """Return ``δ = ∂L/∂f``, the 1/n of the mean included."""
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


# Networks and how they learn.

Points = Float[Tensor, "*#runs n _"]
"""Inputs, or targets, of all runs alike [n d] or of each [runs n d]."""


class State(NamedTuple):
    """Weights, biases and feedback of a block of runs; their velocities and gradients are States as well.

    Attributes:
        W: W_1, …, W_L [runs out in].
        b: Their biases [runs out]; empty where there are none.
        B: Feedback as the rule stores it, of hidden layers 1, …, L - 1: that of layer l has W_{l+1}'s shape, or is
            [runs outputs neurons] under a direct rule.
    """

    W: tuple[Float[Tensor, "runs _ _"], ...]
    b: tuple[Float[Tensor, "runs _"], ...] = ()
    B: tuple[Float[Tensor, "runs _ _"], ...] = ()

    def map(self, change: Callable[..., Tensor], *others: "State") -> "State":
        """Apply ``change`` to every tensor, together with those in its place in the other States."""
        places = zip(self, *others, strict=True)
        return State(*(tuple(change(*tensors) for tensors in zip(*parts, strict=True)) for parts in places))

    def check(self) -> None:
        """Refuse weights and biases that are no chain; numbers of runs and formats are checked by the annotations."""
        check_layers(self.W, self.b)

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return len(self.W)


@typed
@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """The dynamics of learning: ``Ẇ_l = -r_l (ĝ_l + λ_l W_l)``, biases likewise; a step is η times that.

    ĝ_l is the gradient as the rule computes it.

    Attributes:
        activation: φ of the hidden layers.
        rule: The rule by which the error returns.
        loss: The loss of the output.
        rates: r_l, one number or one a layer.
        decays: λ_l of weights, biases and learned feedback, one number or one a layer.
        tracking: ρ, the rate at which the feedback of ``adafa`` follows the weights; its α a step is ηρ.

    Raises:
        ValueError: a rate is not positive, a decay or ρ is negative, or activation, rule or loss is a name and not
            what ``activation(name)``, ``rule(name)`` or ``loss(name)`` returns.
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
        """Return (r_1, …, r_L) and (λ_1, …, λ_L).

        Raises:
            ValueError: the number of rates or decays is not the number of layers.
        """
        return self._a_layer("rates", self.rates, state.depth), self._a_layer("decays", self.decays, state.depth)

    @staticmethod
    def _a_layer(name: str, value: float | tuple[float, ...], depth: int) -> tuple[float, ...]:
        if not isinstance(value, tuple):
            return (value,) * depth
        if len(value) != depth:
            raise ValueError(f"{len(value)} {name} for {depth} layers: pass one number, or one a layer")
        return value


@public
def output(state: State, dynamics: Dynamics, X: Points) -> Float[Tensor, "runs n k"]:
    """Return the outputs f at the inputs."""
    return _forward(state, dynamics, X)[1][-1]


@public
def loss_of(state: State, dynamics: Dynamics, X: Points, y: Points) -> Float[Tensor, " runs"]:
    """Return the mean loss of every run, without weight decay."""
    f = output(state, dynamics, X)
    check_targets(f, y)
    return dynamics.loss.mean(f, y)


@public
def gradients(state: State, dynamics: Dynamics, X: Points, y: Points, *, true: bool = False) -> State:
    """Return the gradients ``ĝ_l = δ_lᵀ h_{l-1}`` as the rule computes them, or the loss's own.

    ``δ_l = φ'(z_l) ⊙ (δ_{l+1} M_{l+1})`` with the feedback matrix M of the layer above; under a direct rule
    ``δ_l = φ'(z_l) ⊙ (δ_L M_l)`` with the error of the output.

    Args:
        state: The network.
        dynamics: Its activation, rule and loss.
        X: Inputs of the batch.
        y: Targets.
        true: Return the loss's own gradients, those of backpropagation (M = W).

    Returns:
        Gradients in the place of W and b; B is empty.
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
    """Return M of hidden layers 1, …, L - 1: the matrix that takes the error to each of them."""
    if dynamics.rule.direct:
        return stored_feedback(state, dynamics)
    pairs = zip(stored_feedback(state, dynamics), state.W[1:], strict=True)
    return tuple(dynamics.rule.feedback_matrix(B, W) for B, W in pairs)


def stored_feedback(state: State, dynamics: Dynamics) -> tuple[Tensor, ...]:
    """Return B of hidden layers 1, …, L - 1 as the rule stores it; W of a rule that stores none.

    Raises:
        ValueError: the state has no such feedback.
    """
    if dynamics.rule.init_feedback is None and not state.B:
        return state.W[1:]
    top = state.W[-1].shape[-2]
    expected = [(top, W.shape[-1]) if dynamics.rule.direct else tuple(W.shape[-2:]) for W in state.W[1:]]
    if (shapes := [tuple(B.shape[-2:]) for B in state.B]) != expected:
        raise ValueError(
            f"feedback has shapes {shapes}, {dynamics.rule.name!r} wants {expected}: draw the state with the same "
            "dynamics"
        )
    return state.B


@public
def velocity(state: State, dynamics: Dynamics, X: Points, y: Points) -> State:
    """Return Ẇ, ḃ and Ḃ of gradient flow."""
    rates, decays = dynamics.of_layers(state)
    descent = gradients(state, dynamics, X, y)
    W = tuple(-r * (g + k * w) for r, k, g, w in zip(rates, decays, descent.W, state.W, strict=True))
    b = tuple(-r * (g + k * w) for r, k, g, w in zip(rates, decays, descent.b, state.b, strict=False))
    decay_rates = [r * k for r, k in zip(rates, decays, strict=True)]
    return State(W=W, b=b, B=_feedback_velocity(state, dynamics, W, decay_rates))


def _feedback_velocity(
    state: State, dynamics: Dynamics, dW: tuple[Tensor, ...], decay_rates: list[float]
) -> tuple[Tensor, ...]:
    if dynamics.rule.direct:
        return tuple(torch.zeros_like(B) for B in state.B)
    layers = zip(state.B, state.W[1:], dW[1:], decay_rates[1:], strict=False)  # B is empty if the rule stores none
    return tuple(dynamics.rule.motion(B, W, dW, decay, dynamics.tracking) for B, W, dW, decay in layers)


def _forward(state: State, dynamics: Dynamics, X: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs h_0, …, h_{L-1} of the layers and the sums z_1, …, z_L."""
    check_layers(state.W, state.b)
    check_inputs(state.W[0], X)
    inputs, sums = [X.expand(state.W[0].shape[0], *X.shape[-2:])], []
    for layer, W in enumerate(state.W):
        z = inputs[-1] @ W.mT
        sums.append(z + state.b[layer].unsqueeze(-2) if state.b else z)
        if layer < state.depth - 1:
            inputs.append(dynamics.activation.value(sums[-1]))
    return inputs, sums


# Checks that layers fit each other, and data and batches a network.


def check_layers(W: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Refuse weights [runs out in] that are no chain, and biases of other shapes."""
    shapes, biases = [tuple(part.shape) for part in W], [tuple(part.shape) for part in b]
    chained = bool(shapes) and all(len(shape) == 3 for shape in shapes)
    chained = chained and all(one[:2] == (other[0], other[2]) for one, other in pairwise(shapes))
    if not chained or (biases and biases != [shape[:2] for shape in shapes]):
        raise ValueError(f"weights {shapes} and biases {biases} are no network: expected [runs out in] and [runs out]")


def check_inputs(W: Tensor, X: Tensor) -> None:
    """Refuse inputs of another shape or type than the first layer W takes."""
    check_floating(inputs=X)
    if X.ndim not in (2, 3) or X.shape[-1] != W.shape[-1] or (X.ndim == 3 and len(X) not in (1, len(W))):
        raise ValueError(
            f"inputs have shape {tuple(X.shape)}, the network wants (points, {W.shape[-1]}) for all of its "
            f"{len(W)} runs or for each"
        )
    if X.dtype != W.dtype:
        raise ValueError(f"inputs are {X.dtype}, the weights {W.dtype}: pass X.to(W.dtype)")


def check_targets(f: Tensor, y: Tensor) -> None:
    """Refuse targets y of another shape than the outputs f."""
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
