"""What two-layer linear networks learn: isotropic inputs, and labels that are linear in them, or might as well be."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from falign.feedback import generator
from falign.lab.data import load
from falign.lab.experiment import Setting, Task
from falign.papers.garg2022.matrices import matrix
from falign.theory.factorisation.network import isotropic

Batch = tuple[Tensor, Tensor]
"""Inputs (points, m) and labels (points, n)."""


class Problem(NamedTuple):
    """What a network is trained on.

    Attributes:
        Y: The best linear map (n, m) from inputs to labels; its largest singular value is 1.
        batch: Gives the next batch.
    """

    Y: Float[Tensor, "n m"]
    batch: Callable[[], Batch]


def problem(task: Task, setting: Setting) -> Problem:
    """The problem of a run, by its point's "inputs", in float64.

    "isotropic": fixed inputs with ``XᵀX = N I``, all in each batch. "fresh": normal inputs that are drawn anew for each
    batch, isotropic in the population. Both have labels ``Y x``, Y with ``σ_i = i^(-1/2)``. Any other name is a data
    set: its first N images less their mean, whitened along the leading m directions, with their classes as labels. The
    labels are not linear in the images, but what is not has no correlation with them, so that no gradient sees it.
    """
    point, seed = task.point, task.seed
    N, m = int(point["points"]), int(point["m"])
    if point["inputs"] not in ("isotropic", "fresh"):
        X, labels = _whitened(str(point["inputs"]), N, m, setting)
        Y = labels.mT @ X / N
        scale = torch.linalg.matrix_norm(Y, 2)
        whole = X, labels / scale
        return Problem(Y / scale, lambda: whole)
    Y = matrix({**point, "data": "power law"}, setting)
    if point["inputs"] == "isotropic":
        fixed = isotropic(N, m, seed=seed)
        whole = fixed, fixed @ Y.mT
        return Problem(Y, lambda: whole)
    random = generator(seed, "fresh", "inputs")

    def batch() -> Batch:
        X = torch.randn(N, m, generator=random, dtype=torch.float64)
        return X, X @ Y.mT

    return Problem(Y, batch)


def _whitened(name: str, count: int, m: int, setting: Setting) -> Batch:
    data = load(name, folder=setting.data, progress=False)
    images = data.train_images[:count].double().flatten(1)
    labels = one_hot(data.train_labels[:count], len(data.classes)).double()
    directions = torch.linalg.svd(images - images.mean(0), full_matrices=False).U[:, :m]
    return directions * count**0.5, labels
