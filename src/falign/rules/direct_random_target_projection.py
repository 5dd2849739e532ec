"""Direct random target projection."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from falign.rules._direct import DirectRule

__all__ = ["DirectRandomTargetProjection"]


@dataclass(frozen=True, kw_only=True)
class DirectRandomTargetProjection(DirectRule):
    """Every layer receives the target, not the error, through a fixed random matrix.

    ``error at x_l = -s t B_l``, t the targets (one-hot for class indices), B_l (outputs, elements of one sample).
    ``s`` carries what the loss multiplies the error with (1/batch of a mean, the scale of a loss scaler, the share of
    a micro-batch): the least-squares number in ``e ≈ s (ŷ - t)``, exact for the loss that matches ``output``. Without
    it the hidden layers would train at another rate than the output layer, by a factor of the batch size, and
    accumulation or loss scaling would change the gradient.

    Targets enter by a context around forward and loss::

        with falign.targets(model, y):
            loss_fn(model(x), y).backward()

    Args:
        output: which ŷ the output stands for: "softmax" (cross-entropy), "sigmoid" (binary cross-entropy) or
            "linear" (squared error).
        positions: as for ``dfa``.

    Needs: targets, as class indices or in the output's shape. Limits: the hidden layers never see an error.

    Source: Frenkel, Lefebvre and Bol 2021 (Frontiers in Neuroscience 15), fig. 1(e), algorithm 1. There the update
    is written for y* - y, hence the sign here.
    """

    name: ClassVar[str] = "drtp"
    size: ClassVar[float] = 0.3
    targeted: ClassVar[bool] = True
    output: Literal["softmax", "sigmoid", "linear"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output not in ("softmax", "sigmoid", "linear"):
            raise ValueError(f"drtp: output is {self.output!r}, expected softmax, sigmoid or linear")

    def error(self, error: Tensor, output: Tensor, target: Tensor | None, axis: int) -> Tensor:
        """-s t, from the output and its error; classes lie along ``axis``.

        A position whose error is exactly zero has no part in the loss (padding under ``ignore_index``): its target is
        not taught.

        Raises:
            RuntimeError: softmax of a single output, which is 1 whatever the network does.
        """
        assert target is not None
        if self.output == "softmax" and output.shape[axis] == 1:
            raise RuntimeError(
                "drtp: the softmax of a single output is always 1: pass DirectRandomTargetProjection(output='sigmoid') "
                "for a yes or no, or 'linear' for a number"
            )
        if self.output == "softmax":
            output = torch.softmax(output.float() if output.dtype.itemsize < 4 else output, axis)
        elif self.output == "sigmoid":
            output = torch.sigmoid(output)
        counted = (error != 0).any(axis, keepdim=True)  # positions under ignore_index have no part in the fit
        difference = (output - target).to(output.dtype) * counted
        power = (difference * difference).sum()
        share = (error.to(output.dtype) * difference).sum() / power.clamp_min(torch.finfo(power.dtype).tiny)
        return (-share * target * counted).to(error.dtype)
