"""Problems that the tests of the factorisation share."""

import torch

from falign.theory.factorisation import feedback


def matrix(n, m, rank=None, seed=0, runs=None):
    """Gaussian, of that rank, entries of variance 1."""
    random = torch.Generator().manual_seed(seed)
    shape = () if runs is None else (runs,)
    if rank is None:
        return torch.randn(*shape, n, m, generator=random, dtype=torch.float64)
    left = torch.randn(*shape, n, rank, generator=random, dtype=torch.float64)
    return left @ torch.randn(*shape, rank, m, generator=random, dtype=torch.float64) / rank**0.5


def problem(n=8, m=10, r=3, rank=None, runs=3, seed=0):
    return matrix(n, m, rank, seed), feedback(n, r, seeds=range(runs))
