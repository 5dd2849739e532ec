"""The weights out of a layer's neurons, and the feedback beside them."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from falign._attached import Feedback
from falign.layers import LINEAR, kind_of
from falign.measure.law._rates import Rates, descent_direction, differ
from falign.rules import LawKind


def factor_text(factor: float) -> str:
    """A factor before a term, left out where it is one."""
    return "" if abs(factor - 1) < 1e-9 else f"{factor:.4g}·"


def law_kind(part: Feedback | None, *, trained: bool) -> LawKind:
    """The kind of law of a layer with this feedback.

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


# Sums of products over the weights into and out of each neuron, in float64.

_PIECE = 1 << 16
"""Elements at a time: their products stay in the cache."""
_MADE: ContextVar[dict[Hashable, Tensor] | None] = ContextVar("made", default=None)


@contextmanager
def sums_cached() -> Iterator[None]:
    """Within, no weight and no gradient changes, so that ``once`` can give what it gave before.

    A layer of a residual network is fed by every layer before it: its sums are made once and not for each of them.
    """
    token = _MADE.set({}) if _MADE.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _MADE.reset(token)


def cached(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` gives, made once for each key within ``looking``; not to be written to."""
    made = _MADE.get()
    if made is None:
        return make()
    if key not in made:
        made[key] = make()
    return made[key]


def incoming_sums(layer: nn.Module, one: Tensor, other: Tensor) -> Float[Tensor, " out"]:
    """``Σ_j one[k, j] · other[k, j]``; vectors are a number a neuron already.

    Args:
        layer: The layer.
        one: Of its weight's shape, or of its bias's.
        other: Of the same.
    """
    kind = kind_of(layer)
    if kind is None or one.dim() == 1:
        return one.detach().double() * other.detach().double()
    return torch.cat([kind.incoming(piece, layer) for piece in _pieces(layer, one, other)])


def outgoing_sums(layer: nn.Module, one: Tensor, other: Tensor) -> Float[Tensor, " in"]:
    """``Σ_i one[i, k] · other[i, k]``; vectors are a number a channel already."""
    kind = kind_of(layer)
    if kind is None:
        return one.detach().double() * other.detach().double()
    first, *rest = (kind.outgoing(piece, layer) for piece in _pieces(layer, one, other))
    for more in rest:
        first += more
    return first


def _pieces(layer: nn.Module, one: Tensor, other: Tensor) -> Iterator[Tensor]:
    """The products of some rows of a linear map at a time; a convolution's channels belong together."""
    rows = max(1, _PIECE // max(1, one.shape[1:].numel())) if kind_of(layer) is LINEAR else len(one)
    for some, same in zip(one.detach().split(rows), other.detach().split(rows), strict=True):
        yield some.double() * same.double()


class Downstream:
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
        self.kind = law_kind(part, trained=part is not None and part.matrix in rates)
        self._used = (columns >= 0).to(self.weight.device)
        self._columns = columns.to(self.weight.device)[self._used]
        self._neurons = neurons
        self._same = columns.tolist() == list(range(neurons))  # as in most networks
        self._share = 1.0 if self.kind is not LawKind.LEARNED else rates.ratio(self.learned, self.weight)
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
        return self.kind.text.format(share=factor_text(self._share))

    @property
    def rounding_growth(self) -> float:
        """By how much it enlarges the rounding of what it is given."""
        return 1.0

    @property
    def motion(self) -> str:
        """What has to be accounted for beside ½Ση²|∇|², in words; empty for nothing."""
        return self.kind.motion

    def zeros(self) -> Float[Tensor, " neurons"]:
        """A number a neuron."""
        return torch.zeros(self._neurons, dtype=torch.float64, device=self.weight.device)

    def summed(self, features: Float[Tensor, " in"]) -> Float[Tensor, " neurons"]:
        """Numbers of the input's features, summed over those of one neuron."""
        return features if self._same else self.zeros().index_add(0, self._columns, features[self._used])

    def outgoing(self, what: str, pair: Callable[[], tuple[Tensor, Tensor]]) -> Float[Tensor, " neurons"]:
        """``⟨one[:, k], other[:, k]⟩`` over the weights out of each neuron k.

        Args:
            what: A name of the pair, by which it is known while nothing changes.
            pair: Gives one and other, of the weight's shape.
        """
        return self.summed(cached((id(self.layer), what), lambda: outgoing_sums(self.layer, *pair())))

    def feedback(self) -> Tensor:
        """B of the latest pass; W where the error returns by backpropagation."""
        weight = self.weight.detach()
        return weight if self.part is None else self.part.feedback_matrix(weight).detach()

    def begin(self, rates: Rates) -> None:
        """Take the weights and rates as they are for the start."""
        if self.kind is LawKind.LEARNED:
            self._share = rates.ratio(self.learned, self.weight)
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
        return aligned if half is None else aligned - self._share * half

    def size(self) -> Float[Tensor, " neurons"]:
        """|B[:, k]| |W[:, k]|, of the order of the terms that V is the sum of."""
        feedback = self.outgoing("|B|²", lambda: _twice(self.feedback()))
        return torch.maximum((feedback * self._squared(self.weight)).sqrt(), self.length())

    def spread(self) -> Float[Tensor, " neurons"]:
        """Σ(∂V/∂p · p)² over the weights p out of each neuron, and a trained B."""
        weight = self.weight.detach()
        squares = self.outgoing("|BW|²", lambda: _twice(self.feedback() * weight))
        if self.kind is not LawKind.STILL:
            squares = squares + self.outgoing("|W²|²", lambda: _twice(weight.square()))
        return squares

    def length(self) -> Float[Tensor, " neurons"]:
        """½|W[:, k]|², with that of a trained B, where V as accounted for is made of gradients alone."""
        if self.kind in (LawKind.STILL, LawKind.WEIGHTS):
            return self.zeros()
        return self._sum(0.5 * self._squared(parameter) for parameter in self.parameters)

    def progress(self) -> Float[Tensor, " neurons"]:
        """Σ⟨B[:, k], ΔW[:, k]⟩ over the steps since the start, each with the B of its pass.

        It must see the weights as they are, for another hand may have moved them: V does by itself if B is fixed or W;
        else what ½|W|² gained beside what the steps should have given it is added.
        """
        if self.kind is LawKind.STILL:
            return self.term() - self.start
        if self.kind is LawKind.WEIGHTS:
            return self.term() - self.start + self.step_sum
        return self.step_sum + self.length() - self.expected_length

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
        odd = differ(share * own.rate, reference)
        if self.kind is LawKind.STILL and not own.decay and not odd:
            return None
        gained = self.zeros()
        if odd:
            gained = (share * own.rate - reference) * self.outgoing("⟨B,∇⟩", lambda: (self.feedback(), slope))
        if own.decay:
            aligned = self.outgoing("⟨B,W⟩", lambda: (self.feedback(), self.weight))
            gained = gained + share * own.rate * own.decay * aligned
        if self.kind is LawKind.WEIGHTS:  # ½|W|² gains ⟨W, ΔW⟩ and this
            squared = self.outgoing(
                f"|d|² {id(self.weight)}", lambda: _twice(descent_direction(self.weight, slope, own))
            )
            self.step_sum = self.step_sum - 0.5 * own.rate**2 * squared
        elif self.kind is not LawKind.STILL:
            along = self.outgoing("⟨B,d⟩", lambda: (self.feedback(), descent_direction(self.weight, slope, own)))
            self.step_sum = self.step_sum - own.rate * along
            self.expected_length = self.expected_length + self._sum(
                self._lengthened(one, rates) for one in self.parameters
            )
        return gained

    def _lengthened(self, parameter: Tensor, rates: Rates) -> Tensor:
        """What ½|p|² will gain in the step, for W and for a B that is trained."""
        slope, own = rates.gradient(parameter), rates[parameter]
        if slope is None:
            return self.zeros()
        squared = self.outgoing(f"|d|² {id(parameter)}", lambda: _twice(descent_direction(parameter, slope, own)))
        along = self.outgoing(f"⟨p,d⟩ {id(parameter)}", lambda: (parameter, descent_direction(parameter, slope, own)))
        return 0.5 * own.rate**2 * squared - own.rate * along

    def _squared(self, parameter: Tensor) -> Float[Tensor, " neurons"]:
        return self.outgoing(f"|p|² {id(parameter)}", lambda: (parameter, parameter))

    def _sum(self, values: Iterable[Tensor]) -> Tensor:
        return sum(values, self.zeros())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "start": self.start,
            "step_sum": self.step_sum,
            "expected_length": self.expected_length,
            "share": self._share,
            "mixed_passes": self.mixed_passes,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self.start, self.step_sum, self.expected_length, self.mixed_passes = (
            state[key].to(self.weight.device, copy=True)
            for key in ("start", "step_sum", "expected_length", "mixed_passes")
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
            self.mixed_passes = self.mixed_passes | (now - self._passes > 1)
        self._passes = now


def _twice(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor, tensor


# A batch normalisation that a layer feeds.


class DownstreamBatchNorm(Downstream):
    """A batch normalisation as a target: what it hands back does not change |w|, up to its ε.

    ``Σδz = γ ∇γ ε / (v + ε)`` for each channel, v the variance of its input in the batch.
    """

    def __init__(self, name: str, layer: nn.Module, columns: Tensor, neurons: int, rates: Rates) -> None:
        super().__init__(name, layer, None, columns, neurons, rates)
        self.kind = LawKind.NORMALISED
        self._variances: list[Tensor] = []
        self.level = torch.zeros((), dtype=torch.float64, device=self.weight.device)

    @property
    def lost_to_rounding(self) -> bool:
        """Whether the mean of some channel so exceeds its spread that rounding hides what is left of the balance."""
        digits = self.weight.dtype if self.weight.dtype.itemsize > 4 else torch.float32
        return 10 * float(self.level.sqrt()) * torch.finfo(digits).eps > (1e-4 if digits is torch.float32 else 1e-10)

    @property
    def rounding_growth(self) -> float:
        """A mean far above the spread leaves few digits of the spread; a 200th of the level was seen."""
        return 1 + float(self.level) / 15

    @property
    def motion(self) -> str:
        """The ε."""
        return self.kind.motion if self._epsilon else ""

    @property
    def _epsilon(self) -> float:
        return float(self.layer.eps)  # pyright: ignore[reportArgumentType]  (PyTorch's own attribute)

    def term(self) -> Float[Tensor, " neurons"]:
        """Nothing."""
        return self.zeros()

    def size(self) -> Float[Tensor, " neurons"]:
        """Nothing."""
        return self.zeros()

    def spread(self) -> Float[Tensor, " neurons"]:
        """Nothing."""
        return self.zeros()

    def length(self) -> Float[Tensor, " neurons"]:
        """Nothing: γ has a law of its own."""
        return self.zeros()

    def note(self, layer: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the layer: the variance of a batch that it is trained on."""
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and layer.training and args:
            x = args[0].detach().reshape(*args[0].shape[:2], -1)
            x = x if x.dtype.itemsize >= 4 else x.float()
            first = x[:1, :, :1]
            x = x - first  # else a large mean leaves nothing of the variance
            mean, square = (part.mean(2).double().mean(0) for part in (x, x * x))  # ten times as fast as Tensor.var
            variance = square - mean * mean
            self._variances.append(variance)
            level = (mean + first.flatten().double()).square() / (variance + self._epsilon)
            self.level = torch.maximum(self.level, level.max())

    def step(self, rates: Rates, reference: float, share: float) -> Float[Tensor, " neurons"] | None:
        """What C gains through ε; several different batches behind one step cannot be told apart."""
        variances, self._variances = self._variances, []
        slope = rates.gradient(self.weight)
        if slope is None or not self._epsilon:
            return None
        if (
            not variances
            or _among_others()
            or not all(torch.allclose(other, variances[0], rtol=1e-5) for other in variances[1:])
        ):
            self.mixed_passes = torch.ones_like(self.mixed_passes)
        if not variances:  # compiled: nothing was noted
            return None
        return -reference * self.summed(
            self.weight.detach().double() * slope.double() * self._epsilon / (variances[0] + self._epsilon)
        )


def _among_others() -> bool:
    """Whether gradients are means over processes, each with batches of its own."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
