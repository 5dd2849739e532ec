"""The prediction for p → ∞ against trained networks: the discrepancy falls like 1/√p."""

import numpy as np
import pytest
import torch

from falign.theory.two_layer._activations import ACTIVATIONS
from falign.theory.two_layer._dual import Dual
from falign.theory.two_layer._schedules import Penalty
from falign.theory.two_layer._start import draw
from falign.theory.two_layer._width_free import WidthFree
from falign.theory.two_layer.kernels import limiting_kernel, predicted_error

PENALTIES = (Penalty(), Penalty(1.0), Penalty(2.0, "cutoff", 8.0))
RATE, STEPS = 0.1, 20


def _strengths() -> torch.Tensor:
    return torch.stack([penalty.values(STEPS) for penalty in PENALTIES])


@pytest.mark.parametrize("name", ["identity", "relu", "tanh", "erf"])
def test_discrepancy_falls_like_one_over_root_p(name):
    widths = (64, 256, 1024, 4096)
    sizes = []
    for p in widths:
        start = draw(range(12), n=6, d=12, p=p, activation=name, inputs="scaled")
        kernel = limiting_kernel(start.X, ACTIVATIONS[name])
        engine = Dual(start, activation=name, rate=RATE, penalties=PENALTIES)
        predicted = predicted_error(
            kernel[:, None], engine.error(), start.y[:, None], rate=RATE, strengths=_strengths()
        )
        assert predicted.shape == (12, 3, STEPS + 1, 6)
        engine.advance(STEPS)
        rest = (engine.error() - predicted[..., -1, :]).square().sum(-1) / start.y.square().sum(-1, keepdim=True)
        sizes.append(rest.mean(0).sqrt().numpy())
    slopes = np.polyfit(np.log(widths), np.log(np.stack(sizes)), 1)[0]
    assert (np.abs(slopes + 0.5) < 0.1).all(), slopes


def test_at_width_ten_to_the_ten_the_linear_prediction_is_exact_to_five_digits():
    engine = WidthFree.sample(range(4), n=6, d=12, p=10**10, rate=RATE, penalties=PENALTIES, inputs="scaled")
    gram = engine.gram
    kernel = gram.basis @ (gram.K[..., None] * gram.basis.mT)
    y = (gram.basis @ gram.y[..., None])[..., 0]
    predicted = predicted_error(kernel[:, None], engine.error(), y[:, None], rate=RATE, strengths=_strengths())
    engine.advance(STEPS)
    torch.testing.assert_close(engine.error(), predicted[..., -1, :], rtol=0, atol=5e-5)


def test_without_ridge_it_is_a_matrix_power_and_with_ridge_the_sum_of_its_derivation():
    random = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=random, dtype=torch.float64)
    kernel, error = root @ root.mT / 8, torch.randn(4, generator=random, dtype=torch.float64)
    y = torch.randn(4, generator=random, dtype=torch.float64)
    plain = predicted_error(kernel, error, y, rate=0.2, strengths=torch.zeros(7, dtype=torch.float64))
    step = torch.eye(4, dtype=torch.float64) - 0.2 * kernel
    torch.testing.assert_close(plain[-1], torch.linalg.matrix_power(step, 7) @ error)
    strengths = torch.rand(7, generator=random, dtype=torch.float64)
    trajectory = predicted_error(kernel, error, y, rate=0.2, strengths=strengths)
    kept, alpha = 1.0, torch.zeros(4, dtype=torch.float64)
    for t, strength in enumerate(strengths):
        alpha = (1 - 0.2 * strength) * alpha + 0.2 * trajectory[t]
        kept = kept * (1 - 0.2 * strength)
        torch.testing.assert_close(trajectory[t + 1], y - kept * (y - error) - kernel @ alpha)
