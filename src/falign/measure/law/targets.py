"""The weights out of a layer's neurons, and the feedback beside them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.measure.law.forms import Form, form_of, times
from falign.measure.law.products import out_of
from falign.measure.law.rates import Rates, unlike
from falign.wiring import Feedback


class Target:
    """A layer that a source feeds, and sums over the weights out of each neuron of the source.

    Args:
        name: Its name.
        layer: The layer.
        part: Its feedback, None where its error returns by backpropagation.
        columns: For every feature of its input the neuron of the source, -1 for none.
        neurons: How many neurons the source has.
        rates: What the optimizer has.
    """

    def __init__(
        self, name: str, layer: nn.Module, part: Feedback | None, columns: Tensor, neurons: int, rates: Rates
    ) -> None:
        self.name, self.layer, self.part = name, layer, part
        self.weight: Tensor = layer.get_parameter("weight")
        self.form = form_of(part, trained=part is not None and part.matrix in rates)
        self._used = (columns >= 0).to(self.weight.device)
        self._columns = columns.to(self.weight.device)[self._used]
        self._neurons = neurons
        self._share = 1.0 if self.form is not Form.LEARNED else rates.ratio(self.learned, self.weight)
        self._passes = self._counted()
        self.uneven = torch.zeros((), dtype=torch.bool, device=self.weight.device)
        self.start = self.zeros()
        self.carried = self.zeros()

    @property
    def learned(self) -> Tensor:
        """The feedback as a parameter."""
        assert self.part is not None
        return self.part.matrix

    @property
    def parameters(self) -> list[Tensor]:
        """The weights out of the neurons, and the feedback where it is trained."""
        return [self.weight, self.learned] if self.form is Form.LEARNED else [self.weight]

    @property
    def text(self) -> str:
        """V as text."""
        return self.form.text.format(share=times(self._share))

    @property
    def motion(self) -> str:
        """What has to be accounted for beside ½Ση²|∇|², in words; empty for nothing."""
        return self.form.motion

    def zeros(self) -> Float[Tensor, " neurons"]:
        """A number a neuron."""
        return torch.zeros(self._neurons, dtype=torch.float64, device=self.weight.device)

    def summed(self, features: Float[Tensor, " in"]) -> Float[Tensor, " neurons"]:
        """Numbers of the input's features, summed over those of one neuron."""
        return self.zeros().index_add(0, self._columns, features[self._used])

    def outgoing(self, one: Tensor, other: Tensor) -> Float[Tensor, " neurons"]:
        """``⟨one[:, k], other[:, k]⟩`` over the weights out of each neuron k, of tensors of the weight's shape."""
        return self.summed(out_of(self.layer, one, other))

    def feedback(self) -> Tensor:
        """B of the latest pass; W where the error returns by backpropagation."""
        weight = self.weight.detach()
        return weight if self.part is None else self.part.effective(weight).detach()

    def begin(self, rates: Rates) -> None:
        """Take the weights and rates as they are for the start."""
        if self.form is Form.LEARNED:
            self._share = rates.ratio(self.learned, self.weight)
        self.carried = self.zeros()
        self.start = self.term()

    def term(self) -> Float[Tensor, " neurons"]:
        """V now."""
        if self.form is Form.PATH:
            return self.carried
        half = 0.5 * self.outgoing(self.weight, self.weight) if self.form in (Form.WEIGHTS, Form.LEARNED) else None
        if self.form is Form.WEIGHTS and half is not None:
            return half
        aligned = self.outgoing(self.feedback(), self.weight)
        return aligned if half is None else aligned - self._share * half

    def size(self) -> Float[Tensor, " neurons"]:
        """|B[:, k]| |W[:, k]|, of the order of the terms that V is the sum of."""
        feedback = self.feedback()
        return (self.outgoing(feedback, feedback) * self.outgoing(self.weight, self.weight)).sqrt()

    def progress(self) -> Float[Tensor, " neurons"]:
        """Σ⟨B[:, k], ΔW[:, k]⟩ over the steps since the start, each with the B of its pass."""
        return self.term() - self.start if self.form is Form.STILL else self.carried

    def step(self, rates: Rates, reference: float, share: float) -> Float[Tensor, " neurons"] | None:
        """Account for a step that is about to be made.

        Args:
            rates: Of the step.
            reference: Rate of the source's weight in this step.
            share: The coefficient of V in the law.

        Returns:
            What C gains by decay, and by a ratio of rates that is not the coefficient; None for nothing.
        """
        self._count()
        slope, own = rates.gradient(self.weight), rates[self.weight]
        if slope is None:
            return None
        odd = unlike(share * own.rate, reference)
        if self.form is Form.STILL and not own.decay and not odd:
            return None
        feedback, gained = self.feedback(), self.zeros()
        along = self.outgoing(feedback, slope)
        if odd:
            gained = (share * own.rate - reference) * along
        if own.decay:
            shrunk = own.decay * self.outgoing(feedback, self.weight)
            gained, along = gained + share * own.rate * shrunk, along + shrunk
        self.carried = self.carried - own.rate * along
        return gained

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"start": self.start, "carried": self.carried, "share": self._share, "uneven": self.uneven}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self.start, self.carried, self.uneven = (
            state[key].to(self.weight.device, copy=True) for key in ("start", "carried", "uneven")
        )
        self._share, self._passes = state["share"], None

    def _counted(self) -> Tensor | None:
        """How many passes drew feedback, for a rule that draws it anew in each."""
        passes = None if self.part is None else self.part._buffers.get("passes")
        return None if passes is None else passes.clone()

    def _count(self) -> None:
        """Notice a step behind several passes, each with other feedback: their gradients cannot be told apart."""
        now = self._counted()
        if now is not None and self._passes is not None:
            self.uneven = self.uneven | (now - self._passes > 1)
        self._passes = now
