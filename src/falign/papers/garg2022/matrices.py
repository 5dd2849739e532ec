"""The matrices Y that are factored: spectra whose basis does not matter, normal entries, and images by pixels."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.feedback import generator
from falign.lab.data import DataError, load
from falign.lab.experiment import Point, Setting

SYNTHETIC = ("power law", "gaussian")


def matrix(point: Point, setting: Setting) -> Float[Tensor, "n m"]:
    """The matrix of a point of a grid, in float64, scaled so that its largest singular value is 1.

    "power law" is diagonal with ``σ_i = i^(-1/2)``: B and the starts are normal, so that in law nothing depends on the
    basis. "gaussian" has normal entries. Any other name is a data set: its first n training images as rows.

    Args:
        point: Has "data", "n", "m" (of images the number of their pixels) and "rank": only the leading singular values
            are kept; 0 keeps all.
        setting: Where data sets are.

    Raises:
        DataError: There are fewer images, or they have another number of pixels.
    """
    name, n, m = str(point["data"]), int(point["n"]), int(point["m"])
    if name == "power law":
        found = torch.zeros(n, m, dtype=torch.float64)
        found.diagonal().copy_(torch.arange(1, min(n, m) + 1, dtype=torch.float64) ** -0.5)
    elif name == "gaussian":
        found = torch.randn(n, m, generator=generator(0, name, f"{n} by {m}"), dtype=torch.float64)
    else:
        found = _images(name, n, m, setting)
    return _leading(found, int(point["rank"]))


def _images(name: str, n: int, m: int, setting: Setting) -> Float[Tensor, "n m"]:
    data = load(name, folder=setting.data, progress=False)
    found = data.train_images[:n].double().flatten(1)
    if found.shape != (n, m):
        raise DataError(f"{name} gives {tuple(found.shape)} images by pixels, expected {(n, m)}: change n and m")
    return found


def _leading(Y: Float[Tensor, "n m"], rank: int) -> Float[Tensor, "n m"]:
    U, values, Vh = torch.linalg.svd(Y, full_matrices=False)
    kept = slice(rank or None)
    return U[:, kept] * (values[kept] / values[0]) @ Vh[kept]
