"""Direct feedback through linear probes: every layer learns to read the network's output off its own input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falign.rules._direct import DirectRule

__all__ = ["LinearProbe"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe(DirectRule):
    """Direct feedback whose matrix is the best linear guess of the network's output from a layer's input.

    ``error at x_l = e B_l`` as under ``dfa``. ``B_l`` (outputs, features of x_l) is regressed on what passes, while the
    network trains: with f the outputs and X the layer's inputs of a batch, both less their means, and with
    ``R = f - X B_lᵀ``, what the probe missed,

        B_l ← B_l + rate · Rᵀ (X Xᵀ + ridge · t · 1)⁻¹ X,    t the mean of |x|²,

    the affine projection algorithm (normalised least mean squares over a batch). For Gaussian x the coefficients of a
    regression are the mean Jacobian ``E[∂f/∂x]`` (Stein's lemma): e B_l is what backpropagation carries to the layer,
    on average. To learn B takes neither errors nor weights: a layer sees its input and the output. B begins at zero,
    and is in ``state_dict``.

    Args:
        positions: as for ``dfa``.
        limit: mean square of x_l above which no error drives it further out, 0 for none (``DirectRule``). Without it
            plain ReLU networks run away at learning rates that suit backpropagation: activity grows, the probe sees it,
            and the error that it carries grows with it. Normalised and bounded activity seldom comes near it.
        rate: of the regression, from 0 to 1: the share of what the probe missed on a batch that is corrected.
        ridge: relative to the mean of |x|²; smaller follows the batch more closely.
        rows: how many samples (or positions) of a batch a step looks at, at most.

    Needs: batches of at least two samples. Limits: what a mean Jacobian does not say of the single sample's; under
    DistributedDataParallel all processes use the probes of the first.

    Source: ours; after the locally trained readouts of Yang et al. 2024 (direct feedback with local alignment) and, for
    learning feedback without transport, Akrout et al. 2019. The algorithm: Ozeki and Umeda 1984.
    """

    name: ClassVar[str] = "probe"
    draws: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    advances: ClassVar[bool] = True
    size: ClassVar[float] = 0.5
    limit: float = 1.0
    rate: float = 0.2
    ridge: float = 0.1
    rows: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate <= 1:
            raise ValueError(f"probe: rate is {self.rate}, expected a number from 0 to 1")
        if not self.ridge > 0:
            raise ValueError(f"probe: ridge is {self.ridge}, expected a number above 0")
        if self.rows < 2:
            raise ValueError(f"probe: rows is {self.rows}, expected a whole number of at least 2")

    def init_feedback(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """Zeros, of the shape that would be drawn."""
        return torch.zeros_like(draw())

    def observe(self, matrix: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """Take one step of the regression."""
        count = output.shape[0]
        if count < 2:
            return matrix
        if count > self.rows:
            chosen = torch.arange(self.rows, device=x.device) * count // self.rows
            output, x = output[chosen], x[chosen]
        exact = torch.promote_types(matrix.dtype, torch.float32)  # half precision has no solvers
        output, x, kept = output.to(exact), x.to(exact), matrix.to(exact)
        output, x = output - output.mean(0), x - x.mean(0)
        products = x @ x.mT
        size = products.diagonal().mean()
        added = self.ridge * torch.where(size > 0, size, torch.ones_like(size))  # of a silent layer nothing is learned
        regular = products + added * torch.eye(len(x), dtype=x.dtype, device=x.device)
        factor, _ = torch.linalg.cholesky_ex(regular)  # it raises nothing: what is not finite stays so, and is seen
        moved = kept + self.rate * torch.cholesky_solve(output - x @ kept.mT, factor).mT @ x
        return moved.to(matrix.dtype)
