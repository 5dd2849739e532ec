"""What the networks learn: data with white inputs, scaled so that the largest component of Σ_yx is 1."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import Dataset
from falign.lab.experiment import Point

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
        """How much of each component a linear map has learned, ``u_iᵀ M v_i / λ_i``."""
        return (self.U * (product @ self.V)).sum(-2) / self.λ

    def outside(self, product: Float[Tensor, "*runs k d"]) -> Float[Tensor, "*runs"]:
        """The largest ``|u_iᵀ M v|`` on input directions v that no component uses."""
        rest = torch.linalg.svd(self.V, full_matrices=True).U[:, self.V.shape[1] :]
        return (self.U.mT @ product @ rest).abs().amax((-1, -2))


def problem(point: Point, seed: int, images: Dataset | None) -> Problem:
    """The problem of a point of a grid.

    Args:
        point: Has "points" and "inputs", their number; and of images "task": "pixels", to paint an image from its
            whitened principal components, or "classes", to tell its class.
        seed: Of what is drawn: which of the images; without images a linear map and its inputs.
        images: The data set, or None for a random linear map.
    """
    count, inputs = int(point["points"]), int(point["inputs"])
    if images is None:
        return _scaled(*_teacher(count, inputs, seed))
    pixels, classes = drawn(images, count, seed)
    return _scaled(_white(pixels, inputs), pixels if point["task"] == "pixels" else classes)


def drawn(images: Dataset, count: int, seed: int) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, "n classes"]]:
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
    kept = int((λ > _DISTINCT * λ[0]).sum())
    return Problem(X=X, Y=Y / λ[0], U=U[:, :kept], λ=λ[:kept] / λ[0], V=Vh[:kept].mT)
