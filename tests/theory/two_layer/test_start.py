"""What is drawn, that it depends on its seed and sizes only, and the projection of many points."""

import pytest
import torch
import two_layer_oracle as oracle

from falign.feedback import generator
from falign.theory.two_layer import Dual, Penalty, Start, WeightSpace, WidthFree, draw, draw_reduced, project, reduce

ARRAYS = ("X", "y", "W", "beta", "b", "X_test", "y_test")
SIZES = {"n": 6, "d": 7, "p": 2500}


def test_a_draw_depends_on_seed_and_sizes_only():
    alone = draw([5], **SIZES, test=3, activation="tanh")
    block = draw([1, 5], **SIZES, test=3, activation="tanh")
    single = draw([5], **SIZES, test=3, activation="tanh", dtype=torch.float32)
    for name in ARRAYS:
        assert torch.equal(getattr(alone, name)[0], getattr(block, name)[1])
        assert torch.equal(getattr(alone, name).float(), getattr(single, name))
    assert block.seeds == (1, 5)
    without = draw([5], **SIZES, activation="tanh")
    assert torch.equal(without.X, alone.X)
    assert torch.allclose(without.y, alone.y, rtol=1e-13)
    assert without.X_test is None


def test_streams_are_normal_and_unrelated():
    s = draw(range(4), n=50, d=60, p=3000)
    streams = [
        s.X.flatten(1),
        s.W.flatten(1),
        s.beta,
        s.b,
        draw(range(4), n=50, d=60, p=3000, test=9).X_test.flatten(1),
    ]
    for stream in streams:
        size = stream.numel()
        assert abs(stream.mean()) < 5 / size**0.5
        assert abs(stream.square().mean() - 1) < 8 / size**0.5
    short = torch.cat([stream[:, :500] for stream in streams])
    products = torch.corrcoef(short).fill_diagonal_(0)
    assert products.abs().max() < 5 / 500**0.5


def test_teacher_is_the_network():
    s = draw([4], n=6, d=7, p=1500, activation="tanh", outputs=2, test=3)
    random = generator(4, "two-layer", "teacher W")
    W = torch.cat([torch.randn(rows, 7, generator=random) for rows in (1024, 476)]).double().numpy()
    beta = torch.randn(1500, 2, generator=generator(4, "two-layer", "teacher beta")).double().numpy()
    for X, y in ((s.X, s.y), (s.X_test, s.y_test)):
        assert torch.allclose(y[0], torch.from_numpy(oracle.outputs(X[0].numpy(), W, beta, "tanh")), rtol=1e-12)


def test_linear_teacher_and_scaled_inputs():
    plain, scaled = (draw([4], **SIZES, teacher="linear", inputs=inputs) for inputs in ("standard", "scaled"))
    assert torch.allclose(plain.X / 7**0.5, scaled.X, rtol=1e-15)
    assert torch.allclose(plain.y / 7**0.5, scaled.y, rtol=1e-14)
    wide = draw([4], n=6, d=7, p=11, teacher="linear")
    assert torch.equal(wide.y, plain.y)


def test_reduced_draw_is_the_reduced_draw():
    whole = reduce(draw([1, 5], **SIZES, test=3, activation="relu", weights="scaled"))
    pieces = draw_reduced([1, 5], **SIZES, test=3, activation="relu", weights="scaled")
    for name in ("X", "y", "U", "beta", "b", "X_test", "y_test", "U_test"):
        assert torch.allclose(getattr(whole, name), getattr(pieces, name), rtol=1e-13, atol=1e-14)
    assert draw_reduced([1], **SIZES).U_test is None


def test_shared_data_are_reduced_for_every_seed():
    s = draw([1, 5], **SIZES)
    shared = reduce(Start(X=s.X[0], y=s.y[0], W=s.W, beta=s.beta, b=s.b))
    assert torch.allclose(shared.U, s.X[:1] @ s.W.mT, rtol=1e-13)
    assert shared.y.shape == (2, 6)


def test_projection_of_many_points_has_the_same_run():
    """n > d: the loss is that of d points and a constant, at every step."""
    s = draw([0, 1, 2], n=12, d=5, p=9)
    s = Start(**{**vars(s), "y": s.y + torch.randn(3, 12, dtype=torch.float64)})
    R, y, rest = project(s.X, s.y)
    assert R.shape == (3, 5, 5)
    V = torch.randn(3, 5, 1, dtype=torch.float64)
    left = (s.X @ V - s.y[..., None]).square().sum((1, 2))
    assert torch.allclose(left, (R @ V - y[..., None]).square().sum((1, 2)) + rest, rtol=1e-13)
    few = Start(X=R, y=y, W=s.W, beta=s.beta, b=s.b)
    runs = [WeightSpace(start, rate=2e-3, penalties=[Penalty(), Penalty(2.0)]) for start in (s, few)]
    for run in runs:
        run.advance(200)
    many, projected = (run.measure() for run in runs)
    assert torch.allclose(many["loss"], projected["loss"] + rest[:, None] / 2, rtol=1e-12)
    assert torch.allclose(many["cosine"], projected["cosine"], rtol=1e-11)


@pytest.mark.parametrize("size", ["n", "d", "p", "outputs"])
def test_empty_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"{size} is 0, expected a whole number from 1 on"):
        draw([0], **{"n": 2, "d": 2, "p": 2, size: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": torch.zeros(2, 6, 8).double()}, r"X has shape \[2, 6, 8\], the other arrays ask for \[2, 6, 7\]"),
        ({"y": torch.zeros(2, 5).double()}, r"y has shape \[2, 5\], the other arrays ask for \[2, 6\]"),
        ({"beta": torch.zeros(2, 8).double()}, "beta has shape"),
        ({"b": torch.zeros(2, 9, 1).double()}, "b has shape"),
        ({"W": torch.zeros(9, 7).double()}, "W must be"),
        ({"X": torch.full((2, 6, 7), torch.nan).double()}, "84 numbers of X are not finite"),
        ({"y": torch.zeros(2, 6)}, "y is torch.float32"),
        ({"X": torch.zeros(2, 0, 7).double(), "y": torch.zeros(2, 0).double()}, "X is empty"),
        ({"X_test": torch.zeros(2, 3, 7).double()}, "X_test and y_test come together"),
        ({"X_test": torch.zeros(3, 7).double(), "y_test": torch.zeros(3).double()}, "must have X's axes"),
        ({"seeds": (1,)}, "1 seeds were named for W of 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Start(**{**vars(draw([0, 1], n=6, d=7, p=9)), **change})


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="seeds is 0, expected a whole number from 1 on"):
        draw([], n=2, d=2, p=2)
    with pytest.raises(ValueError, match="unknown activation"):
        draw([0], n=2, d=2, p=2, activation="swish")
    with pytest.raises(ValueError, match="only a scalar output"):
        reduce(draw([0], n=2, d=2, p=2, outputs=3))


def test_a_negative_number_of_test_points_is_refused():
    for drawing in (draw, draw_reduced):
        with pytest.raises(ValueError, match="test is -1, expected a whole number from 0 on"):
            drawing([0], n=2, d=2, p=2, test=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match=f"float32 or float64, got {dtype}"):
        draw([0], n=2, d=2, p=2, dtype=dtype)
    with pytest.raises(ValueError, match="float32 or float64"):
        draw_reduced([0], n=2, d=2, p=2, dtype=dtype)
    with pytest.raises(ValueError, match="float32 or float64"):
        WidthFree.sample([0], n=2, d=2, p=2, rate=0.1, dtype=dtype)
    arrays = vars(draw([0], n=2, d=2, p=2))
    half = {name: value.to(dtype) for name, value in arrays.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="float32 or float64"):
        Start(**half)


@pytest.mark.parametrize("engine", [WeightSpace, Dual, WidthFree.from_start])
def test_engines_do_not_go_back(engine):
    run = engine(draw([0], n=2, d=3, p=4), rate=0.1)
    run.advance(0)
    with pytest.raises(ValueError, match="at least 0 steps, got -3"):
        run.advance(-3)
    assert run.t == 0
