"""Error broadcast and decorrelation: direct feedback that is the running correlation of activity and error."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falign.rules._direct import DirectRule

__all__ = ["ErrorBroadcast"]


@dataclass(frozen=True, kw_only=True)
class ErrorBroadcast(DirectRule):
    """Direct feedback whose matrix is the correlation of the output's error with a layer's input, over many batches.

    ``error at x_l = e B_l`` as under ``dfa``. Every backward of training first moves B_l (outputs, features of x_l),

        B_l ← λ B_l + (1 - λ) · sign · mean(êᵀ x_l),    ê = e / √mean|e|²,

    means over the samples (or positions) whose error is not zero, and then carries its error by the moved B_l. An
    optimal estimator's error is uncorrelated with all functions of its input, its activity among them; a step
    along -e B_l lowers ``½|B_l|²``. That is as the paper has it, sign 1. Weights behind x_l have moved along
    ``-eᵀ x_l``, the other way: as long as λ is near 1, B is mostly the draw that it began from, and the weights come to
    it as they do under ``dfa``; where the correlations outgrow the draw they lead away from what backpropagation would
    do, and activity shrinks (what the paper's regularisers are for). sign -1, ours, moves B as ``dkp`` does.

    The size of e is divided out, which the paper does not do: e is times 1/batch, an accumulation's share and a loss
    scale, of which B would keep the sum. So errors that become small in training count as large ones do, and an
    accumulation over n backwards moves B n times.

    Args:
        positions: as for ``dfa``.
        forgetting: λ.
        sign: 1 or -1.

    Needs: batches. Limits: at λ = 0.99999 some ten thousand steps pass before B is another than that of ``dfa``; in
    weights of half precision so small a step is lost in rounding. Not in the rule, since they are terms of the loss:
    power normalisation, entropy of layers or weights, sparsity; nor correlations with functions g(x) other than x
    itself, and the projection of activity forward to the last layer. R(0) of the paper is B as it is drawn, which
    ``scale=`` and ``feedback=`` of ``convert`` determine (there N(0, 0.01²), for perceptrons uniform and smaller).

    Source: Erdogan, Pehlevan and Erdogan 2025 (NeurIPS), eqs. 4, 7 and 8, algorithm 1, appendix I; g(h) = h.
    """

    name: ClassVar[str] = "ebd"
    size: ClassVar[float] = 0.5
    adapts: ClassVar[bool] = True
    advances: ClassVar[bool] = True
    forgetting: float = 0.99999
    sign: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.forgetting <= 1:
            raise ValueError(f"ebd: forgetting is {self.forgetting}, expected a number from 0 to 1 (dfa)")
        if self.sign not in (1, -1):
            raise ValueError(f"ebd: sign is {self.sign}, expected 1 (the paper) or -1 (as dkp)")

    def observe_error(self, matrix: Tensor, error: Tensor, x: Tensor) -> Tensor:
        """Move the running correlation by that of a batch."""
        exact = torch.promote_types(matrix.dtype, torch.float32)  # squares of scaled errors pass half precision
        error, x, kept = error.to(exact), x.to(exact), matrix.to(exact)
        power, count = error.square().sum(), (error != 0).any(1).sum()
        product = self.sign * error.mT @ x / (power * count).clamp_min(torch.finfo(exact).tiny).sqrt()
        moved = kept + (1 - self.forgetting) * (product - kept)
        return torch.where(power > 0, moved, kept).to(matrix.dtype)
