"""Margins against closed forms and a linear program, products and spectra against their definitions."""

from math import inf, sqrt

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.datasets import load_digits

from falign.theory.separability import full_rank_gram, linear_margin, orthogonal_separability


def _labels(*values):
    return torch.tensor(values)


def test_margin_of_two_points_is_half_their_distance():
    X = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert linear_margin(X, _labels(0, 1)).margins == pytest.approx((2.5,))
    assert linear_margin(X + 1000, _labels(0, 1)).margins == pytest.approx((2.5,), rel=1e-4)


def test_margin_of_a_point_and_a_segment():
    X = torch.tensor([[0.0, 1.0], [-5.0, 0.0], [3.0, 0.0]])
    assert linear_margin(X, _labels(7, 2, 2)).margins == pytest.approx((0.5,))
    assert linear_margin(X, _labels(7, 2, 2)).classes == (2, 7)


def test_without_bias_the_hyperplane_goes_through_the_origin():
    X = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -2.0]])
    assert linear_margin(X, _labels(1, 1, 0), bias=False).margins == pytest.approx((1.0,))
    shifted = linear_margin(X + torch.tensor([0.0, 10.0]), _labels(1, 1, 0), bias=False)
    assert not shifted.holds
    assert linear_margin(X + torch.tensor([0.0, 10.0]), _labels(1, 1, 0)).margins == pytest.approx((1.5,))


def test_classes_in_one_another_are_not_separable():
    X = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    result = linear_margin(X, _labels(0, 0, 1, 1))
    assert not result.holds
    assert result.margins == (0.0,)
    same = torch.ones(2, 3)
    assert not linear_margin(same, _labels(0, 1)).holds


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_margin_is_in_units_of_the_inputs(size):
    X = torch.tensor([[0.0, 1.0], [-5.0, 0.0], [3.0, 0.0]], dtype=torch.float64) * size
    assert linear_margin(X, _labels(1, 0, 0)).margins == pytest.approx((0.5 * size,), rel=1e-6)


def test_every_class_of_real_digits_is_judged_as_a_linear_program_judges_it():
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[:600] / 16, labels[:600]
    result = linear_margin(torch.from_numpy(pixels), torch.from_numpy(labels))
    assert result.classes == tuple(range(10))
    for one, margin in zip(result.classes, result.margins, strict=True):
        side = np.where(labels == one, 1.0, -1.0)
        augmented = np.concatenate([pixels, np.ones((600, 1))], 1) * side[:, None]
        program = linprog(np.zeros(65), A_ub=-augmented, b_ub=-np.ones(600), bounds=(None, None))
        assert (margin > 0) == (program.status == 0)


def test_margin_is_not_below_that_of_any_direction_tried():
    random = torch.Generator().manual_seed(0)
    X = torch.randn(12, 3, generator=random, dtype=torch.float64)
    labels = (X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) > 0.2).long()
    found = linear_margin(X, labels).margins[0]
    w = torch.nn.functional.normalize(torch.randn(200_000, 3, generator=random, dtype=torch.float64), dim=1)
    heights = w @ X.mT
    gap = heights.masked_fill(labels == 0, inf).amin(1) - heights.masked_fill(labels == 1, -inf).amax(1)
    assert found >= float(gap.max()) / 2
    assert found == pytest.approx(float(gap.max()) / 2, rel=0.02)


def test_orthogonal_separability_is_the_sign_of_the_worst_products():
    X = torch.tensor([[1.0, 0.5], [2.0, 0.1], [-1.0, 0.2], [-3.0, 0.0]])
    result = orthogonal_separability(X, _labels(0, 0, 1, 1))
    products = X @ X.mT
    assert result.holds
    assert result.least_within == pytest.approx(float(products[2, 2]))
    assert result.largest_between == pytest.approx(float(products[0, 2]))
    assert not orthogonal_separability(X, _labels(0, 1, 1, 0)).holds


def test_products_are_those_of_all_pieces(monkeypatch):
    monkeypatch.setattr("falign.theory.separability._PIECE", 7)
    X, labels = torch.randn(40, 5), torch.randint(0, 3, (40,))
    result, products = orthogonal_separability(X, labels), X.double() @ X.double().mT
    same = labels[:, None] == labels
    assert result.least_within == pytest.approx(float(products[same].min()))
    assert result.largest_between == pytest.approx(float(products[~same].max()))


def test_gram_is_full_rank_for_independent_inputs_only():
    X = torch.diag(torch.tensor([3.0, 2.0, 0.5]))
    result = full_rank_gram(torch.cat([X, torch.zeros(3, 4)], 1))
    assert result.holds
    assert (result.rank, result.smallest, result.condition) == (3, pytest.approx(0.25), pytest.approx(36.0))
    dependent = full_rank_gram(torch.cat([X, X[:1]]))
    assert not dependent.holds
    assert (dependent.rank, dependent.smallest, dependent.condition) == (3, 0.0, inf)
    copied = full_rank_gram(torch.cat([torch.eye(3, 9), torch.eye(3, 9) * sqrt(2)]))
    assert copied.rank == 3


@pytest.mark.parametrize("test", [linear_margin, orthogonal_separability])
@pytest.mark.parametrize(
    ("X", "labels", "named"),
    [
        (torch.ones(3, 2), _labels(1, 1, 1), "all labels are 1"),
        (torch.tensor([[1.0], [float("nan")]]), _labels(0, 1), "1 numbers of the inputs are not finite"),
        (torch.ones(3, 0), _labels(0, 1, 0), "at least one point and one feature"),
    ],
)
def test_what_cannot_be_tested_is_refused(test, X, labels, named):
    with pytest.raises(ValueError, match=named):
        test(X, labels)


@pytest.mark.parametrize("test", [linear_margin, orthogonal_separability])
@pytest.mark.parametrize(
    ("X", "labels", "named"),
    [
        (torch.ones(3), [0, 1, 1], r"shape \(3,\), expected \(points, features\)"),
        (torch.ones(3, 2, 1), [0, 1, 1], r"shape \(3, 2, 1\)"),
        (torch.ones(3, 2) * 1j, [0, 1, 1], "complex"),
        (np.ones((3, 2)) * 1j, [0, 1, 1], "complex"),
        ([[1.0], [1.0, 2.0]], [0, 1], "no table of numbers"),
        ("digits", [0, 1], "expected real numbers"),
        (torch.ones(3, 2), [0.0, 1.0, 1.5], "label 1.5 is no whole number"),
        (torch.ones(3, 2), torch.tensor([0.2, 0.7, 0.7]), "label 0.2 is no whole number"),
        (torch.ones(3, 2), [0, 1, float("nan")], "label nan"),
        (torch.ones(3, 2), torch.eye(3), r"of one-hot labels argmax\(1\)"),
        (torch.ones(3, 2), [0, 1], "3 inputs and 2 labels"),
    ],
)
def test_data_of_another_kind_are_refused_in_a_sentence(test, X, labels, named):
    with pytest.raises(ValueError, match=named):
        test(X, labels)


@pytest.mark.parametrize("make", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.long, torch.Tensor.to_sparse,
                                  lambda X: X.clone().requires_grad_()])  # fmt: skip
def test_data_are_tensors_arrays_or_lists(make):
    X, labels = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0])
    assert linear_margin(make(X), labels.tolist()).margins == pytest.approx((2.5,))
    assert orthogonal_separability(make(X), labels.numpy()) == orthogonal_separability(X, labels)
    assert full_rank_gram(make(X)) == full_rank_gram(X)


@pytest.mark.parametrize("X", [torch.ones(3), torch.ones(2, 2, 2), torch.eye(2).double() * 1e-200, torch.eye(2) * 1j])
def test_a_spectrum_that_cannot_be_told_is_refused(X):
    with pytest.raises(ValueError, match=r"expected|scale the data first|complex"):
        full_rank_gram(X)


def test_products_beyond_float64_are_refused():
    with pytest.raises(ValueError, match="scale the data first"):
        orthogonal_separability(torch.eye(2).double() * 1e200, [0, 1])


def test_sentences():
    X = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert str(linear_margin(X, _labels(0, 1))) == "linear margin: 1 of 1 splits separable, least margin 2.5"
    assert "rank 1 of 2" in str(full_rank_gram(X))
    assert "within a class" in str(orthogonal_separability(X, _labels(0, 1)))
