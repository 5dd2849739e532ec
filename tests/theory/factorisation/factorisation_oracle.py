"""The factorisation in NumPy float64, one run at a time, written from the update rules alone."""

import numpy as np


def best_output(Y, W):
    return Y @ np.linalg.pinv(W)


def stepped(method, Y, B, Z, W, rate, steps):
    """Z, W and Σ η² BR(BR)ᵀ after every step, the start included."""
    Z, W, gained = Z.copy(), W.copy(), np.zeros((len(B), len(B)))
    if method == "fa*":
        Z = best_output(Y, W)
    path = [(Z, W, gained)]
    for _ in range(steps):
        R = Y - Z @ W
        push = Z.T @ R if method == "gd" else B @ R
        Z, W = Z + rate * R @ W.T, W + rate * push
        if method == "fa*":
            Z = best_output(Y, W)
        gained = gained + rate**2 * push @ push.T
        path.append((Z, W, gained))
    return path


def measured(Y, B, Z, W, start):
    """What a trajectory records, from the definitions."""
    R = Y - Z @ W
    BY, r = B @ Y, len(B)
    right = np.linalg.svd(Y)[2][:r]
    projector = np.linalg.pinv(W) @ W
    return {
        "error": np.linalg.norm(R),
        "loss": (R**2).sum() / 2,
        "lyapunov": ((B @ R) ** 2).sum(),
        "alignment": np.trace(B @ Z),
        "cosine": np.sum(B.T * Z) / (np.linalg.norm(B) * np.linalg.norm(Z)) if Z.any() else np.nan,
        "weighted": np.trace(B @ Z @ W @ W.T),
        "gram drift": np.linalg.norm(W @ W.T - start[1] @ start[1].T),
        "distance": np.linalg.norm(Z @ W - Y @ np.linalg.pinv(BY) @ BY),
        "overlap": np.trace(projector @ right.T @ right) / r,
    }


def range_finder(Y, B, rank, power):
    """Halko, Martinsson and Tropp with explicit powers, no orthonormalisation between them."""
    sample = B @ np.linalg.matrix_power(Y @ Y.T, power) @ Y
    projected = Y @ np.linalg.pinv(sample) @ sample
    left, sizes, right = np.linalg.svd(projected)
    return left[:, :rank] * sizes[:rank] @ right[:rank]
