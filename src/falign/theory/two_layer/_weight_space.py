"""Algorithm 1 as it is written, on the weights themselves, for many runs at once."""

from collections.abc import Callable, Collection, Iterator, Sequence
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.feedback import generator
from falign.theory._coerce import public, recording, typed
from falign.theory.two_layer._activations import activation as activation_named
from falign.theory.two_layer._activations import loss as loss_named
from falign.theory.two_layer._schedules import Penalty, checked, shrinkage
from falign.theory.two_layer._start import Start
from falign.theory.two_layer._trajectory import (
    ALWAYS,
    alignment,
    chosen,
    error_cosine,
    largest,
    told_of_divergence,
    travelled,
)

# Batches and dropout masks of a run, from named generators of its seed.


class Batches:
    """The points of each step: every epoch a new permutation per seed, its last batch holding what is left.

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
        """Draw the factors of the hidden activities of step t; size, dtype and device are those of beta."""
        if self._masks is not None:
            kept = self._masks(t, points)
        else:
            drawn = [torch.rand(beta.shape[2], points, generator=random) for random in self._random]
            kept = torch.stack(drawn) >= self._share
        return kept.to(beta).unsqueeze(1) / (1 - self._share)


_ELEMENTS = 1 << 24
"""Points are evaluated in pieces of at most that many hidden activities."""


@typed
class WeightSpace:
    """Feedback alignment of ``f(x) = (1/√p) βᵀψ(Wx)`` on W and β, [seeds penalties] runs at once.

    ``β ← (1 - ηλ(t)) β + g ψ(WXᵀ) e``, ``W ← W + g [ψ'(WXᵀ) ⊙ (b eᵀ)] X`` with ``g = η/√p``, both from the old
    W and β. The squared loss is a sum over the points, the softmax loss a mean, so its g is ``η/(√p n)``. Exact; the
    runs of one seed share data, initial weights, batches and dropout masks. Every other engine is tested against
    this one, and this one against a loop in NumPy.

    Args:
        start: Data and initial weights; they decide dtype and device.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        penalties: One run per seed and penalty.
        loss: ``squared`` or, for k outputs and class probabilities y, ``softmax``.
        dropout: Share of hidden neurons set to zero at a point and step, the others divided by 1 - dropout; fresh
            masks each step, none when measuring.
        batch: Points of a step, every epoch in a new order, the last batch of an epoch holding what is left; None
            for all points.
        masks: In place of drawn masks: (t, points of the batch) -> {0, 1} [seeds p points].

    Raises:
        ValueError: a rate, share or batch out of range, or softmax with a scalar output.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), algorithm 1 and the update below equation 4.1, both with the sign
    of descent for ``e = y - f`` (the printed one ascends) and ``1 - ηλ`` for the printed ``1 - λ``.
    """

    def __init__(
        self,
        start: Start,
        *,
        activation: str = "identity",
        rate: float,
        penalties: Sequence[Penalty] = (Penalty(),),
        loss: str = "squared",
        dropout: float = 0.0,
        batch: int | None = None,
        masks: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        self.activation = activation_named(activation)
        self.loss = loss_named(loss)
        self.start = start
        self.rate, self.penalties = checked(rate, penalties)
        self._scalar = start.beta.dim() == 2
        if loss == "softmax" and self._scalar:
            raise ValueError("the softmax loss needs k outputs: y [.. n k], beta and b [seeds p k]")
        points, seeds = start.X.shape[-2], start.seeds or ()
        self._batches = None if batch is None else Batches(seeds, points=points, size=batch)
        self._dropout = Dropout(seeds, share=dropout, masks=masks) if dropout else None
        self.t = 0
        seeds, p, d = start.W.shape
        self._runs = (seeds, len(self.penalties))
        # The runs of a seed share its inputs: their neurons lie side by side, so that one product serves all penalties.
        self._W = start.W.unsqueeze(1).expand(*self._runs, p, d).reshape(seeds, -1, d).clone()
        self._beta0 = _with_outputs(start.beta, self._scalar).unsqueeze(1)
        self._beta = self._beta0.expand(*self._runs, -1, -1).clone()
        self._b = _with_outputs(start.b, self._scalar).unsqueeze(1)
        self._y = _with_outputs(start.y, self._scalar)

    @property
    def W(self) -> Float[Tensor, "seeds penalties p d"]:  # noqa: N802
        """First layer's weights."""
        return self._W.unflatten(1, (self._runs[1], -1))

    @property
    def beta(self) -> Float[Tensor, "seeds penalties p *k"]:
        """Output weights β."""
        return self._beta[..., 0] if self._scalar else self._beta

    @public
    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Make that many steps."""
        for keep in shrinkage(self.penalties, self.rate, self.t, steps, self._beta):
            self._step(keep[:, None, None])
            self.t += 1

    def _step(self, keep: Tensor) -> None:
        X, y = self._batch()
        hidden, slope = self.activation.both(self._preactivations(X))
        if self._dropout is not None:
            mask = self._dropout.mask(self.t, self._beta, X.shape[-2])
            hidden, slope = hidden * mask, slope * mask
        root = sqrt(hidden.shape[2])
        e = self.loss.error(hidden.mT @ self._beta / root, y)
        step = self.rate / root / (X.shape[-2] if self.loss.averaged else 1)
        carried = slope * (self._b * e.mT if self._scalar else self._b @ e.mT) * step
        self._beta = keep * self._beta + hidden @ e * step
        flat = carried.flatten(1, 2)
        if X.dim() == 2:
            self._W.view(-1, X.shape[1]).addmm_(flat.flatten(0, 1), X)
        else:
            self._W.baddbmm_(flat, X)

    def _preactivations(self, X: Tensor) -> Float[Tensor, "seeds penalties p points"]:
        """``W Xᵀ`` for inputs of all seeds [m d] or of each [seeds m d]."""
        return (self._W @ X.mT).unflatten(1, (self._runs[1], -1))

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this step; the targets with an axis for the penalties."""
        X, y = self.start.X, self._y
        if self._batches is not None:
            chosen = self._batches.at(self.t).to(X.device)
            if X.dim() == 2:
                X, y = X[chosen], y[chosen]
            else:
                X = X.take_along_dim(chosen[..., None], 1)
                y = y.take_along_dim(chosen[..., None], 1)
        return X, self._targets(y)

    def _pieces(self, X: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Outputs at X in pieces of its points, [seeds penalties points k]."""
        size = max(1, _ELEMENTS // (self._W.shape[0] * self._W.shape[1]))
        root = sqrt(self._beta.shape[2])
        for first in range(0, X.shape[-2], size):
            piece = slice(first, first + size)
            yield piece, self.activation.value(self._preactivations(X[..., piece, :])).mT @ self._beta / root

    @public
    @torch.no_grad()
    def outputs(self, X: Float[Tensor, "... m d"]) -> Float[Tensor, "seeds penalties m *k"]:
        """``f(x)`` at inputs of all seeds [m d] or of each [seeds m d], without dropout.

        Raises:
            ValueError: the inputs are others.
        """
        self._fits(X)
        f = self._outputs(X)
        return f[..., 0] if self._scalar else f

    @public
    @torch.no_grad()
    def accuracy(self, X: Float[Tensor, "... m d"], labels: Int[Tensor, "... m"]) -> Float[Tensor, "seeds penalties"]:
        """Share of points whose largest output is the labelled one.

        Raises:
            ValueError: the inputs are no [m d] or [seeds m d], or there is not one label a point.
        """
        self._fits(X)
        if labels.shape != X.shape[:-1] and labels.shape != X.shape[-2:-1]:
            raise ValueError(f"labels have shape {list(labels.shape)}, expected {list(X.shape[:-1])}: one a point")
        right = sum((f.argmax(-1) == labels[..., None, piece]).sum(-1) for piece, f in self._pieces(X))
        return torch.as_tensor(right).to(self._beta) / X.shape[-2]

    def _fits(self, X: Tensor) -> None:
        """Refuse inputs of another shape, number format or device than the network's."""
        seeds, _, d = self._W.shape
        if X.dim() not in (2, 3) or X.shape[-1] != d or (X.dim() == 3 and len(X) != seeds):
            raise ValueError(f"X has shape {list(X.shape)}, expected [points {d}] or [{seeds} points {d}]")
        if (X.dtype, X.device) != (self._W.dtype, self._W.device):
            raise ValueError(f"X is {X.dtype} on {X.device}, W {self._W.dtype} on {self._W.device}: pass X.to(W)")

    def _outputs(self, X: Tensor) -> Tensor:
        return torch.cat([f for _, f in self._pieces(X)], dim=2)

    @torch.no_grad()
    def error(self) -> Float[Tensor, "seeds penalties n *k"]:
        """``e = y - f`` (softmax: ``y - softmax(f)``) at all training points and current weights."""
        e = self.loss.error(self._outputs(self.start.X), self._targets(self._y))
        return e[..., 0] if self._scalar else e

    def _targets(self, y: Tensor) -> Tensor:
        """Targets of all seeds as they are, of each with an axis for the penalties."""
        return y if y.dim() == 2 else y.unsqueeze(1)

    @recording
    @torch.no_grad()
    def measure(self, names: Collection[str] | None = None) -> dict[str, Float[Tensor, "seeds penalties"]]:
        """Loss, alignment and how far the weights have come.

        Args:
            names: Which of them; None for all.

        Returns:
            loss, cosine ``cos∠(b, β)``, beta_norm, b_dot_beta, beta_change ``max_r |β_r - β_r(0)|``, weight_change
            ``max_r |w_r - w_r(0)|``, weight_growth ``½(|W|² - |W(0)|²)``; with k outputs error_cosine, the mean over
            points of ``cos∠(be, βe)``; with test points test_loss.

        Raises:
            ValueError: a name is unknown.

        Warns:
            UserWarning: a run is no longer finite.
        """
        start = self.start
        known = [*ALWAYS, *([] if self._scalar else ["error_cosine"]), *([] if start.X_test is None else ["test_loss"])]
        wanted = chosen(names, known)
        values = {**alignment(self._b, self._beta), "beta_change": largest(self._beta - self._beta0)}
        if wanted & {"loss", "error_cosine"}:
            f, y = self._outputs(start.X), self._targets(self._y)
            values["loss"] = self.loss.value(f, y)
            if not self._scalar:
                values["error_cosine"] = error_cosine(self.loss.error(f, y), self._b, self._beta)
        if wanted & {"weight_change", "weight_growth"}:
            values |= travelled(self.W, start.W)
        if "test_loss" in wanted and start.X_test is not None and start.y_test is not None:
            y_test = self._targets(_with_outputs(start.y_test, self._scalar))
            values["test_loss"] = self.loss.value(self._outputs(start.X_test), y_test)
        return told_of_divergence({name: values[name] for name in known if name in wanted}, self.t)


def _with_outputs(tensor: Tensor, scalar: bool) -> Tensor:
    """The tensor with a last axis of outputs, which a scalar output has not."""
    return tensor.unsqueeze(-1) if scalar else tensor
