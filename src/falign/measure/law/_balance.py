"""The law of one layer's neurons, kept up to date step by step."""

from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.layers import kind_of
from falign.measure.law._downstream import Downstream, factor_text, incoming_sums
from falign.measure.law._rates import Rates, differ
from falign.rules import LawKind

# How far rounding alone can move the balance of a neuron within a stretch of steps.

STRETCH = 16
"""Steps between two looks at what is left of the balance: a wrong gradient shows beside the rounding of so few steps,
however long the training, and looking costs little beside counting."""
_UPDATES = 2.0 * STRETCH
"""Of roundings of all weights: at most ``STRETCH`` where all steps round alike (constant gradients: 13 were seen), a
random walk of √(STRETCH/3) = 2.3 where they do not (7 were seen, the largest of all neurons and stretches)."""
_PASSES = 8.0
"""Of roundings of the length of a stretch's steps; 2 were seen."""
_SUMS = 16.0
"""Of roundings of the sums themselves, which are float64."""


def _roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of one operation; products of float32 may be of TF32 on a GPU."""
    short = dtype is torch.float32 and device.type == "cuda" and _shortened()
    return 2.0**-11 if short else torch.finfo(dtype).eps / 2


def _rounding_bound(
    *, updates: float, passes: float, spread: Tensor, length: Tensor, moved: Tensor, size: Tensor
) -> Float[Tensor, " neurons"]:
    """What rounding can add to C in a stretch.

    ``32 u √Σ(∂C/∂p · p)² + 8 v |w| √(2 · 16 · ½Ση²|∇w|²) + 16 · 1e-16 size``. The first term is that of the updates:
    every step rounds every weight p by up to u|p|, independently of the others, which moves C by ∂C/∂p · u|p|. The
    second is that of the passes: both sides of ``⟨w, ∇w⟩ + b∇b = ⟨B, ∇W⟩`` are off by v of what they are sums of, in
    all steps alike; by Cauchy and Schwarz the way Ση|∇w| is at most ``√(steps · Ση²|∇w|²)``. The factors are those of
    the largest neuron of correct trainings, with room.

    Args:
        updates: u, unit roundoff of the weights.
        passes: v, the largest of what took part in the passes.
        spread: √Σ(∂C/∂p · p)² over the weights of each neuron.
        length: |w|² + b² of each neuron.
        moved: What C gained by the steps, ½Ση²|∇w|², since the stretch began.
        size: Of the terms of C.
    """
    way = (length * 2 * STRETCH * moved.abs()).sqrt()
    return _UPDATES * updates * spread + _PASSES * passes * way + _SUMS * torch.finfo(torch.float64).eps / 2 * size


def _shortened() -> bool:
    with suppress(RuntimeError):  # it is set in a newer way, which forbids to ask in this one
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return True


class Balance:
    """C = P - Σ_t s_t V_t for each neuron of a source, and all that is known to move it.

    ``P = ½|w|² + s_b ½b²`` over the weights into the neuron; V_t is a target's (``LawKind``); s_b and s_t are the rate
    of w over those of b and of the target's weight. A step of gradient descent with decay λ changes, exactly,
    ``ΔP_w = -η⟨w, ∇w⟩ + ½|Δw|² - ηλ|w|²`` and likewise the others; as ``⟨w, ∇w⟩ + b∇b = Σ_t⟨B_t, ∇W_t⟩`` in every
    batch, the first-order terms cancel and the rest is accounted for.

    Args:
        layer: The source.
        targets: What it feeds.
        rates: What the optimizer has.
        precision: The shortest type that takes part in a pass.
    """

    def __init__(self, layer: nn.Module, targets: list[Downstream], rates: Rates, precision: torch.dtype) -> None:
        self._layer, self.targets = layer, targets
        self.weight: Tensor = layer.get_parameter("weight")
        self.bias: Tensor | None = layer._parameters.get("bias")
        self.decays: set[float] = set()
        self.odd: list[str] = []
        self.frozen_steps, self._resting = False, True
        self._updates = max(torch.finfo(parameter.dtype).eps / 2 for parameter in self.parameters)
        self._passes = max(self._updates, _roundoff(precision, self.weight.device))
        self._accounted = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        self.begin(rates)

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters in the law."""
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own + [parameter for target in self.targets for parameter in target.parameters]

    @property
    def form(self) -> str:
        """C as text."""
        text, bias = ("½|w|²", "½b²") if kind_of(self._layer) is not None else ("½γ²", "½β²")
        if self.bias is not None:
            text += f" + {factor_text(self._bias_share)}{bias}"
        pairs = zip(self.targets, self._shares, strict=True)
        pairs = [(target, share) for target, share in pairs if target.kind is not LawKind.NORMALISED]
        terms = Counter(factor_text(share) + target.text for target, share in pairs)
        if len(terms) > 2:  # each with its own rate
            forms = " + ".join(dict.fromkeys(target.kind.text.format(share="") for target, _ in pairs))
            return f"{text} - Σₜsₜ{forms} over {len(pairs)} layers"
        for term, count in terms.items():
            text += f" - {'Σₜ' if count > 1 else ''}{term}"
        return text

    def begin(self, rates: Rates) -> None:
        """Take the weights and rates as they are for the start."""
        self.decays = self._decaying(rates)
        self._bias_share = 1.0 if self.bias is None else rates.ratio(self.weight, self.bias)
        self._shares = [rates.ratio(self.weight, target.weight) for target in self.targets]
        for target in self.targets:
            target.begin(rates)
        self._start, self._size = self.incoming(), self._sized()
        self._accounted = torch.zeros_like(self._start)
        self._steps, self._worst = 0, self._accounted.new_zeros(2)
        self._marked = (self.residual(), self._accounted)

    def incoming(self) -> Float[Tensor, " neurons"]:
        """P now."""
        whole = 0.5 * incoming_sums(self._layer, self.weight, self.weight)
        return (
            whole
            if self.bias is None
            else whole + 0.5 * self._bias_share * incoming_sums(self._layer, self.bias, self.bias)
        )

    def outgoing(self) -> Float[Tensor, " neurons"]:
        """Σ s_t V_t now."""
        return self._over_targets([target.term() for target in self.targets])

    def changes(self) -> tuple[Float[Tensor, " neurons"], Float[Tensor, " neurons"]]:
        """How far P and Σ s_t V_t have moved since the start."""
        moved = self._over_targets([target.term() - target.start for target in self.targets])
        return self.incoming() - self._start, moved

    def residual(self) -> Float[Tensor, " neurons"]:
        """What C gained beside what is accounted for."""
        return self._residual(self.incoming())

    def size(self) -> Float[Tensor, " neurons"]:
        """The size of the terms that C is made of, now or at the start: what a residual is relative to."""
        return torch.maximum(self._size, self._sized()).clamp_min(torch.finfo(torch.float64).tiny)

    def worst(self) -> tuple[float, float]:
        """How far the residual moved within ``STRETCH`` steps, and what rounding can do, where it came nearest to it.

        Both are of the neuron and the stretch of the largest quotient, relative to the size of the terms.
        """
        moved, possible = self._looked()[0].tolist()
        return moved, possible

    def step(self, rates: Rates) -> None:
        """Account for a step that is about to be made."""
        if self._resting:  # nothing has moved, and rates that were zero have no ratio
            self.begin(rates)
            self._resting = not any(rates[parameter].rate for parameter in self.parameters)
        self.decays |= self._decaying(rates)
        self.frozen_steps = self.frozen_steps or self._halts(rates)
        if self._steps and self._steps % STRETCH == 0:
            self._worst, residual = self._looked()
            self._marked = (residual, self._accounted)
        self._steps += 1
        reference = rates[self.weight].rate
        gained = self._moved(self.weight, 1.0, reference, rates)
        if self.bias is not None:
            gained = gained + self._moved(self.bias, self._bias_share, reference, rates)
        for target, share in zip(self.targets, self._shares, strict=True):
            if target.kind is not LawKind.NORMALISED:
                self._compare(share, rates[target.weight].rate, reference)
            more = target.step(rates, reference, share)
            gained = gained if more is None else gained + more
        self._accounted = self._accounted + gained

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "start": self._start,
            "size": self._size,
            "accounted": self._accounted,
            "steps": self._steps,
            "worst": self._worst,
            "marked": list(self._marked),
            "bias_share": self._bias_share,
            "shares": list(self._shares),
            "odd": list(self.odd),
            "decays": sorted(self.decays),
            "frozen_steps": self.frozen_steps,
            "resting": self._resting,
            "targets": {target.name: target.state() for target in self.targets},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self._start, self._size, self._accounted = (
            state[key].to(self.weight.device, copy=True) for key in ("start", "size", "accounted")
        )
        self._steps = state["steps"]
        self._worst, *marked = (part.to(self.weight.device, copy=True) for part in (state["worst"], *state["marked"]))
        self._marked = tuple(marked)
        self._bias_share, self._shares, self.odd = state["bias_share"], list(state["shares"]), list(state["odd"])
        self.decays, self.frozen_steps, self._resting = set(state["decays"]), state["frozen_steps"], state["resting"]
        for target in self.targets:
            target.load(state["targets"][target.name])

    def _looked(self) -> tuple[Tensor, Tensor]:
        """``worst``, the stretch that has not ended included, and the residual now."""
        left, accounted = self._marked
        incoming = self.incoming()
        size = torch.maximum(self._size, incoming + self._reach()).clamp_min(torch.finfo(torch.float64).tiny)
        possible = _rounding_bound(
            updates=self._updates,
            passes=self._passes * max(target.rounding_growth for target in self.targets),
            spread=self._spread(),
            length=2 * incoming,
            moved=self._accounted - accounted,
            size=size,
        )
        residual = self._residual(incoming)
        found = torch.stack([(residual - left).abs(), possible]) / size
        quotients = found[0] / found[1].clamp_min(torch.finfo(torch.float64).tiny)
        found = found[:, quotients.argmax()]
        return torch.where(found[0] * self._worst[1] < self._worst[0] * found[1], self._worst, found), residual

    def _spread(self) -> Tensor:
        """√Σ(∂C/∂p · p)² over the weights p into and out of each neuron."""
        squares = incoming_sums(self._layer, self.weight.detach().square(), self.weight.detach().square())
        if self.bias is not None:
            squares = squares + (self._bias_share * incoming_sums(self._layer, self.bias, self.bias)).square()
        spreads = [target.spread() * share**2 for target, share in zip(self.targets, self._shares, strict=True)]
        return (squares + sum(spreads, torch.zeros_like(squares))).sqrt()

    def _moved(self, parameter: Tensor, share: float, reference: float, rates: Rates) -> Tensor:
        """What share · ½|p|² gains beyond its first order, for a parameter p of the source."""
        slope, own = rates.gradient(parameter), rates[parameter]
        if slope is None:
            return torch.zeros_like(self._accounted)
        step = slope.double() + own.decay * parameter.detach().double() if own.decay else slope
        gained = 0.5 * share * own.rate**2 * incoming_sums(self._layer, step, step)
        if own.decay:
            gained = gained - share * own.rate * own.decay * incoming_sums(self._layer, parameter, parameter)
        if differ(share * own.rate, reference):
            self._compare(share, own.rate, reference)
            gained = gained - (share * own.rate - reference) * incoming_sums(self._layer, parameter, slope)
        return gained

    def _decaying(self, rates: Rates) -> set[float]:
        return {rates[parameter].decay for parameter in self.parameters} - {0.0}

    def _compare(self, share: float, rate: float, reference: float) -> None:
        """Note why the first-order terms of two parameters do not cancel, where they do not."""
        if differ(share * rate, reference):
            zero = "one of its learning rates is 0"
            why = "the ratio of the learning rates changed" if rate and reference else zero
            self.odd += [why] if why not in self.odd else []

    def _halts(self, rates: Rates) -> bool:
        """Whether one side of the balance has a gradient and the other has none.

        Several targets are another matter: one that a batch does not use has no gradient, and hands nothing back.
        """

        def frozen(parameter: Tensor) -> bool:
            return rates.gradient(parameter) is None or not parameter.requires_grad

        weight, targets = frozen(self.weight), [frozen(target.weight) for target in self.targets]
        if weight:
            return not all(targets)
        if all(targets) or any(not target.weight.requires_grad for target in self.targets):
            return True
        return self.bias is not None and frozen(self.bias) and bool(torch.any(self.bias != 0))

    def _over_targets(self, values: list[Tensor]) -> Tensor:
        pairs = zip(self._shares, values, strict=True)
        return sum((share * value for share, value in pairs), torch.zeros_like(self._accounted))

    def _residual(self, incoming: Tensor) -> Tensor:
        progress = self._over_targets([target.progress() for target in self.targets])
        return incoming - self._start - progress - self._accounted

    def _reach(self) -> Tensor:
        """The size of the terms of Σ s_t V_t."""
        return self._over_targets([target.size() for target in self.targets])

    def _sized(self) -> Tensor:
        return self.incoming() + self._reach()
