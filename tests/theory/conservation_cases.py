"""Data and starts that the tests of the conservation law and of dominance share."""

import torch

from falign.theory.conservation import Dynamics, State, activation, draw, loss, rule


def data(n=20, d=6, k=3, seed=0, kind="softmax"):
    random = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=random, dtype=torch.float64)
    if kind == "softmax":
        return X, torch.eye(k, dtype=torch.float64)[torch.randint(k, (n,), generator=random)]
    y = torch.randn(n, k, generator=random, dtype=torch.float64)
    return X, y.sign() if kind == "logistic" else y


def made(activation_name="relu", rule_name="fa", loss_name="softmax", **others) -> Dynamics:
    return Dynamics(activation=activation(activation_name), rule=rule(rule_name), loss=loss(loss_name), **others)


def batches(n=20, size=5, steps=1000, seed=1):
    return torch.randint(n, (steps, size), generator=torch.Generator().manual_seed(seed))


def one_run(state: State, run: int):
    """W, b, B of one run as NumPy arrays."""
    return tuple([tensor[run].numpy() for tensor in part] for part in (state.W, state.b, state.B))


def start(dynamics, widths=(6, 8, 7, 3), seeds=(0, 1), **others):
    return draw(list(widths), seeds=list(seeds), dynamics=dynamics, **others)
