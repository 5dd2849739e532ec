"""The ridge, against the formula written out in NumPy float64."""

import numpy as np
import pytest
import torch

from falign.lab._learner import SCHEDULES, Learner, make_learner
from falign.lab._validate import resolve
from falign.lab.config import TrainConfig

RATE, STRENGTH, TIME = 0.05, 0.7, 3.0

#: λ(t) for t = 0 … 5, from the formulas.
EXPECTED = {
    "constant": [STRENGTH] * 6,
    "cutoff": [STRENGTH] * 4 + [0.0] * 2,
    "inverse-square": [STRENGTH * 9 / (3 + t) ** 2 for t in range(6)],
    "exponential": [STRENGTH * 2.718281828459045 ** (-t / 3) for t in range(6)],
}


def learner(**options) -> Learner:
    fixed = {
        "dataset": "digits",
        "model": "mlp:64-12-10",
        "rule": "fa",
        "dtype": "float64",
        "learning_rate": RATE,
    }
    config = resolve(TrainConfig(**{**fixed, **options}))
    return make_learner(config, shape=(1, 8, 8), classes=10, example=torch.zeros(2, 1, 8, 8, dtype=torch.float64))


def ridge(schedule: str) -> dict:
    return {
        "ridge": STRENGTH,
        "ridge_schedule": schedule,
        "ridge_steps": None if schedule == "constant" else TIME,
    }


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(10, (20,))


def values(made: Learner) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in made.model.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    found = [SCHEDULES[schedule](STRENGTH, TIME, t) for t in range(6)]
    assert found == pytest.approx(EXPECTED[schedule], rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plain_sgd_follows_the_formula(schedule: str) -> None:
    made = learner(momentum=0.0, **ridge(schedule))
    for t in range(6):
        (x, y), before = batch(), values(made)
        made.step(x, y, t)
        hidden = np.maximum(x.flatten(1).numpy() @ before["fc1.weight"].T + before["fc1.bias"], 0)
        scores = hidden @ before["fc2.weight"].T + before["fc2.bias"]
        shares = np.exp(scores - scores.max(1, keepdims=True))
        error = (shares / shares.sum(1, keepdims=True) - np.eye(10)[y.numpy()]) / len(y)
        factor = 1 - RATE * EXPECTED[schedule][t]
        after = values(made)
        expected = factor * before["fc2.weight"] - RATE * error.T @ hidden
        np.testing.assert_allclose(after["fc2.weight"], expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(after["fc2.bias"], before["fc2.bias"] - RATE * error.sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "weight_decay": 0.1},
        {"optimizer": "adam"},
        {"optimizer": "adamw", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_no_optimizer_sees_it(options: dict) -> None:
    """Beside a twin without ridge, set to the same weights before each step, only (1 - ηλ(t)) W differs."""
    made, twin = learner(**options, **ridge("exponential")), learner(**options)
    for t in range(4):
        x, y = batch()
        twin.model.load_state_dict(made.model.state_dict())
        before = values(made)
        made.step(x, y, t)
        twin.step(x, y, t)
        after, plain = values(made), values(twin)
        shrunk = RATE * EXPECTED["exponential"][t] * before["fc2.weight"]
        np.testing.assert_allclose(after["fc2.weight"], plain["fc2.weight"] - shrunk, rtol=1e-12, atol=1e-14)
        assert np.array_equal(after["fc1.weight"], plain["fc1.weight"])
        assert np.array_equal(after["fc2.bias"], plain["fc2.bias"])


def test_it_has_the_learning_rate_of_the_epoch() -> None:
    made, twin = (learner(rate_decay=0.5, momentum=0.0, **options) for options in (ridge("constant"), {}))
    before = values(made)["fc2.weight"]
    x, y = batch()
    for each in (made, twin):
        each.begin_epoch(3)
        each.step(x, y, 0)
    difference = values(twin)["fc2.weight"] - values(made)["fc2.weight"]
    np.testing.assert_allclose(difference, RATE / 8 * STRENGTH * before, rtol=1e-10, atol=1e-14)


def test_it_acts_on_the_layer_that_runs_last() -> None:
    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(5, 10)
            self.first = torch.nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x.flatten(1))))

    import sys

    sys.modules["turned_network"] = type(sys)("turned_network")
    sys.modules["turned_network"].network = Turned  # pyright: ignore[reportAttributeAccessIssue]
    try:
        made = learner(model="turned_network:network", momentum=0.0, **ridge("constant"))
    finally:
        del sys.modules["turned_network"]
    assert made.layers == ("first", "last")
    x, y = batch()
    before = values(made)
    made.step(x, torch.zeros_like(y), 0)
    twin = before["first.weight"] - values(made)["first.weight"]
    assert made.ridge is not None
    assert made.ridge._weight is made.model.get_parameter("last.weight")
    assert np.abs(twin).max() > 0
