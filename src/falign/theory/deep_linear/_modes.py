"""The scalar chains to which a deep linear network reduces: their velocity, error, invariants and rate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import Numbers, as_list, float_tensor, one_of
from falign.theory._coerce import public, typed

# Checks of the numbers that a mode may have.

_LARGEST = 1e100
"""Of a number given: the product of three such is still one in float64, which ends at 1e308."""

DEEPEST = 1000
"""Layers up to which 2^L is a number in float64."""


def finite(name: str, given: Any) -> Tensor:
    """Check numbers to be finite and of a bearable size; in float64 unless a tensor says otherwise.

    Raises:
        ValueError: they are no numbers, one is not finite, or they are in less than float32.
    """
    values = float_tensor(name, given)
    if not values.isfinite().all():
        raise ValueError(f"{name} holds {float(values[~values.isfinite()].flatten()[0])}, expected finite numbers")
    beyond = values.abs() > _LARGEST
    if beyond.any():
        raise ValueError(
            f"{name} holds {float(values[beyond].flatten()[0]):g}, expected sizes up to {_LARGEST:g}: products of "
            "larger weights are no numbers any more"
        )
    return values


def _check_range(values: Mapping[str, Tensor]) -> None:
    """Refuse λ < 0, a variance that is not positive, and feedback m of 0.

    Raises:
        ValueError: there is one.
    """
    for name, value in values.items():
        if name == "λ":
            bad, wanted = value < 0, "at least 0: flip the sign of λ and of θ_1 together, which changes nothing else"
        elif name == "the variance":
            bad, wanted = value <= 0, "above 0: an input direction without variance is not learned"
        else:
            bad, wanted = (value == 0) & name.startswith("m_"), "other than 0: B must be of full rank"
        if bad.any():
            raise ValueError(f"{name} is {float(value[bad].flatten()[0]):g}, expected {wanted}")


Rule: TypeAlias = Literal["fa", "dfa", "bp"]
"""Feedback alignment, direct feedback alignment, gradient descent."""


@typed
@dataclass(frozen=True, kw_only=True)
class Modes:
    """Linear networks with one neuron a layer, many at once, each a mode of a network that is diagonal in fixed bases.

    ``e = λ - s θ_L…θ_1`` and ``θ_l' = c_l θ_{l-1}…θ_1 e``, where c_l carries the error to layer l:
    ``m_{l+1}…m_L`` (fa), ``m_{l+1}`` (dfa), ``θ_{l+1}…θ_L`` (bp), and ``c_L = 1``.

    ``modes`` makes and checks them.

    Attributes:
        rule: How the error returns.
        weights: θ_1, …, θ_L [layers *modes].
        feedback: m_2, …, m_L [layers-1 *modes]: of fa, what carries an error from layer l to the one below; of dfa,
            from the output to layer l - 1; of bp, not used.
        target: λ, the mode's share of Σ_yx [*modes].
        variance: s, the mode's share of Σ_xx [*modes].

    Source: derived, after Girotti, Mitliagkas and Gidel 2021.
    """

    rule: Rule
    weights: Float[Tensor, "layers *modes"]
    feedback: Float[Tensor, "layers-1 *modes"]
    target: Float[Tensor, "*modes"]
    variance: Float[Tensor, "*modes"]

    @property
    def depth(self) -> int:
        """L."""
        return len(self.weights)

    @typed
    def at(self, weights: Float[Tensor, "layers *modes"]) -> "Modes":
        """The same modes with other weights."""
        return replace(self, weights=weights)

    def flat(self) -> "Modes":
        """The same modes along one axis, on the CPU."""
        return self._each(lambda part, axes: part.detach().cpu().reshape(*part.shape[:axes], -1))

    @typed
    def take(self, chosen: Tensor | slice) -> "Modes":
        """Select some of the modes along one axis."""
        return self._each(lambda part, _: part[..., chosen])

    def double(self) -> "Modes":
        """The same modes in float64."""
        return self._each(lambda part, _: part.double())

    def _each(self, change: Callable[[Tensor, int], Tensor]) -> "Modes":
        """Change every tensor, by a function of it and of how many axes it has before those of the modes."""
        return Modes(
            rule=self.rule,
            weights=change(self.weights, 1),
            feedback=change(self.feedback, 1),
            target=change(self.target, 0),
            variance=change(self.variance, 0),
        )

    @property
    def product(self) -> Float[Tensor, "*modes"]:
        """``θ_L…θ_1``."""
        return self.weights.prod(0)

    @property
    def error(self) -> Float[Tensor, "*modes"]:
        """``e = λ - s θ_L…θ_1``."""
        return self.target - self.variance * self.product

    @property
    def loss(self) -> Float[Tensor, "*modes"]:
        """``e²/(2s)``: what the mode adds to the mean ½|f - y|² above what no linear map can fit."""
        return self.error.square() / (2 * self.variance)

    @property
    def below(self) -> Float[Tensor, "layers *modes"]:
        """``θ_{l-1}…θ_1`` of every layer, 1 for the first."""
        return torch.cat([torch.ones_like(self.weights[:1]), self.weights[:-1].cumprod(0)])

    @property
    def above(self) -> Float[Tensor, "layers *modes"]:
        """``θ_{l+1}…θ_L`` of every layer, 1 for the last."""
        return _suffix(self.weights[1:])

    @property
    def feedback_factors(self) -> Float[Tensor, "layers *modes"]:
        """c_l of every layer."""
        if self.rule == "bp":
            return self.above
        if self.rule == "fa":
            return _suffix(self.feedback)
        return torch.cat([self.feedback, torch.ones_like(self.weights[:1])])

    @property
    def velocity(self) -> Float[Tensor, "layers *modes"]:
        """``θ_l' = c_l θ_{l-1}…θ_1 e``."""
        return self.feedback_factors * self.below * self.error

    @property
    def decay_rate(self) -> Float[Tensor, "*modes"]:
        """ρ of the exact error equation ``e' = -ρe``: ``s Σ_l c_l (θ_{l-1}…θ_1)² θ_{l+1}…θ_L``. It may be negative."""
        return self.variance * (self.feedback_factors * self.below.square() * self.above).sum(0)

    @property
    def invariants(self) -> Float[Tensor, "links *modes"]:
        """``K_l = (c_l/c_{l+1}) θ_{l+1} - θ_l²/2``, constant in gradient flow; of bp ``(θ_{l+1}² - θ_l²)/2``.

        For fa the factor is m_{l+1}. Of two layers, ``K_1 = m K`` with ``K = θ_2 - θ_1²/(2m)``.
        """
        lower, upper = self.weights[:-1], self.weights[1:]
        if self.rule == "bp":
            return (upper.square() - lower.square()) / 2
        feedback_factors = self.feedback_factors
        return feedback_factors[:-1] / feedback_factors[1:] * upper - lower.square() / 2


@public
def modes(
    target: Numbers,
    weights: Numbers | Sequence[Numbers],
    *,
    feedback: Numbers | Sequence[Numbers] = 1.0,
    variance: Numbers = 1.0,
    rule: Rule = "fa",
) -> Modes:
    """Make modes from numbers that are broadcast against each other, in float64 unless λ and all θ are tensors of less.

    Modes are on the CPU, wherever the numbers come from: a step is a few operations a mode, and what a step costs on a
    GPU is its start.

    Args:
        target: λ ≥ 0; a mode with λ < 0 is the one with -λ and -θ_1.
        weights: θ_1, …, θ_L, at least two, each of all modes; or a table of them [layers *modes].
        feedback: m ≠ 0, one for all layers or m_2, …, m_L.
        variance: s > 0.
        rule: fa, dfa or bp.

    Raises:
        ValueError: a number is not finite or out of range, or the error of a mode is; shapes do not fit, or the rule is
            unknown.
    """
    one_of("rule", rule, get_args(Rule))
    tabled = getattr(weights, "ndim", 1) > 1
    layers = list(cast(Tensor, weights)) if tabled else as_list("weights", weights)
    if len(layers) < 2:
        raise ValueError(f"{len(layers)} weights were given, expected θ_1, …, θ_L of at least two layers")
    back = list(feedback) if isinstance(feedback, (list, tuple)) else [feedback] * (len(layers) - 1)
    if len(back) != len(layers) - 1:
        raise ValueError(
            f"{len(back)} feedback weights for {len(layers)} layers, expected {len(layers) - 1}, or one number, not in "
            "a list"
        )
    given = {
        "λ": target,
        "the variance": variance,
        **{f"θ_{layer}": value for layer, value in enumerate(layers, 1)},
        **{f"m_{layer}": value for layer, value in enumerate(back, 2)},
    }
    values = {name: finite(name, value) for name, value in given.items()}
    _check_range(values)
    try:
        parts = torch.broadcast_tensors(*values.values())
    except RuntimeError:
        shapes = [tuple(part.shape) for part in values.values()]
        raise ValueError(
            f"λ, s, θ and m have shapes {shapes}, which do not broadcast: pass one number a mode"
        ) from None
    # Feedback and variance, plain numbers as a rule, have no say in the format.
    kind = reduce(torch.promote_types, [values[name].dtype for name in values if name == "λ" or name.startswith("θ")])
    together = torch.stack([part.to("cpu", kind) for part in parts])
    made = Modes(
        rule=rule,
        weights=together[2 : 2 + len(layers)],
        feedback=together[2 + len(layers) :],
        target=together[0],
        variance=together[1],
    )
    if not made.error.isfinite().all():
        raise ValueError(f"λ - s θ_L…θ_1 of a mode is beyond {kind}: scale the weights or the data")
    return made


def _suffix(factors: Tensor) -> Tensor:
    """Products of each row and all after it, and a row of ones at the end."""
    return torch.cat([factors.flip(0).cumprod(0).flip(0), torch.ones_like(factors[:1])])
