"""Data, networks and a NumPy loop over points that the tests of deep linear networks share."""

from itertools import pairwise

import numpy as np
import torch

RULES = ("fa", "dfa", "bp")


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(n=30, d=6, k=4, seed=0):
    return drawn(n, d, seed=seed), drawn(n, k, seed=seed + 100)


def parts(sizes, rule, runs=2, seed=0, scale=0.4):
    """Weights and feedback, [runs out in] each."""
    W = [drawn(runs, out, into, seed=seed + place, scale=scale) for place, (into, out) in enumerate(pairwise(sizes))]
    if rule == "bp":
        return W, []
    shapes = [(sizes[-1], into) if rule == "dfa" else (out, into) for into, out in pairwise(sizes[1:])]
    return W, [drawn(runs, *shape, seed=seed + 50 + place, scale=0.5) for place, shape in enumerate(shapes)]


def velocities(W, B, X, Y, rule):
    """``-dL/dW_l`` with the error carried by the rule, point by point, in NumPy."""
    found = [np.zeros_like(part) for part in W]
    for x, y in zip(X, Y, strict=True):
        inputs = [x]
        for part in W:
            inputs.append(part @ inputs[-1])
        top = inputs.pop() - y
        errors = [top]
        for layer in range(len(W) - 2, -1, -1):
            matrix = W[layer + 1] if rule == "bp" else B[layer]
            errors.insert(0, matrix.T @ (top if rule == "dfa" else errors[0]))
        for place, (error, h) in enumerate(zip(errors, inputs, strict=True)):
            found[place] -= np.outer(error, h) / len(X)
    return found


def loss(W, X, Y):
    outputs = X
    for part in W:
        outputs = outputs @ part.T
    return 0.5 * np.mean(((outputs - Y) ** 2).sum(1))


def digits(centred=False):
    """Images with values in [0, 1] and one-hot classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    X, Y = torch.tensor(images / 16), torch.eye(10, dtype=torch.float64)[torch.tensor(labels)]
    return (X - X.mean(0), Y - Y.mean(0)) if centred else (X, Y)
