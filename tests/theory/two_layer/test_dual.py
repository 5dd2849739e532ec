"""The engine on preactivations against the one in weight space, whole and in pieces."""

import pytest
import torch
from two_layer_cases import PENALTIES, RATES, agree

from falign.theory.two_layer import Dual, Start, WeightSpace, draw, draw_reduced, simulate

pytestmark = pytest.mark.unchecked  # many steps: checking annotations would take most of the time

AT = [0, 1, 40, 300]


@pytest.mark.parametrize("activation", RATES)
@pytest.mark.parametrize("shape", [(6, 7, 9), (9, 4, 5), (1, 1, 1)])
def test_equals_the_engine_in_weight_space(activation, shape):
    """Also with more points than dimensions, and with one of each."""
    n, d, p = shape
    s = draw((3, 8, 4), n=n, d=d, p=p, test=5, activation=activation)
    options = {"activation": activation, "rate": RATES[activation], "penalties": PENALTIES}
    weight_space, dual = WeightSpace(s, **options), Dual(s, **options)
    agree(simulate(dual, AT), simulate(weight_space, AT), 1e-12)
    assert torch.allclose(dual.error(), weight_space.error(), rtol=0, atol=1e-12)
    assert torch.allclose(dual.beta, weight_space.beta, rtol=0, atol=1e-12)
    assert torch.allclose(dual.U, s.X[:, None] @ weight_space.W.mT, rtol=0, atol=1e-11)


def test_reduced_and_shared_starts_are_starts():
    sizes = {"n": 6, "d": 7, "p": 9, "test": 4}
    s = draw((3, 8), **sizes)
    expected = simulate(Dual(s, rate=1e-3), AT)
    agree(simulate(Dual(draw_reduced((3, 8), **sizes), rate=1e-3), AT), expected, 1e-12)
    shared = Start(X=s.X[0], y=s.y[0], W=s.W, beta=s.beta, b=s.b)
    both = [simulate(kind(shared, activation="tanh", rate=1e-2), AT) for kind in (Dual, WeightSpace)]
    agree(*both, 1e-12)


def test_the_start_is_left_as_it_was():
    s = draw_reduced((3, 8), n=6, d=7, p=9)
    before = {name: value.clone() for name, value in vars(s).items() if value is not None}
    for activation in RATES:
        Dual(s, activation=activation, rate=1e-3).advance(3)
    assert all(torch.equal(getattr(s, name), value) for name, value in before.items())


def test_a_seed_does_not_depend_on_its_block():
    def run(seeds, penalties):
        return Dual(draw(seeds, n=6, d=7, p=40, test=3), activation="tanh", rate=1e-2, penalties=penalties)

    alone, block = (simulate(run(*given), AT) for given in (((5,), PENALTIES[1:2]), ((1, 5, 9), PENALTIES)))
    for name, values in alone.values.items():
        assert torch.allclose(values[0, 0], block.values[name][1, 1], rtol=1e-12, atol=1e-13)


def test_single_precision_follows_double():
    s, single = (
        draw([0], n=20, d=30, p=50, activation="tanh", test=5, dtype=t) for t in (torch.float64, torch.float32)
    )
    exact, rounded = (simulate(Dual(start, activation="tanh", rate=1e-2), AT) for start in (s, single))
    assert rounded.values["loss"].dtype == torch.float32
    agree(rounded, exact, 2e-4)


def test_divergence_is_recorded():
    s = draw([0, 1], n=6, d=7, p=9)
    s = Start(**{**vars(s), "X": s.X * torch.tensor([1.0, 30.0])[:, None, None].double()})
    with pytest.warns(UserWarning, match="1 of 2 runs are no longer finite, the first at step"):
        trajectory = simulate(Dual(s, activation="relu", rate=2e-3), [0, 1, 50, 900])
    assert trajectory.diverged.tolist() == [[-1], [trajectory.diverged[1].item()]]
    assert trajectory.diverged[1].item() > 0
    assert trajectory.values["cosine"][1, 0, -1].isnan()
    assert all(values[0].isfinite().all() for values in trajectory.values.values())


def test_more_outputs_are_refused():
    with pytest.raises(ValueError, match=r"only a scalar output can be reduced, .* use WeightSpace"):
        Dual(draw([0], n=2, d=2, p=2, outputs=2), rate=0.1)
    with pytest.raises(ValueError, match="rate"):
        Dual(draw([0], n=2, d=2, p=2), rate=-0.1)


@pytest.mark.parametrize(("size", "chunk"), [(1, 1), (20, 2), (100, 800), (200, 5), (10_000, 2)])
@pytest.mark.parametrize("activation", RATES)
def test_tiles_of_every_size_are_the_whole(activation, size, chunk, monkeypatch):
    """Single neurons, parts of a run, a run, several runs, one chunk and many; 9 neurons leave a remainder."""
    s = draw((3, 8, 4), n=6, d=7, p=9, activation=activation, test=3)
    options = {"activation": activation, "rate": RATES[activation], "penalties": PENALTIES[:3]}
    whole = simulate(Dual(s, **options), AT)
    monkeypatch.setattr("falign.theory.two_layer._dual._CACHED", size)
    monkeypatch.setattr("falign.theory.two_layer._dual._CHUNK", chunk)
    agree(simulate(Dual(s, **options), AT), whole, 1e-12)


@pytest.mark.parametrize("activation", RATES)
def test_single_precision_in_chunks_follows_double(activation, monkeypatch):
    """Also the form that an activation has in float32 only; what X's pseudoinverse magnifies is left out."""
    monkeypatch.setattr("falign.theory.two_layer._dual._CHUNK", 16)
    starts = [
        draw((3, 8), n=20, d=30, p=50, activation=activation, test=5, dtype=t) for t in (torch.float64, torch.float32)
    ]
    names = ("loss", "cosine", "beta_norm", "b_dot_beta", "beta_change", "weight_change", "test_loss")
    options = {"activation": activation, "rate": RATES[activation] / 5, "penalties": PENALTIES[:3]}
    exact, rounded = (simulate(Dual(s, **options), AT, names) for s in starts)
    agree(rounded, exact, 2e-4)
    single = Dual(starts[1], activation=activation, rate=1e-3)
    assert torch.allclose(single.U[:, 0], starts[1].X @ starts[1].W.mT, rtol=1e-5, atol=1e-5)


def test_only_what_is_named_is_measured(monkeypatch):
    engine = Dual(draw((3, 8), n=6, d=7, p=9, test=3), rate=1e-3)
    engine.advance(5)
    whole = engine.measure()
    for name, value in whole.items():
        assert list(engine.measure([name])) == [name]
        assert torch.equal(engine.measure([name])[name], value)
    monkeypatch.setattr(Dual, "_travelled", None)
    assert list(engine.measure({"cosine", "loss"})) == ["loss", "cosine"]
    with pytest.raises(ValueError, match="unknown measurement 'accuracy': choose from b_dot_beta, beta_change"):
        engine.measure(["loss", "accuracy"])
    with pytest.raises(ValueError, match="no measurement was named"):
        engine.measure([])
