"""Feedback alignment in a deep network in NumPy float64, point by point, written from the update rules alone."""

import numpy as np

PHI = {
    "linear": (lambda z: z, lambda z: np.ones_like(z)),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "leaky": (lambda z: np.where(z > 0, z, 0.1 * z), lambda z: np.where(z > 0, 1.0, 0.1)),
    "abs": (np.abs, np.sign),
}


def softmax(f):
    exps = np.exp(f - f.max())
    return exps / exps.sum()


LOSS = {
    "squared": (lambda f, y: ((f - y) ** 2).sum() / 2, lambda f, y: f - y),
    "softmax": (lambda f, y: -(y * np.log(softmax(f))).sum(), lambda f, y: softmax(f) - y),
    "logistic": (lambda f, y: np.log1p(np.exp(-y * f)).sum(), lambda f, y: -y / (1 + np.exp(y * f))),
}


def loss_of(W, b, X, y, activation, loss):
    total = 0.0
    for x, target in zip(X, y, strict=True):
        h = x
        for layer, matrix in enumerate(W):
            z = matrix @ h + (b[layer] if b else 0)
            h = PHI[activation][0](z) if layer < len(W) - 1 else z
        total += LOSS[loss][0](h, target)
    return total / len(X)


def carrier(rule, B, W):
    """M of one layer, from the definitions."""
    return {
        "bp": lambda: W,
        "fa": lambda: B,
        "usf": lambda: B * np.sign(W),
        "frsf": lambda: B * np.sign(W),
        "kp": lambda: B,
        "adafa": lambda: B,
    }[rule]()


def pseudo_gradients(W, b, B, X, y, activation, loss, rule):
    """ĝ of every layer's weights and biases."""
    phi, slope = PHI[activation]
    gW, gb = [np.zeros_like(matrix) for matrix in W], [np.zeros(len(matrix)) for matrix in W]
    for x, target in zip(X, y, strict=True):
        hs, zs = [x], []
        for layer, matrix in enumerate(W):
            zs.append(matrix @ hs[-1] + (b[layer] if b else 0))
            hs.append(phi(zs[-1]))
        top = delta = LOSS[loss][1](zs[-1], target) / len(X)
        for layer in reversed(range(len(W))):
            gW[layer] += np.outer(delta, hs[layer])
            gb[layer] += delta
            if layer:
                if rule == "dfa":
                    delta = slope(zs[layer - 1]) * (B[layer - 1].T @ top)
                else:
                    M = carrier(rule, B[layer - 1] if B else None, W[layer])
                    delta = slope(zs[layer - 1]) * (M.T @ delta)
    return gW, gb


def train(W, b, B, X, y, batches, *, activation, loss, rule, rate, alpha=0.0):
    """W, b, B after the batches, and ½ Σ η² |ĝ_k|² of every hidden neuron."""
    W, b, B = [m.copy() for m in W], [v.copy() for v in b], [m.copy() for m in B]
    growth = [np.zeros(len(matrix)) for matrix in W[:-1]]
    for points in batches:
        if rule == "adafa":
            B = [(1 - alpha) * matrix + alpha * weight for matrix, weight in zip(B, W[1:], strict=True)]
        gW, gb = pseudo_gradients(W, b, B, X[points], y[points], activation, loss, rule)
        for layer in range(len(W)):
            if layer < len(growth):
                growth[layer] += rate**2 * ((gW[layer] ** 2).sum(1) + (gb[layer] ** 2 if b else 0)) / 2
            W[layer] -= rate * gW[layer]
            if b:
                b[layer] -= rate * gb[layer]
            if layer and rule == "kp":
                B[layer - 1] -= rate * gW[layer]
    return W, b, B, growth
