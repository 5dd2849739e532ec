"""The hidden layer's activations ψ, their derivatives, and the facts about them that theorems ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from math import e, inf, isfinite, pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import named
from falign.theory._coerce import public, typed


@typed
@dataclass(frozen=True, kw_only=True)
class Activation:
    """An activation ψ, elementwise.

    Attributes:
        name: What the tables and the command line call it.
        value: u -> ψ(u).
        slope: (u, ψ(u)) -> ψ'(u): from the value where that is cheaper, as 1 - ψ² for tanh.
        smooth: Whether ψ is twice continuously differentiable.
        bounds: sup|ψ|, sup|ψ'|, sup|ψ''|; ``inf`` where there is none. For relu the third is meant away from 0.
        into: (u, out): writes ψ(u) to ``out``, in as few passes over memory as there are; None leaves it to ``value``.
        carry: (b, u, ψ(u), out): writes ``ψ'(u) ⊙ b`` to ``out`` likewise, b broadcast; None leaves it to ``slope``.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    smooth: bool
    bounds: tuple[float, float, float]
    into: Callable[[Tensor, Tensor], object] | None = None
    carry: Callable[[Tensor, Tensor, Tensor, Tensor], object] | None = None

    @typed
    def write(self, u: Float[Tensor, "..."], out: Float[Tensor, "..."]) -> None:
        """Write ``ψ(u)`` to ``out``."""
        if self.into is None:
            out.copy_(self.value(u))
        else:
            self.into(u, out)

    @typed
    def write_carried(
        self, b: Float[Tensor, "..."], u: Float[Tensor, "..."], value: Float[Tensor, "..."], out: Float[Tensor, "..."]
    ) -> None:
        """Write ``ψ'(u) ⊙ b`` to ``out``, ``value`` being ψ(u)."""
        if self.carry is None:
            torch.mul(self.slope(u, value), b, out=out)
        else:
            self.carry(b, u, value, out)

    @public
    def derivative(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``ψ'(u)``; relu has 0 at 0."""
        return self.slope(u, self.value(u))

    @public
    def both(self, u: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """``ψ(u)`` and ``ψ'(u)`` from one evaluation."""
        value = self.value(u)
        return value, self.slope(u, value)

    @property
    def bounded(self) -> bool:
        """Tell whether ψ, ψ' and ψ'' are all bounded, as theorem 3.2 wants beside smoothness."""
        return all(isfinite(bound) for bound in self.bounds)


_ATEN = torch.ops.aten


def _same(u: Tensor) -> Tensor:
    return u


def _copy(u: Tensor, out: Tensor) -> None:
    if u is not out:
        out.copy_(u)


def _erf_carry(b: Tensor, u: Tensor, value: Tensor, out: Tensor) -> None:
    torch.mul(u, u, out=out).neg_().exp_().mul_(b * (2 / sqrt(pi)))


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(
            name="identity",
            value=_same,
            slope=lambda u, value: torch.ones_like(u),
            smooth=True,
            bounds=(inf, 1.0, 0.0),
            into=_copy,
            carry=lambda b, u, value, out: out.copy_(b.expand_as(out)),
        ),
        Activation(
            name="relu",
            value=torch.relu,
            slope=lambda u, value: (u > 0).to(u.dtype),
            smooth=False,
            bounds=(inf, 1.0, 0.0),
            into=lambda u, out: torch.clamp_min(u, 0, out=out),
            carry=lambda b, u, value, out: _ATEN.leaky_relu_backward.grad_input(
                b.expand_as(u), u, 0.0, False, grad_input=out
            ),
        ),
        Activation(
            name="tanh",
            value=torch.tanh,
            slope=lambda u, value: 1 - value * value,
            smooth=True,
            bounds=(1.0, 1.0, 4 / sqrt(27)),
            into=lambda u, out: torch.tanh(u, out=out),
            carry=lambda b, u, value, out: _ATEN.tanh_backward.grad_input(b.expand_as(u), value, grad_input=out),
        ),
        Activation(
            name="sigmoid",
            value=torch.sigmoid,
            slope=lambda u, value: value * (1 - value),
            smooth=True,
            bounds=(1.0, 1 / 4, 1 / sqrt(108)),
            into=lambda u, out: torch.sigmoid(u, out=out),
            carry=lambda b, u, value, out: _ATEN.sigmoid_backward.grad_input(b.expand_as(u), value, grad_input=out),
        ),
        Activation(
            name="erf",
            value=torch.erf,
            slope=lambda u, value: torch.exp(-u * u) * (2 / sqrt(pi)),
            smooth=True,
            bounds=(1.0, 2 / sqrt(pi), sqrt(8 / (pi * e))),
            into=lambda u, out: torch.erf(u, out=out),
            carry=_erf_carry,
        ),
    )
}
"""name -> activation."""


def activation(name: str) -> Activation:
    """Look up an activation by its name.

    Raises:
        ValueError: there is none.
    """
    return named("activation", name, ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class AffineForm:
    """``ψ(u) = scale φ(stretch u) + shift``: an engine that keeps ``stretch u`` and φ saves passes over memory.

    Attributes:
        inner: φ.
        stretch: Factor inside.
        scale: Factor outside.
        shift: Added outside.
    """

    inner: Activation
    stretch: float = 1.0
    scale: float = 1.0
    shift: float = 0.0


def fastest_form(psi: Activation, like: Tensor) -> AffineForm:
    """Choose the form that is fastest on that tensor's dtype and device.

    In float32 on a CPU tanh is 2σ(2u) - 1, to 2e-7 absolute: the library's sigmoid takes a sixth of its tanh.
    """
    if psi.name == "tanh" and like.dtype == torch.float32 and like.device.type == "cpu":
        return AffineForm(inner=ACTIVATIONS["sigmoid"], stretch=2.0, scale=2.0, shift=-1.0)
    return AffineForm(inner=psi)


# Losses, and the error e = -∂loss/∂f that each sends back.


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss over points and outputs.

    Attributes:
        name: ``squared`` or ``softmax``.
        error: (f, y) -> e, per point: what the loss of one point sends back, the sign being that of y - f.
        value: (f, y) -> loss, the two last axes (points, outputs) reduced.
        averaged: Whether the loss is a mean over the points, and the step hence divided by their number.
    """

    name: str
    error: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    averaged: bool


def _squared(f: Float[Tensor, "*runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, "*runs"]:
    return (y - f).square().sum((-1, -2)) / 2


def _cross_entropy(f: Float[Tensor, "*runs n k"], y: Float[Tensor, "*#runs n k"]) -> Float[Tensor, "*runs"]:
    return -(y * f.log_softmax(-1)).sum(-1).mean(-1)


LOSSES: dict[str, Loss] = {
    "squared": Loss(name="squared", error=lambda f, y: y - f, value=_squared, averaged=False),
    "softmax": Loss(name="softmax", error=lambda f, y: y - torch.softmax(f, -1), value=_cross_entropy, averaged=True),
}
"""``squared``: ½ Σ|y - f|², a sum. ``softmax``: cross-entropy of softmax(f) with the class probabilities y, a mean."""


def loss(name: str) -> Loss:
    """Look up a loss by its name.

    Raises:
        ValueError: there is none.
    """
    return named("loss", name, LOSSES)
