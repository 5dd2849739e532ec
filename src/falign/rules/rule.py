"""What a rule is: where the error is delivered, and which matrix carries it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from falign._attached import Feedback
    from falign._scratch import Scratch


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules; a rule is a frozen value, its state lives in the buffers of each layer's ``Feedback``.

    Class attributes:
        name: the word that ``convert`` and the command take.
        wiring: "none" (ordinary autograd), "layerwise" (every layer hands its own error back through B of W's shape)
            or "direct" (the network's output hands its error to every layer at once).
        size: of B where the user gives no ``scale``, relative to what carries an error as far as backpropagation
            does at conversion; chosen by measurement (``docs/scales.md``).
        draws: whether B is drawn from a family.
        learned: B is a parameter and receives a gradient; it is in ``state_dict`` and in ``model.parameters()``.
        adapts: B is moved by the rule itself; it is in ``state_dict``.
        advances: a training pass changes what the rule keeps.
        fresh: every training pass has feedback of its own.
        reads_weight: the feedback of a pass depends on W.
        targeted: the rule needs ``falign.targets``.
        magnitudes: what a layer keeps as B is the size of its entries, the signs are the weights'.
    """

    name: ClassVar[str]
    wiring: ClassVar[Literal["none", "layerwise", "direct"]] = "layerwise"
    size: ClassVar[float] = 1.0
    draws: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    advances: ClassVar[bool] = False
    fresh: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    targeted: ClassVar[bool] = False
    magnitudes: ClassVar[bool] = False

    def stored(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """What a layer keeps as B, given how to draw it and the standard deviation asked for."""
        return draw()

    def state(self) -> dict[str, Tensor]:
        """Further buffers that the rule keeps at every layer."""
        return {}

    def sources(self, feedback: "Feedback", weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """The tensors that determine the feedback of this pass; ``advance`` is a pass of training.

        ``weight`` is given to rules that read it.
        """
        return (feedback.matrix,)

    def effective(self, *sources: Tensor, scratch: "Scratch | None" = None) -> Tensor:
        """The B that carries the error, from its sources; with ``scratch`` it may lie in that memory."""
        return sources[0]

    def error(self, error: Tensor, output: Tensor, target: Tensor | None, axis: int) -> Tensor:
        """Return what a direct rule projects to the layers in place of the error; here the error itself.

        Args:
            error: the gradient at the output.
            output: the output.
            target: the targets in the output's shape, where the rule is ``targeted``.
            axis: the axis of the classes.
        """
        return error


def signed(weight: Tensor, magnitudes: list[Tensor], scratch: "Scratch | None") -> Tensor:
    """``magnitude ⊙ sign(W)``; the flat magnitudes may come in pieces, or as one number.

    Without scratch an ordinary expression; with it, written piece by piece while a piece is in the cache.
    """
    # Pieces serve the cache of a CPU; on a GPU each would be a kernel of its own.
    if scratch is None or weight.device.type != "cpu" or weight.numel() < _SMALL or not weight.is_contiguous():
        whole = magnitudes[0] if len(magnitudes) == 1 else torch.cat(magnitudes)
        return torch.sign(weight) * (whole.view(weight.shape) if whole.dim() == 1 else whole)
    result = scratch.like(weight)
    source, target, begin = weight.detach().view(-1), result.view(-1), 0
    for magnitude in magnitudes:
        size = magnitude.numel() if magnitude.dim() == 1 else weight.numel()
        for start in range(0, size, _PIECE):
            stop = min(start + _PIECE, size)
            piece = target[begin + start : begin + stop]
            torch.sign(source[begin + start : begin + stop], out=piece)
            piece.mul_(magnitude[start:stop] if magnitude.dim() == 1 else magnitude)
        begin += size
    return result


_SMALL = 1 << 17
_PIECE = 1 << 19
