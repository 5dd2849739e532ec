"""The engine in weight space against Algorithm 1 in NumPy, and the laws that its runs obey."""

import numpy as np
import pytest
import torch
import two_layer_oracle as oracle
from two_layer_cases import PENALTIES, RATES

from falign.feedback import generator
from falign.theory.two_layer import Penalty, Start, WeightSpace, draw, simulate
from falign.theory.two_layer._trajectory import error_cosine


def start(outputs=None, seeds=(3, 8), p=9, **kwargs):
    return draw(seeds, n=6, d=7, p=p, outputs=outputs, **kwargs)


def arrays(start, seed):
    scalar = start.beta.dim() == 2
    shared = start.X.dim() == 2
    pick = lambda tensor: tensor.numpy() if shared else tensor[seed].numpy()  # noqa: E731
    column = lambda array: array[..., None] if scalar else array  # noqa: E731
    weights = [column(tensor[seed].numpy()) for tensor in (start.beta, start.b)]
    return [pick(start.X), column(pick(start.y)), start.W[seed].numpy(), *weights]


def close(got, expected, tolerance=1e-12):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def compare(start, engine, steps, *, penalties, activation, rate, loss="squared", of=lambda seed: {}):
    """Weights, errors and measures of every run against the oracle's."""
    engine.advance(steps)
    measured, errors = engine.measure(), engine.error()
    for seed in range(start.W.shape[0]):
        X, y, W0, beta0, b = arrays(start, seed)
        for place, penalty in enumerate(penalties):
            law = (penalty.strength, penalty.schedule, penalty.steps)
            W, beta = oracle.train(
                X, y, W0, beta0, b, activation=activation, rate=rate, steps=steps, penalty=law, loss=loss, **of(seed)
            )
            close(engine.W[seed, place], W)
            close(engine.beta[seed, place].reshape(beta.shape), beta)
            f = oracle.outputs(X, W, beta, activation)
            close(errors[seed, place].reshape(f.shape), y - f if loss == "squared" else y - oracle.softmax(f))
            expected = oracle.numbers(X, y, W, beta, b, W0, beta0, activation, loss)
            for name in measured:
                close(measured[name][seed, place], expected[name], 1e-11)


@pytest.mark.parametrize("outputs", [None, 1, 3])
@pytest.mark.parametrize("activation", RATES)
def test_weights_equal_the_definition(activation, outputs):
    s, rate = start(outputs), RATES[activation]
    engine = WeightSpace(s, activation=activation, rate=rate, penalties=PENALTIES)
    compare(s, engine, 200, penalties=PENALTIES, activation=activation, rate=rate)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_batches_and_dropout_equal_the_definition(loss, shared):
    """Masks and batches are those of the named generators."""
    s = start(3)
    if shared:
        s = Start(X=s.X[0], y=s.y[0], W=s.W, beta=s.beta, b=s.b, seeds=s.seeds)
    if loss == "softmax":
        s = Start(X=s.X, y=s.y.softmax(-1), W=s.W, beta=s.beta, b=s.b, seeds=s.seeds)
    penalties, rate = [Penalty(), Penalty(1.0)], 1e-2
    engine = WeightSpace(s, activation="tanh", rate=rate, penalties=penalties, loss=loss, batch=4, dropout=0.3)

    def of(seed):
        name = (3, 8)[seed]
        orders = [torch.randperm(6, generator=generator(name, "two-layer", f"batches {k}")).numpy() for k in range(50)]
        drawing = generator(name, "two-layer", "dropout")
        drawn = [(torch.rand(9, (4, 2)[t % 2], generator=drawing) >= 0.3).double().numpy() for t in range(99)]
        return {
            "batches": lambda t: orders[t // 2][:4] if t % 2 == 0 else orders[t // 2][4:],
            "masks": lambda t: drawn[t],
            "dropout": 0.3,
        }

    compare(s, engine, 99, penalties=penalties, activation="tanh", rate=rate, loss=loss, of=of)


def test_given_masks_are_taken():
    s = start()
    kept = [(torch.rand(2, 9, 6, generator=generator(0, "masks", str(t))) > 0.5).double() for t in range(50)]
    engine = WeightSpace(s, activation="relu", rate=2e-3, dropout=0.5, masks=lambda t, points: kept[t])
    of = lambda seed: {"masks": lambda t: kept[t][seed].numpy(), "dropout": 0.5}  # noqa: E731
    compare(s, engine, 50, penalties=[Penalty()], activation="relu", rate=2e-3, of=of)


def test_weight_scaling_and_steps_in_pieces():
    """W ~ N(0, 1/d) is W ~ N(0, 1) divided by √d; advancing 7 + 13 steps is advancing 20."""
    a, b = start(weights="standard"), start(weights="scaled")
    close(a.W / 7**0.5, b.W, 1e-15)
    whole, pieces = (WeightSpace(b, activation="tanh", rate=1e-2, penalties=PENALTIES, batch=4) for _ in range(2))
    whole.advance(20)
    pieces.advance(7)
    pieces.advance(13)
    assert pieces.t == 20
    assert torch.equal(whole.W, pieces.W)


def test_a_seed_does_not_depend_on_its_block():
    values = []
    for seeds in ((5,), (1, 5, 9)):
        s = draw(seeds, n=6, d=7, p=9, outputs=2)
        engine = WeightSpace(s, activation="relu", rate=1e-3, penalties=PENALTIES[: len(seeds)], batch=4, dropout=0.2)
        engine.advance(60)
        place = seeds.index(5)
        values.append([engine.W[place, 0], *(value[place, 0] for value in engine.measure().values())])
    for one, other in zip(*values, strict=True):
        close(one, other)


def test_accuracy_and_outputs_on_other_points():
    s = start(3)
    engine = WeightSpace(s, activation="relu", rate=1e-3)
    X = torch.randn(11, 7, dtype=torch.float64)
    labels = torch.randint(0, 3, (11,))
    f = engine.outputs(X)
    for seed in range(2):
        expected = oracle.outputs(X.numpy(), *(arrays(s, seed)[2:4]), "relu")
        close(f[seed, 0], expected)
        assert engine.accuracy(X, labels)[seed, 0] == pytest.approx((expected.argmax(1) == labels.numpy()).mean())


def test_evaluation_in_pieces_is_evaluation(monkeypatch):
    engine = WeightSpace(start(3, test=5), activation="relu", rate=1e-3)
    whole = engine.measure()
    monkeypatch.setattr("falign.theory.two_layer._weight_space._ELEMENTS", 60)
    for name, value in engine.measure().items():
        close(value, whole[name], 1e-14)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_alignment_law(activation):
    """``<b, β>`` grows by ``½|W|²`` less what the ridge took: exact in the flow, O(η) in steps."""

    def gap(rate, steps):
        s = start(p=40)
        engine = WeightSpace(s, activation=activation, rate=rate, penalties=[Penalty(2.0)])
        before = (engine.beta[:, 0] * s.b).sum(-1)
        lost = torch.zeros_like(before)
        for _ in range(steps):
            lost += rate * 2.0 * (engine.beta[:, 0] * s.b).sum(-1)
            engine.advance(1)
        after = engine.measure()
        assert (after["weight_growth"] > 0.1).all()
        return after["b_dot_beta"][:, 0] - before - after["weight_growth"][:, 0] + lost

    coarse, fine = gap(2e-3, 100), gap(2e-4, 1000)
    assert (coarse / fine).allclose(torch.tensor(10.0, dtype=torch.float64), rtol=0.1)


def test_linear_reduction():
    """``β(t) = k^t β(0) + (η/√p) W(0)Xᵀ α₁ + (η²/p) b α₂``: the paper's closed form with its coefficient squared."""
    s, rate, strength, steps = start(p=40), 2e-3, 3.0, 80
    engine = WeightSpace(s, rate=rate, penalties=[Penalty(strength)])
    errors = []
    for _ in range(steps):
        errors.append(engine.error()[:, 0])
        engine.advance(1)
    k, p = 1 - rate * strength, 40
    past = torch.zeros_like(errors[0])
    first, second = torch.zeros_like(past), torch.zeros_like(past[:, 0])
    K = s.X @ s.X.mT
    for step, e in enumerate(errors):
        weight = k ** (steps - 1 - step)
        first += weight * e
        second += weight * torch.einsum("si,sij,sj->s", past, K, e)
        past += e
    expected = k**steps * s.beta + rate / p**0.5 * torch.einsum("spd,snd,sn->sp", s.W, s.X, first)
    close(engine.beta[:, 0], expected + rate**2 / p * s.b * second[:, None])


def test_divergence_is_recorded_and_disturbs_no_other_run():
    s = draw([0, 1], n=6, d=7, p=9)
    s = Start(**{**vars(s), "X": s.X * torch.tensor([1.0, 30.0])[:, None, None].double()})
    with pytest.warns(UserWarning, match="2 of 4 runs are no longer finite, the first at step"):
        trajectory = simulate(WeightSpace(s, rate=2e-3, penalties=[Penalty(), Penalty(1.0)]), [0, 1, 50, 300, 900])
    assert trajectory.diverged[0].tolist() == [-1, -1]
    assert (trajectory.diverged[1] > 0).all()
    alone = simulate(
        WeightSpace(draw([0], n=6, d=7, p=9), rate=2e-3, penalties=[Penalty(), Penalty(1.0)]), [0, 1, 50, 300, 900]
    )
    for name, values in trajectory.values.items():
        close(values[0], alone.values[name][0])
        for run in range(2):
            gone = trajectory.steps >= trajectory.diverged[1, run]
            assert values[1, run, gone].isnan().all()
            assert values[1, run, ~gone].isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 0.0}, "rate η must be a positive number, got 0.0"),
        ({"rate": float("nan")}, "rate η"),
        ({"penalties": []}, "penalties is empty"),
        ({"activation": "swish"}, "unknown activation 'swish': choose one of identity"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"loss": "softmax"}, "softmax loss needs k outputs"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"batch": 7}, "a batch has 1 to 6 points, got 7"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        WeightSpace(start(), **{"rate": 1e-3, **given})


def test_the_cosine_of_errors_does_not_depend_on_their_size():
    random = torch.Generator().manual_seed(0)
    e = torch.randn(1, 1, 6, 3, generator=random)
    b, beta = torch.randn(1, 1, 40, 3, generator=random), torch.randn(1, 1, 40, 3, generator=random)
    expected = torch.nn.functional.cosine_similarity(e @ b.mT, e @ beta.mT, dim=-1).mean(-1)
    torch.testing.assert_close(error_cosine(e, b[:, 0:1], beta), expected)
    small = e * torch.tensor([1.0, 1e-10, 1e-20, 1e-30, 1e-36, 1e3])[:, None]
    torch.testing.assert_close(error_cosine(small, b, beta), expected)
    vanished = torch.cat([e, torch.zeros(1, 1, 5, 3)], 2)
    torch.testing.assert_close(error_cosine(vanished, b, beta), expected)
