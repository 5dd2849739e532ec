"""Algorithm 1 of Song, Xu and Lafferty 2021 in NumPy float64, one run at a time, written from the paper alone."""

import math

import numpy as np


def erf(u):
    return np.vectorize(math.erf)(u)


PSI = {
    "identity": (lambda u: u, lambda u: np.ones_like(u)),
    "relu": (lambda u: np.where(u > 0, u, 0.0), lambda u: np.where(u > 0, 1.0, 0.0)),
    "tanh": (np.tanh, lambda u: 1 / np.cosh(u) ** 2),
    "sigmoid": (lambda u: 1 / (1 + np.exp(-u)), lambda u: np.exp(-u) / (1 + np.exp(-u)) ** 2),
    "erf": (erf, lambda u: 2 / math.sqrt(math.pi) * np.exp(-(u**2))),
}


def ridge(strength, schedule, T, t):
    return {
        "constant": lambda: strength,
        "cutoff": lambda: strength if t <= T else 0.0,
        "inverse-square": lambda: strength / (1 + t / T) ** 2,
        "exponential": lambda: strength * math.exp(-t / T),
    }[schedule]()


def softmax(f):
    exps = np.exp(f - f.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def train(X, y, W, beta, b, *, activation, rate, steps, penalty=(0.0, "constant", None), loss="squared",
          batches=None, masks=None, dropout=0.0):  # fmt: skip
    """W and beta after the steps. beta, b: [p k]; y: [n k]; batches(t) -> indices; masks(t) -> {0, 1} [p points]."""
    psi, derivative = PSI[activation]
    W, beta, p = W.copy(), beta.copy(), len(W)
    for t in range(steps):
        chosen = batches(t) if batches else np.arange(len(X))
        old_W, old_beta = W.copy(), beta.copy()
        beta *= 1 - rate * ridge(*penalty, t)
        m = masks(t) / (1 - dropout) if masks else np.ones((p, len(chosen)))
        for place, i in enumerate(chosen):
            u = old_W @ X[i]
            h = psi(u) * m[:, place]
            f = old_beta.T @ h / math.sqrt(p)
            e = y[i] - f if loss == "squared" else (y[i] - softmax(f)) / len(chosen)
            beta += rate / math.sqrt(p) * np.outer(h, e)
            W += rate / math.sqrt(p) * np.outer((b @ e) * derivative(u) * m[:, place], X[i])
    return W, beta


def outputs(X, W, beta, activation):
    return PSI[activation][0](X @ W.T) @ beta / math.sqrt(len(W))


def cosine(a, b):
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def numbers(X, y, W, beta, b, W0, beta0, activation, loss="squared"):
    """Everything that ``WeightSpace.measure`` states, from the definitions."""
    f = outputs(X, W, beta, activation)
    if loss == "squared":
        e, value = y - f, ((y - f) ** 2).sum() / 2
    else:
        e, value = y - softmax(f), -(y * np.log(softmax(f))).sum(1).mean()
    return {
        "loss": value,
        "cosine": cosine(b, beta),
        "beta_norm": math.sqrt((beta**2).sum()),
        "b_dot_beta": (b * beta).sum(),
        "beta_change": np.linalg.norm(beta - beta0, axis=1).max(),
        "weight_change": np.linalg.norm(W - W0, axis=1).max(),
        "weight_growth": ((W**2).sum() - (W0**2).sum()) / 2,
        "error_cosine": np.mean([cosine(beta @ one, b @ one) for one in e]),
    }
