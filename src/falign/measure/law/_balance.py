"""The balance of C for the neurons of one layer, step by step: what it is, what it should be, and what rounding can do.

The residual, C(T) - C(0) less all that the steps are expected to add, is rounding as long as every gradient was the
rule's. How far rounding alone can move it within a stretch of steps comes first, then the balance.
"""

from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from falign.measure.law._downstream import Downstream, factor_text, sum_text
from falign.measure.law._rates import Rates, descent_direction, differ
from falign.measure.law._weights import Neurons, Rows
from falign.rules import LawKind

# Rounding: how far it can move the residual of a neuron within a stretch of steps.

STRETCH = 16
"""Steps between two comparisons of the residual with rounding.

The rounding of a whole training grows with its steps and would hide a single wrong gradient; that of 16 steps does
not. Made so seldom, the comparison costs little beside the account of the steps.
"""

# Factors of the three terms of ``_rounding_bound``, each with room above the largest seen in correct trainings.
_UPDATES = 2.0 * STRETCH
"""At most ``STRETCH`` where all steps round alike (constant gradients: 13 were seen), a random walk of √(STRETCH/3) =
2.3 where they do not (7 were seen, the largest of all neurons and stretches)."""
_PASSES = 8.0
"""2 were seen."""
_SUMS = 16.0
"""The sums are float64, so that this term matters where C hardly moves."""


def _roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of one operation; a GPU may multiply float32 as TF32, which has 11 bits."""
    short = dtype is torch.float32 and device.type == "cuda" and _shortened()
    return 2.0**-11 if short else torch.finfo(dtype).eps / 2


def _rounding_bound(
    *, updates: float, passes: float, spread: Tensor, length: Tensor, moved: Tensor, size: Tensor
) -> Float[Tensor, " neurons"]:
    """Bound what rounding can add to C in a stretch.

    ``32 u √Σ(∂C/∂p · p)² + 8 v |w| √(2 · 16 · ½Ση²|∇w|²) + 16 · 1e-16 size``. The first term is that of the updates:
    every step rounds every weight p by up to u|p|, independently of the others, which moves C by ∂C/∂p · u|p|. The
    second is that of the passes: both sides of ``⟨w, ∇w⟩ + b∇b = ⟨B, ∇W⟩`` are off by v of what they are sums of, in
    all steps alike; by Cauchy and Schwarz the way Ση|∇w| is at most ``√(steps · Ση²|∇w|²)``.

    Args:
        updates: u, unit roundoff of the weights.
        passes: v, the largest unit roundoff in the passes.
        spread: √Σ(∂C/∂p · p)² over the weights of each neuron.
        length: |w|² + b² of each neuron.
        moved: Change of C by the steps, ½Ση²|∇w|², since the stretch began.
        size: Size of the terms of C.
    """
    way = (length * 2 * STRETCH * moved.abs()).sqrt()
    return _UPDATES * updates * spread + _PASSES * passes * way + _SUMS * torch.finfo(torch.float64).eps / 2 * size


def _shortened() -> bool:
    with suppress(RuntimeError):  # PyTorch refuses this question where ``fp32_precision`` was set: assume TF32
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return True


class Balance:
    """Keeps C = P - Σ_t s_t V_t for each neuron of a source, and the change of it that the steps explain.

    ``P = ½|w|² + s_b ½b²`` over the weights into the neuron, of all its maps (a recurrent neuron has two); V_t is that
    of layer t downstream (``LawKind``); s_b and s_t are the rate of w over those of b and of W_t, so that the terms
    below cancel where layers differ in rate. A step
    of gradient descent with decay λ changes, exactly, ``ΔP_w = -η⟨w, ∇w⟩ + ½|Δw|² - ηλ|w|²`` and likewise the others;
    as ``⟨w, ∇w⟩ + b∇b = Σ_t⟨B_t, ∇W_t⟩`` in every batch, the first-order terms cancel and the rest is accounted for.

    Attributes:
        targets: The layers downstream.
        decays: All weight decays so far.
        rate_changes: Reasons why the first-order terms did not cancel, in words.
        frozen_steps: Test whether one side of the law had gradients in some step and the other had none.

    Args:
        neurons: The source, with the weights into it.
        targets: The layers downstream.
        rates: The optimizer's.
        precision: The floating-point type with the fewest bits in a pass.
    """

    def __init__(self, neurons: Neurons, targets: list[Downstream], rates: Rates, precision: torch.dtype) -> None:
        self.neurons, self.targets = neurons, targets
        self.weight: Tensor = neurons.parts[0].parameter
        self.decays: set[float] = set()
        self.rate_changes: list[str] = []
        self.frozen_steps, self._resting = False, True
        self._updates = max(torch.finfo(parameter.dtype).eps / 2 for parameter in self.parameters)
        self._passes = max(self._updates, _roundoff(precision, self.weight.device))
        self._accounted = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        self.begin(rates)

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters in the law."""
        incoming = [part.parameter for part in self.neurons.parts]
        return incoming + [parameter for target in self.targets for parameter in target.parameters]

    @property
    def form(self) -> str:
        """C as text."""
        text = sum_text(factor_text(ratio) + part.text for ratio, part in self._parts())
        pairs = zip(self.targets, self._coefficients, strict=True)
        pairs = [(target, coefficient) for target, coefficient in pairs if target.kind is not LawKind.NORMALISED]
        terms = Counter(factor_text(coefficient) + target.text for target, coefficient in pairs)
        if len(terms) > 2:  # a residual network: too many terms for a line of the table
            forms = " + ".join(dict.fromkeys(target.kind.text.format(share="") for target, _ in pairs))
            return f"{text} - Σₜsₜ{forms} over {len(pairs)} layers"
        for term, count in terms.items():
            text += f" - {'Σₜ' if count > 1 else ''}{term}"
        return text

    def begin(self, rates: Rates) -> None:
        """Make the weights and rates of now the start."""
        self.decays = self._current_decays(rates)
        self._ratios = [rates.ratio(self.weight, part.parameter) for part in self.neurons.parts]
        self._coefficients = [rates.ratio(self.weight, target.weight) for target in self.targets]
        for target in self.targets:
            target.begin(rates)
        # P alone is kept as the start: the change of Σ s_t V_t is each layer's own ``progress``.
        self._start, self._size = self.incoming(), self._current_size()
        self._accounted = torch.zeros_like(self._start)
        self._steps, self._worst = 0, self._accounted.new_zeros(2)
        self._stretch_start = (self.residual(), self._accounted)

    def incoming(self) -> Float[Tensor, " neurons"]:
        """P now."""
        sums = (ratio * self.neurons.sums(part, part.parameter, part.parameter) for ratio, part in self._parts())
        return 0.5 * sum(sums, torch.zeros((), dtype=torch.float64, device=self.weight.device))

    def scale(self, factors: Float[Tensor, " neurons"]) -> None:
        """Multiply all weights and biases into each neuron by its factor, in place."""
        groups = self.neurons.groups
        if groups is not None:
            groups = groups.to(factors.device)
            factors = torch.where(groups >= 0, factors[groups], 1.0)
        for part in self.neurons.parts:
            part.parameter.mul_(part.spread_out(factors).to(part.parameter.dtype))

    def outgoing(self) -> Float[Tensor, " neurons"]:
        """Σ s_t V_t now."""
        return self._weighted_sum([target.term() for target in self.targets])

    def changes(self) -> tuple[Float[Tensor, " neurons"], Float[Tensor, " neurons"]]:
        """Changes of P and of Σ s_t V_t since the start."""
        moved = self._weighted_sum([target.term() - target.start for target in self.targets])
        return self.incoming() - self._start, moved

    def residual(self) -> Float[Tensor, " neurons"]:
        """Change of C that is not accounted for: rounding, if every gradient was the rule's."""
        return self._residual(self.incoming())

    def size(self) -> Float[Tensor, " neurons"]:
        """Size of the terms of C, the larger of now and the start: what a residual is compared with."""
        return torch.maximum(self._size, self._current_size()).clamp_min(torch.finfo(torch.float64).tiny)

    def worst(self) -> tuple[float, float]:
        """Largest move of the residual within ``STRETCH`` steps, and the bound of rounding there.

        Both are of the neuron and the stretch where the move is the largest share of the bound, and relative to the
        size of the terms.
        """
        moved, possible = self._compared()[0].tolist()
        return moved, possible

    def step(self, rates: Rates) -> None:
        """Account for a step that is about to be made."""
        if self._resting:  # a schedule may begin at rate 0: nothing has moved, and the ratios s are not known yet
            self.begin(rates)
            self._resting = not any(rates[parameter].rate for parameter in self.parameters)
        self.decays |= self._current_decays(rates)
        self.frozen_steps = self.frozen_steps or self._lacks_gradients(rates)
        if self._steps and self._steps % STRETCH == 0:  # before the step: weights and account are of the same moment
            self._worst, residual = self._compared()
            self._stretch_start = (residual, self._accounted)
        self._steps += 1
        reference = rates[self.weight].rate
        change = torch.zeros_like(self._accounted)
        for ratio, part in self._parts():
            change = change + self._second_order(part, ratio, reference, rates)
        for target, coefficient in zip(self.targets, self._coefficients, strict=True):
            if target.kind is not LawKind.NORMALISED:
                for rate in target.paired_rates(rates):
                    self._compare_rates(coefficient, rate, reference)
            more = target.step(rates, reference, coefficient)
            change = change if more is None else change + more
        self._accounted = self._accounted + change

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that a resumed run needs."""
        return {
            "start": self._start,
            "size": self._size,
            "accounted": self._accounted,
            "steps": self._steps,
            "worst": self._worst,
            "stretch_start": list(self._stretch_start),
            "ratios": list(self._ratios),
            "coefficients": list(self._coefficients),
            "rate_changes": list(self.rate_changes),
            "decays": sorted(self.decays),
            "frozen_steps": self.frozen_steps,
            "resting": self._resting,
            "targets": {target.name: target.state() for target in self.targets},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self._start, self._size, self._accounted = (
            state[key].to(self.weight.device, copy=True) for key in ("start", "size", "accounted")
        )
        self._steps = state["steps"]
        self._worst, *stretch_start = (
            part.to(self.weight.device, copy=True) for part in (state["worst"], *state["stretch_start"])
        )
        self._stretch_start = tuple(stretch_start)
        # A state that an earlier version saved has the weight's and one bias's.
        former = [1.0, state.get("bias_coefficient", 1.0)][: len(self._ratios)]
        self._ratios, self._coefficients, self.rate_changes = (
            list(state.get("ratios", former)),
            list(state["coefficients"]),
            list(state["rate_changes"]),
        )
        self.decays, self.frozen_steps, self._resting = set(state["decays"]), state["frozen_steps"], state["resting"]
        for target in self.targets:
            target.load(state["targets"][target.name])

    def _compared(self) -> tuple[Tensor, Tensor]:
        """``worst``, the stretch that has not ended included, and the residual now."""
        left, accounted = self._stretch_start
        incoming = self.incoming()
        size = torch.maximum(self._size, incoming + self._outgoing_size()).clamp_min(torch.finfo(torch.float64).tiny)
        possible = _rounding_bound(
            updates=self._updates,
            passes=self._passes * max(target.rounding_growth for target in self.targets),
            spread=self._spread(),
            length=2 * incoming,
            moved=self._accounted - accounted,
            size=size,
        )
        residual = self._residual(incoming)
        moved = torch.stack([(residual - left).abs(), possible]) / size
        shares = moved[0] / moved[1].clamp_min(torch.finfo(torch.float64).tiny)
        here = moved[:, shares.argmax()]
        # Multiplied crosswise, as the bound may be 0; on the device, for reading a number would wait for a GPU.
        return torch.where(here[0] * self._worst[1] < self._worst[0] * here[1], self._worst, here), residual

    def _spread(self) -> Tensor:
        """``√Σ(∂C/∂p · p)²`` over the weights p into and out of each neuron."""
        squares = torch.zeros_like(self._accounted)
        for ratio, part in self._parts():
            square = part.parameter.detach().square()
            squares = squares + ratio**2 * self.neurons.sums(part, square, square)
        spreads = [
            target.spread() * coefficient**2
            for target, coefficient in zip(self.targets, self._coefficients, strict=True)
        ]
        return (squares + sum(spreads, torch.zeros_like(squares))).sqrt()

    def _second_order(self, part: Rows, coefficient: float, reference: float, rates: Rates) -> Tensor:
        """Change of coefficient · ½|p|² beyond the first-order term, for a parameter p of the source."""
        parameter = part.parameter
        gradient, group = rates.gradient(parameter), rates[parameter]
        if gradient is None:
            return torch.zeros_like(self._accounted)
        step = descent_direction(parameter, gradient, group)
        change = 0.5 * coefficient * group.rate**2 * self.neurons.sums(part, step, step)
        if group.decay:
            change = change - coefficient * group.rate * group.decay * self.neurons.sums(part, parameter, parameter)
        if differ(coefficient * group.rate, reference):
            self._compare_rates(coefficient, group.rate, reference)
            change = change - (coefficient * group.rate - reference) * self.neurons.sums(part, parameter, gradient)
        return change

    def _parts(self) -> list[tuple[float, Rows]]:
        """The parts of P, each with the rate of the weight over its own."""
        return list(zip(self._ratios, self.neurons.parts, strict=True))

    def _current_decays(self, rates: Rates) -> set[float]:
        return {rates[parameter].decay for parameter in self.parameters} - {0.0}

    def _compare_rates(self, coefficient: float, rate: float, reference: float) -> None:
        """Note why the first-order terms of two parameters do not cancel, where they do not."""
        if differ(coefficient * rate, reference):
            zero = "one of its learning rates is 0"
            why = "the ratio of the learning rates changed" if rate and reference else zero
            self.rate_changes += [why] if why not in self.rate_changes else []

    def _lacks_gradients(self, rates: Rates) -> bool:
        """Test whether one side of ``⟨w, ∇w⟩ + b∇b = Σ_t⟨B_t, ∇W_t⟩`` has a gradient and the other has none.

        One of several layers downstream may lack a gradient: one that a batch does not use returns no error either.
        """

        def frozen(parameter: Tensor) -> bool:
            return rates.gradient(parameter) is None or not parameter.requires_grad

        weight, targets = frozen(self.weight), [frozen(target.weight) for target in self.targets]
        if weight:
            return not all(targets)
        if all(targets) or any(not target.weight.requires_grad for target in self.targets):
            return True
        _, *others = self.neurons.parts
        return any(frozen(part.parameter) and bool(torch.any(part.parameter != 0)) for part in others)

    def _weighted_sum(self, values: list[Tensor]) -> Tensor:
        pairs = zip(self._coefficients, values, strict=True)
        return sum((coefficient * value for coefficient, value in pairs), torch.zeros_like(self._accounted))

    def _residual(self, incoming: Tensor) -> Tensor:
        progress = self._weighted_sum([target.progress() for target in self.targets])
        return incoming - self._start - progress - self._accounted

    def _outgoing_size(self) -> Tensor:
        """Size of the terms of Σ s_t V_t."""
        return self._weighted_sum([target.size() for target in self.targets])

    def _current_size(self) -> Tensor:
        return self.incoming() + self._outgoing_size()
