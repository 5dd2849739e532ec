"""Batches and dropout masks of a run, from generators named by its seed."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.feedback import generator


class Batches:
    """Which points each step takes: every epoch a new permutation per seed, its last batch holding what is left.

    Args:
        seeds: One run each.
        points: Training points.
        size: Points of a step.

    Raises:
        ValueError: the size is not from 1 to the number of points.
    """

    def __init__(self, seeds: Sequence[int], *, points: int, size: int) -> None:
        if not 1 <= size <= points:
            raise ValueError(f"a batch has 1 to {points} points, got {size}")
        self._seeds, self._points, self._size = seeds, points, size
        self._epoch, self._order = -1, torch.empty(0)

    def at(self, t: int) -> Int[Tensor, "seeds points"]:
        """The points of step t."""
        epoch, place = divmod(t, -(-self._points // self._size))
        if epoch != self._epoch:
            orders = [
                torch.randperm(self._points, generator=generator(seed, "two-layer", f"batches {epoch}"))
                for seed in self._seeds
            ]
            self._epoch, self._order = epoch, torch.stack(orders)
        return self._order[:, place * self._size : (place + 1) * self._size]


class Dropout:
    """Inverted dropout: a share of the activities set to zero, the others divided by 1 - share; fresh each step.

    Args:
        seeds: One run each.
        share: Probability of zero.
        masks: In place of drawn masks: (t, points) -> {0, 1} [seeds p points].

    Raises:
        ValueError: the share is not from 0 to below 1.
    """

    def __init__(
        self, seeds: Sequence[int], *, share: float, masks: Callable[[int, int], Tensor] | None = None
    ) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {share}")
        self._share, self._masks = share, masks
        self._random = [generator(seed, "two-layer", "dropout") for seed in seeds]

    def mask(
        self, t: int, beta: Float[Tensor, "seeds penalties p k"], points: int
    ) -> Float[Tensor, "seeds 1 p points"]:
        """What the hidden activities of step t are multiplied by; size, dtype and device are those of beta."""
        if self._masks is not None:
            kept = self._masks(t, points)
        else:
            drawn = [torch.rand(beta.shape[2], points, generator=random) for random in self._random]
            kept = torch.stack(drawn) >= self._share
        return kept.to(beta).unsqueeze(1) / (1 - self._share)
