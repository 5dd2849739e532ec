"""The law of one layer's neurons, kept up to date step by step."""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.layers import kind_of
from falign.measure.law.forms import Form, times
from falign.measure.law.products import into
from falign.measure.law.rates import Rates, unlike
from falign.measure.law.targets import Target


class Balance:
    """C = P - Σ_t s_t V_t for each neuron of a source, and all that is known to move it.

    ``P = ½|w|² + s_b ½b²`` over the weights into the neuron; V_t is a target's (``Form``); s_b and s_t are the rate of
    w over those of b and of the target's weight. A step of gradient descent with decay λ changes, exactly,
    ``ΔP_w = -η⟨w, ∇w⟩ + ½|Δw|² - ηλ|w|²`` and likewise the others; as ``⟨w, ∇w⟩ + b∇b = Σ_t⟨B_t, ∇W_t⟩`` in every
    batch, the first-order terms cancel and the rest is accounted for.

    Args:
        layer: The source.
        targets: What it feeds.
        rates: What the optimizer has.
    """

    def __init__(self, layer: nn.Module, targets: list[Target], rates: Rates) -> None:
        self._layer, self.targets = layer, targets
        self.weight: Tensor = layer.get_parameter("weight")
        self.bias: Tensor | None = layer._parameters.get("bias")
        self.odd = False
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
            text += f" + {times(self._bias_share)}{bias}"
        pairs = zip(self.targets, self._shares, strict=True)
        terms = Counter(times(share) + target.text for target, share in pairs if target.form is not Form.NORMALISED)
        for term, count in terms.items():
            text += f" - {'Σₜ' if count > 1 else ''}{term}"
        return text

    def begin(self, rates: Rates) -> None:
        """Take the weights and rates as they are for the start."""
        self._bias_share = 1.0 if self.bias is None else rates.ratio(self.weight, self.bias)
        self._shares = [rates.ratio(self.weight, target.weight) for target in self.targets]
        for target in self.targets:
            target.begin(rates)
        self._start, self._size = self.incoming(), self._sized()
        self._accounted = torch.zeros_like(self._start)

    def incoming(self) -> Float[Tensor, " neurons"]:
        """P now."""
        whole = 0.5 * into(self._layer, self.weight, self.weight)
        return whole if self.bias is None else whole + 0.5 * self._bias_share * into(self._layer, self.bias, self.bias)

    def outgoing(self) -> Float[Tensor, " neurons"]:
        """Σ s_t V_t now."""
        return self._over_targets([target.term() for target in self.targets])

    def changes(self) -> tuple[Float[Tensor, " neurons"], Float[Tensor, " neurons"]]:
        """How far P and Σ s_t V_t have moved since the start."""
        moved = self._over_targets([target.term() - target.start for target in self.targets])
        return self.incoming() - self._start, moved

    def residual(self) -> Float[Tensor, " neurons"]:
        """What C gained beside what is accounted for."""
        progress = self._over_targets([target.progress() for target in self.targets])
        return self.incoming() - self._start - progress - self._accounted

    def size(self) -> Float[Tensor, " neurons"]:
        """The size of the terms that C is made of, now or at the start: what a residual is relative to."""
        return torch.maximum(self._size, self._sized()).clamp_min(torch.finfo(torch.float64).tiny)

    def step(self, rates: Rates) -> None:
        """Account for a step that is about to be made."""
        reference = rates[self.weight].rate
        gained = self._moved(self.weight, 1.0, reference, rates)
        if self.bias is not None:
            gained = gained + self._moved(self.bias, self._bias_share, reference, rates)
        for target, share in zip(self.targets, self._shares, strict=True):
            self.odd |= target.form is not Form.NORMALISED and unlike(share * rates[target.weight].rate, reference)
            more = target.step(rates, reference, share)
            gained = gained if more is None else gained + more
        self._accounted = self._accounted + gained

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "start": self._start,
            "size": self._size,
            "accounted": self._accounted,
            "bias_share": self._bias_share,
            "shares": list(self._shares),
            "odd": self.odd,
            "targets": {target.name: target.state() for target in self.targets},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self._start, self._size, self._accounted = (
            state[key].to(self.weight.device, copy=True) for key in ("start", "size", "accounted")
        )
        self._bias_share, self._shares, self.odd = state["bias_share"], list(state["shares"]), state["odd"]
        for target in self.targets:
            target.load(state["targets"][target.name])

    def _moved(self, parameter: Tensor, share: float, reference: float, rates: Rates) -> Tensor:
        """What share · ½|p|² gains beyond its first order, for a parameter p of the source."""
        slope, own = rates.gradient(parameter), rates[parameter]
        if slope is None:
            return torch.zeros_like(self._accounted)
        step = slope.double() + own.decay * parameter.detach().double() if own.decay else slope
        gained = 0.5 * share * own.rate**2 * into(self._layer, step, step)
        if own.decay:
            gained = gained - share * own.rate * own.decay * into(self._layer, parameter, parameter)
        if unlike(share * own.rate, reference):
            self.odd = True
            gained = gained - (share * own.rate - reference) * into(self._layer, parameter, slope)
        return gained

    def _over_targets(self, values: list[Tensor]) -> Tensor:
        pairs = zip(self._shares, values, strict=True)
        return sum((share * value for share, value in pairs), torch.zeros_like(self._accounted))

    def _sized(self) -> Tensor:
        return self.incoming() + self._over_targets([target.size() for target in self.targets])
