"""A batch normalisation that a layer feeds."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from falign.measure.law.forms import Form
from falign.measure.law.rates import Rates
from falign.measure.law.targets import Target


class Normalised(Target):
    """A batch normalisation as a target: what it hands back does not change |w|, up to its ε.

    ``Σδz = γ ∇γ ε / (v + ε)`` for each channel, v the variance of its input in the batch.
    """

    def __init__(self, name: str, layer: nn.Module, columns: Tensor, neurons: int, rates: Rates) -> None:
        super().__init__(name, layer, None, columns, neurons, rates)
        self.form = Form.NORMALISED
        self._variances: list[Tensor] = []
        self.level = torch.zeros((), dtype=torch.float64, device=self.weight.device)

    @property
    def drowned(self) -> bool:
        """Whether the mean of some channel so exceeds its spread that rounding hides what is left of the balance."""
        digits = self.weight.dtype if self.weight.dtype.itemsize > 4 else torch.float32
        return 10 * float(self.level.sqrt()) * torch.finfo(digits).eps > (1e-4 if digits is torch.float32 else 1e-10)

    @property
    def amplified(self) -> float:
        """A mean far above the spread leaves few digits of the spread; a 200th of the level was seen."""
        return 1 + float(self.level) / 15

    @property
    def motion(self) -> str:
        """The ε."""
        return self.form.motion if self._epsilon else ""

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
            self.uneven = torch.ones_like(self.uneven)
        if not variances:  # compiled: nothing was noted
            return None
        return -reference * self.summed(
            self.weight.detach().double() * slope.double() * self._epsilon / (variances[0] + self._epsilon)
        )


def _among_others() -> bool:
    """Whether gradients are means over processes, each with batches of its own."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
