"""A layer downstream of the neurons whose law is kept: its alignment term V, and what each step adds to it.

For a neuron k with the weights w into it and W[:, k] out of it, the law is ``C = ½|w|² + ½b² - Σ_t s_t V_t``, a term
V_t for every layer t that the neuron feeds. What V is depends on how the feedback follows the weights (``LawKind``).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from falign._attached import Feedback
from falign.measure.law._rates import Rates, descent_direction, differ
from falign.measure.law._weights import LinearMap, Neurons, Rows, cached
from falign.rules import LawKind

_PRIMES = str.maketrans({"w": "w'", "b": "b'"})


def factor_text(factor: float) -> str:
    """Write a factor before a term of C; 1 is left out."""
    return "" if abs(factor - 1) < 1e-9 else f"{factor:.4g}·"


def sum_text(terms: Iterable[str]) -> str:
    """Write a sum of terms; several that read alike are one with a Σ."""
    return " + ".join("Σ" * (count > 1) + term for term, count in Counter(terms).items())


def law_kind(part: Feedback | None, *, trained: bool) -> LawKind:
    """Find the kind of law of a layer from its feedback.

    Args:
        part: None where the error returns by backpropagation.
        trained: Whether the optimizer has the feedback as a parameter.
    """
    if part is None:
        return LawKind.WEIGHTS
    rule = part.wiring.rule
    kind = rule.law or (
        LawKind.LEARNED if rule.learned
        else LawKind.MOVING if rule.adapts or rule.advances
        else LawKind.PATH if rule.reads_weight
        else LawKind.STILL
    )  # fmt: skip
    return LawKind.STILL if kind is LawKind.LEARNED and not trained else kind


class Downstream:
    """A layer that a source feeds: V, and its changes, for each neuron of the source.

    V changes by ``⟨B, ΔW⟩`` in a step, to first order. Which sum has to be kept on the way depends on the law's kind:
    nothing where V itself says it (B fixed), ``-½ Σ |ΔW|²`` where V is ½|W|², and ``Σ ⟨B, ΔW⟩`` with the B of each
    pass where B changes, for the B of an earlier pass is gone.

    Attributes:
        kind: Of the law.
        mixed_passes: Whether several passes were behind one step, so that it is not known whose feedback was used.
        start: V at the start.
        step_sum: The sum that is kept, over the steps so far.
        expected_length: ``length`` as it must be if nothing but the steps has changed the weights.

    Args:
        linear: The layer's map.
        part: Its feedback; None where its error returns by backpropagation.
        columns: For every feature of its input the neuron of the source that it is, -1 for none.
        neurons: Number of the source's neurons.
        rates: The optimizer's.
    """

    def __init__(self, linear: LinearMap, part: Feedback | None, columns: Tensor, neurons: int, rates: Rates) -> None:
        self.map, self.name, self.part = linear, linear.name, part
        self.weight: Tensor = linear.weight.parameter
        self.kind = law_kind(part, trained=part is not None and part.matrix in rates)
        self._used = (columns >= 0).to(self.weight.device)
        self._columns = columns.to(self.weight.device)[self._used]
        self._neurons = neurons
        self._one_to_one = columns.tolist() == list(range(neurons))  # as in most networks: nothing to sum
        # Kolen-Pollack's V is ⟨B, W⟩ - s ½|W|² with s the rate of B over that of W: B moves s times as far as W.
        self._learned_ratio = 1.0 if self.kind is not LawKind.LEARNED else rates.ratio(self.learned, self.weight)
        self._passes = self._counted()
        self.mixed_passes = torch.zeros((), dtype=torch.bool, device=self.weight.device)
        self.start = self.zeros()
        self.step_sum = self.zeros()
        self.expected_length = self.zeros()

    @property
    def learned(self) -> Tensor:
        """The feedback as a parameter."""
        assert self.part is not None
        return self.part.matrix

    @property
    def parameters(self) -> list[Tensor]:
        """The weights out of the neurons, and the feedback where it is trained."""
        return [self.weight, self.learned] if self.kind is LawKind.LEARNED else [self.weight]

    @property
    def text(self) -> str:
        """V as text."""
        return self.kind.text.format(share=factor_text(self._learned_ratio))

    def paired_rates(self, rates: Rates) -> list[float]:
        """Rates whose ratio to the source's must stay that of the start."""
        return [rates[self.weight].rate]

    @property
    def rounding_growth(self) -> float:
        """Factor by which the layer enlarges rounding errors of its input."""
        return 1.0

    @property
    def motion(self) -> str:
        """Reason why C changes by more than ½Ση²|∇|², in words; empty if it does not."""
        return self.kind.motion

    def zeros(self) -> Float[Tensor, " neurons"]:
        """Zero for every neuron."""
        return torch.zeros(self._neurons, dtype=torch.float64, device=self.weight.device)

    def summed(self, features: Float[Tensor, " in"]) -> Float[Tensor, " neurons"]:
        """Sum over the features of each neuron: a flattened channel is many features."""
        return features if self._one_to_one else self.zeros().index_add(0, self._columns, features[self._used])

    def outgoing(self, what: str, pair: Callable[[], tuple[Tensor, Tensor]]) -> Float[Tensor, " neurons"]:
        """``⟨one[:, k], other[:, k]⟩`` over the weights out of each neuron k.

        Args:
            what: Name of the pair, under which the sum is cached.
            pair: Returns one and other, of the weight's shape.
        """
        return self.summed(cached((id(self.map), what), lambda: self.map.weight.outgoing(*pair())))

    def feedback(self) -> Tensor:
        """Return the matrix B of the latest pass; W where the error returns by backpropagation."""
        weight = self.weight.detach()
        return weight if self.part is None else self.part.feedback_matrix(weight).detach()

    def begin(self, rates: Rates) -> None:
        """Make the weights and rates of now the start."""
        if self.kind is LawKind.LEARNED:
            self._learned_ratio = rates.ratio(self.learned, self.weight)
        self.step_sum = self.zeros()
        self.start, self.expected_length = self.term(), self.length()

    def term(self) -> Float[Tensor, " neurons"]:
        """V now."""
        if self.kind is LawKind.PATH:
            return self.step_sum
        half = 0.5 * self._squared(self.weight) if self.kind in (LawKind.WEIGHTS, LawKind.LEARNED) else None
        if self.kind is LawKind.WEIGHTS and half is not None:
            return half
        aligned = self.outgoing("⟨B,W⟩", lambda: (self.feedback(), self.weight))
        return aligned if half is None else aligned - self._learned_ratio * half

    def size(self) -> Float[Tensor, " neurons"]:
        """``|B[:, k]| |W[:, k]|``, of the order of the terms that V is the sum of."""
        feedback = self.outgoing("|B|²", lambda: _twice(self.feedback()))
        return torch.maximum((feedback * self._squared(self.weight)).sqrt(), self.length())

    def spread(self) -> Float[Tensor, " neurons"]:
        """``Σ(∂V/∂p · p)²`` over the weights p out of each neuron, and a trained B: how rounding of p moves V."""
        weight = self.weight.detach()
        squares = self.outgoing("|BW|²", lambda: _twice(self.feedback() * weight))
        if self.kind is not LawKind.STILL:
            squares = squares + self.outgoing("|W²|²", lambda: _twice(weight.square()))
        return squares

    def length(self) -> Float[Tensor, " neurons"]:
        """``½|W[:, k]|²``, with that of a trained B; 0 where V itself is read from the weights.

        ``step_sum`` is made of gradients alone, so it would not notice weights that another hand has changed: their
        length does.
        """
        if self.kind in (LawKind.STILL, LawKind.WEIGHTS):
            return self.zeros()
        return self._sum(0.5 * self._squared(parameter) for parameter in self.parameters)

    def progress(self) -> Float[Tensor, " neurons"]:
        """``Σ⟨B[:, k], ΔW[:, k]⟩`` over the steps since the start, each with the B of its pass.

        A change of the weights by anything but the steps must show in it. If B is fixed, or W itself, V shows it; else
        the change of ½|W|² beyond what the steps explain is added.
        """
        if self.kind is LawKind.STILL:
            return self.term() - self.start
        if self.kind is LawKind.WEIGHTS:
            return self.term() - self.start + self.step_sum
        return self.step_sum + self.length() - self.expected_length

    def step(self, rates: Rates, reference: float, coefficient: float) -> Float[Tensor, " neurons"] | None:
        """Account for a step that is about to be made.

        Args:
            rates: Of the step.
            reference: Rate η of the source's weight in this step.
            coefficient: s, the coefficient of V in the law: the ratio of the rates η/η_W at the start.

        Returns:
            Change of C by weight decay, and by rates whose ratio is not s any more; None for none.
        """
        self._count()
        gradient, group = rates.gradient(self.weight), rates[self.weight]
        if gradient is None:
            return None
        odd = differ(coefficient * group.rate, reference)
        if self.kind is LawKind.STILL and not group.decay and not odd:
            return None
        change = self.zeros()
        if odd:  # η⟨w, ∇w⟩ and s η_W⟨B, ∇W⟩ cancel for the rates of the start alone
            change = (coefficient * group.rate - reference) * self.outgoing(
                "⟨B,∇⟩", lambda: (self.feedback(), gradient)
            )
        if group.decay:
            aligned = self.outgoing("⟨B,W⟩", lambda: (self.feedback(), self.weight))
            change = change + coefficient * group.rate * group.decay * aligned
        if self.kind is LawKind.WEIGHTS:  # ½|W|² gains ⟨W, ΔW⟩ + ½|ΔW|², of which only the first is V's first order
            squared = self.outgoing(
                f"|d|² {id(self.weight)}", lambda: _twice(descent_direction(self.weight, gradient, group))
            )
            self.step_sum = self.step_sum - 0.5 * group.rate**2 * squared
        elif self.kind is not LawKind.STILL:
            along = self.outgoing("⟨B,d⟩", lambda: (self.feedback(), descent_direction(self.weight, gradient, group)))
            self.step_sum = self.step_sum - group.rate * along
            self.expected_length = self.expected_length + self._sum(
                self._lengthened(one, rates) for one in self.parameters
            )
        return change

    def _lengthened(self, parameter: Tensor, rates: Rates) -> Tensor:
        """Change of ½|p|² in the step, for W and for a B that is trained."""
        gradient, group = rates.gradient(parameter), rates[parameter]
        if gradient is None:
            return self.zeros()
        squared = self.outgoing(f"|d|² {id(parameter)}", lambda: _twice(descent_direction(parameter, gradient, group)))
        along = self.outgoing(
            f"⟨p,d⟩ {id(parameter)}", lambda: (parameter, descent_direction(parameter, gradient, group))
        )
        return 0.5 * group.rate**2 * squared - group.rate * along

    def _squared(self, parameter: Tensor) -> Float[Tensor, " neurons"]:
        return self.outgoing(f"|p|² {id(parameter)}", lambda: (parameter, parameter))

    def _sum(self, values: Iterable[Tensor]) -> Tensor:
        return sum(values, self.zeros())

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that a resumed run needs."""
        return {
            "start": self.start,
            "step_sum": self.step_sum,
            "expected_length": self.expected_length,
            "learned_ratio": self._learned_ratio,
            "mixed_passes": self.mixed_passes,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self.start, self.step_sum, self.expected_length, self.mixed_passes = (
            state[key].to(self.weight.device, copy=True)
            for key in ("start", "step_sum", "expected_length", "mixed_passes")
        )
        self._learned_ratio, self._passes = state["learned_ratio"], None

    def _counted(self) -> Tensor | None:
        """Number of passes so far, for a rule that draws new feedback in each; else None."""
        passes = None if self.part is None else self.part._buffers.get("passes")
        return None if passes is None else passes.clone()

    def _count(self) -> None:
        """Notice several passes behind one step, each with other feedback: their gradients cannot be separated."""
        now = self._counted()
        if now is not None and self._passes is not None:
            self.mixed_passes = self.mixed_passes | (now - self._passes > 1)
        self._passes = now


def _twice(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor, tensor


# Neurons that a source is multiplied with, as queries are with keys: Σδq q = Σδk k, whatever comes after.


class Partner(Downstream):
    """Neurons with which those of a source are multiplied: V is their own ``½|w|² + ½b²``.

    A score ``Σ_k q_k k_k`` is linear in the queries and in the keys, so the sums of error × value of both are the same
    in every batch, whatever is done with the score and whatever feedback returned the error to it: no B is between.
    ``V`` then changes by ``½|Δw|²`` beyond the first order, as that of backpropagation.

    Args:
        partner: The neurons.
        places: For each of them the neuron of the source that it is multiplied with, -1 for none.
        neurons: Number of the source's neurons.
        rates: The optimizer's.
    """

    def __init__(self, partner: Neurons, places: Tensor, neurons: int, rates: Rates) -> None:
        super().__init__(partner.maps[0], None, places, neurons, rates)
        self.name, self.kind, self.partner = partner.name, LawKind.PARTNER, partner
        self._ratios = [1.0 for _ in partner.parts]

    @property
    def parameters(self) -> list[Tensor]:
        """All weights and biases into the partner."""
        return [part.parameter for part in self.partner.parts]

    @property
    def text(self) -> str:
        """V as text, with the partner's weights as w' and b'."""
        parts = zip(self._ratios, self.partner.parts, strict=True)
        return f"({sum_text(factor_text(ratio) + part.text for ratio, part in parts)})".translate(_PRIMES)

    def paired_rates(self, rates: Rates) -> list[float]:
        """Rates of all its parameters, each relative to that of the start."""
        return [ratio * rates[one].rate for ratio, one in zip(self._ratios, self.parameters, strict=True)]

    def begin(self, rates: Rates) -> None:
        """Make the weights and rates of now the start."""
        self._ratios = [rates.ratio(self.weight, parameter) for parameter in self.parameters]
        super().begin(rates)

    def term(self) -> Float[Tensor, " neurons"]:
        """V now."""
        return 0.5 * self._total(lambda parameter: (parameter, parameter))

    def size(self) -> Float[Tensor, " neurons"]:
        """V itself."""
        return self.term()

    def spread(self) -> Float[Tensor, " neurons"]:
        """``Σ(∂V/∂p · p)²`` over its weights p."""
        return self._total(lambda parameter: _twice(parameter.detach().square()), power=2)

    def length(self) -> Float[Tensor, " neurons"]:
        """Zero: V is read from the weights themselves."""
        return self.zeros()

    def progress(self) -> Float[Tensor, " neurons"]:
        """``Σ⟨w, Δw⟩`` over the steps since the start."""
        return self.term() - self.start + self.step_sum

    def step(self, rates: Rates, reference: float, coefficient: float) -> Float[Tensor, " neurons"] | None:
        """Account for a step that is about to be made."""
        change = self.zeros()
        for ratio, part in zip(self._ratios, self.partner.parts, strict=True):
            parameter, group = part.parameter, rates[part.parameter]
            gradient = rates.gradient(parameter)
            if gradient is None:
                continue
            direction = descent_direction(parameter, gradient, group)
            self.step_sum = self.step_sum - 0.5 * ratio * group.rate**2 * self._sums(part, direction, direction)
            rate = coefficient * ratio * group.rate
            if differ(rate, reference):
                change = change + (rate - reference) * self._sums(part, parameter, gradient)
            if group.decay:
                change = change + rate * group.decay * self._sums(part, parameter, parameter)
        return change

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that a resumed run needs."""
        return {**super().state(), "ratios": list(self._ratios)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        super().load(state)
        self._ratios = list(state["ratios"])

    def _total(self, pair: Callable[[Tensor], tuple[Tensor, Tensor]], power: int = 1) -> Float[Tensor, " neurons"]:
        """Sum a product of each parameter's over the partner's weights, times its ratio to a power."""
        pairs = zip(self._ratios, self.partner.parts, strict=True)
        return self._sum(ratio**power * self._sums(part, *pair(part.parameter)) for ratio, part in pairs)

    def _sums(self, part: Rows, one: Tensor, other: Tensor) -> Float[Tensor, " neurons"]:
        return self.summed(self.partner.sums(part, one, other))


# Batch normalisation downstream: its output does not depend on |w|, so that ½|w|² has a law without an alignment term.


class DownstreamBatchNorm(Downstream):
    """A batch normalisation that a source feeds: the error that it returns does not change |w|, up to its ε.

    ``Σδz = γ ∇γ ε / (v + ε)`` for each channel, v the variance of its input z in the batch and δ its error.

    Attributes:
        level: The largest mean²/(v + ε) of a channel so far: far above 1, the variance is the small difference of
            large numbers, and rounding hides the law.
    """

    def __init__(self, linear: LinearMap, layer: nn.Module, columns: Tensor, neurons: int, rates: Rates) -> None:
        super().__init__(linear, None, columns, neurons, rates)
        self.layer = layer
        self.kind = LawKind.NORMALISED
        self._variances: list[Tensor] = []
        self.level = torch.zeros((), dtype=torch.float64, device=self.weight.device)

    @property
    def lost_to_rounding(self) -> bool:
        """Test for a mean of a channel that exceeds its standard deviation by so much that rounding hides the law."""
        digits = self.weight.dtype if self.weight.dtype.itemsize > 4 else torch.float32
        return 10 * float(self.level.sqrt()) * torch.finfo(digits).eps > (1e-4 if digits is torch.float32 else 1e-10)

    @property
    def rounding_growth(self) -> float:
        """A mean far above the standard deviation leaves few digits of it; a 200th of the level was observed."""
        return 1 + float(self.level) / 15

    @property
    def motion(self) -> str:
        """The kind of the law to which ε adds its drift."""
        return self.kind.motion if self._epsilon else ""

    @property
    def _epsilon(self) -> float:
        return float(self.layer.eps)  # pyright: ignore[reportArgumentType]  (PyTorch's own attribute)

    def term(self) -> Float[Tensor, " neurons"]:
        """Zero: |w| is conserved by itself."""
        return self.zeros()

    def size(self) -> Float[Tensor, " neurons"]:
        """Zero."""
        return self.zeros()

    def spread(self) -> Float[Tensor, " neurons"]:
        """Zero."""
        return self.zeros()

    def length(self) -> Float[Tensor, " neurons"]:
        """Zero: γ is a weight of the law whose source is the normalisation."""
        return self.zeros()

    def note(self, layer: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the layer: keep the variance of a batch that it is trained on."""
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and layer.training and args:
            x = args[0].detach().reshape(*args[0].shape[:2], -1)
            x = x if x.dtype.itemsize >= 4 else x.float()
            first = x[:1, :, :1]
            x = x - first  # mean(x²) - mean(x)² of a large mean would lose the variance to rounding
            mean, square = (part.mean(2).double().mean(0) for part in (x, x * x))  # ten times as fast as Tensor.var
            variance = square - mean * mean
            self._variances.append(variance)
            level = (mean + first.flatten().double()).square() / (variance + self._epsilon)
            self.level = torch.maximum(self.level, level.max())

    def step(self, rates: Rates, reference: float, coefficient: float) -> Float[Tensor, " neurons"] | None:
        """Change of C through ε; of several different batches behind one step it is not known."""
        variances, self._variances = self._variances, []
        gradient = rates.gradient(self.weight)
        if gradient is None or not self._epsilon:
            return None
        if (
            not variances
            or _data_parallel()
            or not all(torch.allclose(other, variances[0], rtol=1e-5) for other in variances[1:])
        ):
            self.mixed_passes = torch.ones_like(self.mixed_passes)
        if not variances:  # a compiled pass runs no hook
            return None
        return -reference * self.summed(
            self.weight.detach().double() * gradient.double() * self._epsilon / (variances[0] + self._epsilon)
        )


def _data_parallel() -> bool:
    """Test for gradients that are means over processes, each with batches, and so variances, of its own."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
