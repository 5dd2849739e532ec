"""Linear and ReLU PyTorch networks under a rule, from given weights and feedback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

import falign
from falign.feedback import Normal, Orthogonal, draw, generator
from falign.lab.data import Dataset


def converted(W: Sequence[Tensor], B: Sequence[Tensor], rule: str, activation: str = "linear") -> nn.Sequential:
    """A network without biases of weights W_1, …, W_L, under a rule with feedback B_2, …, B_L."""
    layers = [nn.Linear(part.shape[1], part.shape[0], bias=False, dtype=part.dtype) for part in W]
    with torch.no_grad():
        for layer, part in zip(layers, W, strict=True):
            layer.weight.copy_(part)
    between = nn.ReLU if activation == "relu" else nn.Identity
    parts = [part for layer in layers for part in (layer, between())]
    model = nn.Sequential(*parts[:-1])
    names = [name for name, part in model.named_children() if isinstance(part, nn.Linear)][1:]
    falign.convert(model, rule, feedback=None if rule == "bp" else dict(zip(names, B, strict=True)))
    return model


def gradient_descent(
    model: nn.Sequential, X: Tensor, Y: Tensor, rate: float, batches: Sequence[Tensor | slice]
) -> Iterator[nn.Sequential]:
    """Steps of gradient descent on the mean of ½|f - y|²; yields the model before every step and after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batch in batches:
        yield model
        x, y = X[batch], Y[batch]
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / (2 * len(x))).backward()
        optimizer.step()
    yield model


@torch.no_grad()
def product(model: nn.Sequential) -> Tensor:
    """``W_L…W_1``."""
    first, *others = [part.weight for part in model if isinstance(part, nn.Linear)]
    whole = first.clone()
    for weight in others:
        whole = weight @ whole
    return whole


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context torch has one thread, so that sums are added in the same order on any number of cores.

    Where a training rests at a saddle, rounding decides when it leaves.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What the networks learn: data with white inputs, scaled so that the largest component of Σ_yx is 1.

TEACHER = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0)
"""Singular values of the map that gives the targets where there are no images."""
_DISTINCT = 1e-6
"""Components below so much of the largest are none: ten classes less their mean span nine directions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Inputs with Σ_xx = I, targets, and the components ``Σ_yx = U diag(λ) Vᵀ``, λ falling from 1.

    Attributes:
        X: Inputs.
        Y: Targets.
        U: Output directions of the components.
        λ: Their sizes.
        V: Input directions.
    """

    X: Float[Tensor, "n d"]
    Y: Float[Tensor, "n k"]
    U: Float[Tensor, "k modes"]
    λ: Float[Tensor, " modes"]
    V: Float[Tensor, "d modes"]

    def shares(self, product: Float[Tensor, "*runs k d"]) -> Float[Tensor, "*runs modes"]:
        """Share of each component that a linear map has learned, ``u_iᵀ M v_i / λ_i``."""
        return (self.U * (product @ self.V)).sum(-2) / self.λ

    def outside(self, product: Float[Tensor, "*runs k d"]) -> Float[Tensor, "*runs"]:
        """The largest ``|u_iᵀ M v|`` on input directions v that no component uses."""
        rest = torch.linalg.svd(self.V, full_matrices=True).U[:, self.V.shape[1] :]
        return (self.U.mT @ product @ rest).abs().amax((-1, -2))


def problem(images: Dataset | None, task: str, *, points: int, inputs: int, seed: int) -> Problem:
    """The problem that a data set poses.

    Args:
        images: The data set, or None for a random linear map.
        task: Of images: "pixels", to paint an image from its whitened principal components, or "classes", to tell its
            class.
        points: How many.
        inputs: How many each has.
        seed: Of what is drawn: which of the images; without images a linear map and its inputs.
    """
    if images is None:
        return _scaled(*_teacher(points, inputs, seed))
    pixels, classes = sample_images(images, points, seed)
    return _scaled(_white(pixels, inputs), pixels if task == "pixels" else classes)


def sample_images(
    images: Dataset, count: int, seed: int
) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n classes"]]:
    """Random training images and their classes, one-hot, both less their mean.

    Args:
        images: The data set.
        count: How many, or all that there are.
        seed: Of the choice.
    """
    chosen = torch.randperm(len(images.train_labels), generator=generator(seed, images.name, "images"))[:count]
    pixels = images.train_images[chosen].double().flatten(1)
    classes = torch.nn.functional.one_hot(images.train_labels[chosen], len(images.classes)).double()
    return pixels - pixels.mean(0), classes - classes.mean(0)


def _teacher(count: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    def normal(purpose: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator(seed, "teacher", purpose)).double()

    X = _white(normal("inputs", count, inputs), inputs)
    U, V = (torch.linalg.qr(normal(name, inputs, len(TEACHER))).Q for name in "UV")
    return X, X @ V @ torch.tensor(TEACHER, dtype=X.dtype).diag() @ U.mT


def _white(points: Float[Tensor, "n d"], inputs: int) -> Float[Tensor, "n inputs"]:
    """The first principal components of the points, each of mean square 1, uncorrelated."""
    return torch.linalg.svd(points, full_matrices=False).U[:, :inputs] * len(points) ** 0.5


def _scaled(X: Tensor, Y: Tensor) -> Problem:
    U, λ, Vh = torch.linalg.svd(Y.mT @ X / len(X), full_matrices=False)
    # λ_1 = 1, so that learning times and step sizes of different data sets are of one unit.
    kept = int((λ > _DISTINCT * λ[0]).sum())
    return Problem(X=X, Y=Y / λ[0], U=U[:, :kept], λ=λ[:kept] / λ[0], V=Vh[:kept].mT)


# Weights and feedback with which linear networks begin: small, zero, or against the feedback path.

AGAINST = 1.8
"""Size c of the start against the feedback path: λ_c = c³/(3√3) = 1.12 is above all components; the largest is 1."""
SMALL = 1e-2
"""Size of small random weights, entries N(0, size²/inputs); those of PyTorch are of size 0.6."""


def start(
    learned: Problem, *, rule: str, depth: int, hidden: int, scheme: str, basis: str, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and feedback with which a network begins.

    Feedback carries an error at its norm: entries N(0, 1/columns), or orthonormal rows where the start is spectral.

    Args:
        learned: What will be learned.
        rule: The rule.
        depth: Number of layers.
        hidden: Width of the hidden layers.
        scheme: "zero", "small" or "anti-aligned" weights.
        basis: "spectral" is orthogonal feedback, with which zero and anti-aligned weights are diagonal in the
            components' directions, and stay so; "random" is not.
        seed: Of what is drawn.

    Returns:
        W_1, …, W_L and B_2, …, B_L, of dfa B_l [outputs, inputs of layer l]. Gradient descent has feedback too: its
        anti-aligned start is that of feedback alignment.
    """
    widths = [learned.X.shape[1], *[hidden] * (depth - 1), learned.Y.shape[1]]
    B = draw_feedback(Orthogonal() if basis == "spectral" else Normal(), widths, direct=rule == "dfa", seed=seed)
    if basis == "spectral":
        B = [_orthonormal(part) for part in B]
    W = [torch.zeros(out, into, dtype=torch.float64) for into, out in pairwise(widths)]
    if scheme == "small":
        W = [_small(part, seed, place) for place, part in enumerate(W, 1)]
    if scheme == "anti-aligned":
        directions = path(B, direct=rule == "dfa") @ learned.U
        # Columns of norm 1 before the factor: every component begins with the same hidden weight, -c along its path.
        W[0] = -AGAINST * directions / directions.norm(dim=0) @ learned.V.mT
    return W, B


def draw_feedback(family: Normal | Orthogonal, widths: Sequence[int], *, direct: bool, seed: int) -> list[Tensor]:
    """B_2, …, B_L of a network of these widths, of entries of variance 1/columns; if direct, all from the outputs."""
    return [
        draw(family, (widths[-1] if direct else out, into), seed=seed, name=f"{place}", deviation=into**-0.5).double()
        for place, (into, out) in enumerate(pairwise(widths[1:]), 2)
    ]


def path(B: Sequence[Tensor], *, direct: bool) -> Tensor:
    """Map that carries the output's error to the first hidden layer [hidden outputs]."""
    if direct or len(B) == 1:
        return B[0].mT
    return torch.linalg.multi_dot([part.mT for part in B])


def _small(weight: Tensor, seed: int, place: int) -> Tensor:
    sample = torch.randn(*weight.shape, generator=generator(seed, str(place), "weights")).double()
    return SMALL / sqrt(weight.shape[1]) * sample


def _orthonormal(B: Tensor) -> Tensor:
    """The same to float64's rounding, from what was drawn in float32."""
    left, _, right = torch.linalg.svd(B, full_matrices=False)
    return left @ right
