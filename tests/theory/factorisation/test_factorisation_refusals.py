"""What the factorisation refuses, each in one sentence."""

from math import inf, nan

import pytest
import torch
from factorisation_cases import matrix, problem

from falign.theory.factorisation import (
    RatioLaw,
    State,
    best_error,
    expected_bound,
    feedback,
    flat_spectrum,
    flat_tail,
    flat_tail_error,
    from_network,
    gradient_descent,
    gradient_flow,
    isotropic,
    last_direction,
    lyapunov,
    lyapunov_rate,
    near_orthogonality,
    normal,
    optimum,
    orthonormal,
    overlap,
    principal_angles,
    range_finder,
    range_finder_ratios,
    rate_in_factorisation,
    sampling_bound,
    separation,
    stationary,
    sufficient_rate,
    velocity,
    zero,
)

untyped = pytest.mark.unchecked
Y, B = problem()
START = zero(Y, B)


def _descend(method="fa", y=Y, b=B, start=START, rate=0.01, steps=2, names=("error",), at=None):
    return gradient_descent(method, y, b, start, rate=rate, steps=steps, names=names, at=at)


def _flow(times=(0.0, 1.0), y=Y, b=B, start=START, **others):
    return gradient_flow("fa", y, b, start, times=times, names=["error"], **others)


def _poor():
    poor = B.clone()
    poor[1, 2] = poor[1, 0] + poor[1, 1]
    return poor


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: _descend("bp"), "unknown method 'bp': choose one of fa, fa\\*, gd"),
        (lambda: _descend(y=Y * nan), "80 numbers of Y are not finite"),
        (lambda: _descend(b=_poor()), "B of run 1 has rank 2, expected 3, the full rank of a 3 by"),
        (lambda: _descend(y=matrix(8, 2)), r"start\.W has shape \[3, 3, 10\], expected \[runs r m\]"),
        (lambda: _descend(start=zero(matrix(8, 9), B)), r"start\.W has shape \[3, 3, 9\], expected \[runs r m\]"),
        (lambda: _descend(start=START._replace(W=START.W + inf)), "90 numbers of W are not finite"),
        (lambda: _descend(y=Y.float()), "B is torch.float64 on cpu, Y torch.float32"),
        (lambda: _descend(rate=0.0), "rate is 0.0, expected a positive number"),
        (lambda: _descend(rate=nan), "rate is nan"),
        (lambda: _descend(steps=-1), "steps is -1"),
        (lambda: _descend(at=[0, 3]), "recording steps must increase from 0 to at most 2"),
        (lambda: _descend(names=["loss", "los"]), "unknown measurement 'los': choose from error"),
        (lambda: _descend("fa*"), r"W\(0\), of which fa\* takes the best output layer, of run 0 has rank 0"),
        (lambda: _flow(times=[1.0, 2.0]), "times must increase from 0"),
        (lambda: _flow(times=[0.0, inf]), r"times\[1\] is inf, expected a finite number"),
        (lambda: _flow(tolerance=0.0), "tolerance is 0.0"),
        (lambda: _flow(y=Y.float(), b=B.float(), start=State(*(p.float() for p in START))), "integrated in float64"),
        (lambda: velocity("sgd", Y, B, START), "unknown method"),
        (lambda: optimum(Y, 9), r"r is 9, expected a whole number from 1 to min\(n, m\) = 8"),
        (lambda: best_error(Y * inf, 2), "80 numbers of Y are not finite"),
        (lambda: feedback(8, 3, seeds=[]), "seeds are empty"),
        (lambda: feedback(8, 3, seeds=[0], scale=-1.0), "scale is -1.0"),
        (lambda: feedback(8, 0, seeds=[0]), "sizes above 0"),
        (lambda: normal(Y, B, seeds=[0]), "1 seeds for 3 draws of B"),
        (lambda: normal(Y, B, seeds=range(3), scale=nan), "scale is nan"),
        (lambda: orthonormal(Y, B, seeds=[0, 1]), "2 seeds for 3 draws of B"),
        (lambda: range_finder(Y, B, rank=4), "rank is 4 and power 0, expected 1 to the 3 rows"),
        (lambda: range_finder(Y, B, power=-1), "power -1"),
        (lambda: range_finder_ratios(Y, B, rank=2, oversampling=[2], power=[0]), "expected 0 to 1"),
        (lambda: range_finder_ratios(problem(rank=2)[0], B, rank=2, oversampling=[0], power=[0]), "no ratio to it"),
        (lambda: expected_bound(torch.ones(4), 1), "r is 1, expected 2 to 4"),
        (lambda: expected_bound(torch.ones(4) * nan, 3), "4 numbers of singular_values are not finite"),
        (
            lambda: range_finder_ratios(Y, B, rank=2, oversampling=[], power=[0]),
            r"oversampling is \[\] and power \[0\]",
        ),
        (lambda: range_finder_ratios(Y, B, rank=2, oversampling=[0], power=[]), "at least one of each"),
        (lambda: overlap(B * nan, B), "72 numbers of W are not finite"),
        (lambda: velocity("fa*", Y, B, START), r"W\(0\).* of run 0 has rank 0"),
        (lambda: sufficient_rate("fa*", Y, B, START), r"W\(0\).* of run 0 has rank 0"),
        (
            lambda: velocity("fa", Y, B, START._replace(W=START.W[:, :, :9])),
            r"state\.W has shape \[3, 3, 9\], expected \[runs r m\]",
        ),
        (lambda: expected_bound(torch.arange(4.0), 3), "singular values that fall"),
        (lambda: last_direction(0, 0.1), "size is 0"),
        (lambda: last_direction(2, 0.0), "epsilon is 0.0"),
        (lambda: flat_tail(2, 5, 1.0), "share is 1.0"),
        (lambda: flat_spectrum(5, 5), "expected m above r = 5"),
        (lambda: RatioLaw(r=3, epsilon=1.0), "epsilon is 1.0, expected a number of at least 1e-12 and below 1"),
        (lambda: RatioLaw(r=2, epsilon=1e-170), "epsilon is 1e-170"),
        (lambda: RatioLaw(r=2, epsilon=0.1).quantile([0.5, 2.0]), "expected numbers from 0 to 1"),
        (lambda: RatioLaw(r=2, epsilon=0.1).quantile(nan), "probability is nan"),
        (lambda: flat_tail_error(matrix(2, 2)[None], -1.0), "tail_energy is -1.0"),
        (lambda: separation(3, 1e-16, seeds=[0]), "epsilon is 1e-16"),
        (lambda: separation(3, 0.1, seeds=[0], delta=1.0), "delta is 1.0"),
        (lambda: near_orthogonality(matrix(8, 8, 3), B), "there is no ratio"),
        (lambda: near_orthogonality(matrix(8, 8), B[:1]), "B is a single draw"),
        (lambda: sampling_bound(Y, B[:1]), "B is a single draw"),
        (lambda: isotropic(3, 4, seed=0), "at least as many points"),
        (lambda: from_network(matrix(3, 5), matrix(4, 3), torch.zeros(4, 3).double()), "B of run 0 has rank 0"),
        (lambda: rate_in_factorisation(0.0, 3), "rate is 0.0"),
    ],
)
def test_what_does_not_fit(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@untyped
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: _descend(b=B[0]), r"B has shape \[3, 8\], expected \[runs r n\]"),
        (lambda: _descend(y=matrix(8, 10, runs=2)), "expected"),
        (lambda: _descend(y=matrix(7, 10)), r"B has shape \[3, 3, 8\], expected \[runs r n\]"),
        (lambda: stationary(Y, B[:, :, :5]), r"B has shape \[3, 3, 5\], expected \[runs r n\]"),
        (lambda: _descend(steps=2.5), r"steps must be an integer, got 2\.5 of type float"),
        (lambda: _descend(names="error"), "names is 'error', expected a sequence"),
        (lambda: feedback(8, 3, seeds=3), "seeds is 3, expected a sequence"),
        (
            lambda: from_network(matrix(3, 5), matrix(4, 2), matrix(4, 2)),
            r"second has shape \[4, 2\], expected \[n r\]",
        ),
        (lambda: rate_in_factorisation(0.1, 3, reduction="none"), "reduction is 'none'"),
        (lambda: rate_in_factorisation(0.1, 3, reduction=[]), r"reduction is \[\]"),
        (lambda: rate_in_factorisation(0.1, 3.5), r"outputs must be an integer, got 3\.5 of type float"),
        (lambda: isotropic(5, 4, seed="a"), "seed must be an integer, got 'a' of type str"),
        (lambda: _flow(times=1.0), r"times has shape \[\], expected \[times\]"),
        (lambda: overlap(matrix(3, 9), matrix(3, 8)), r"other has shape \[3, 8\], expected \[\*runs r m\]"),
        (lambda: principal_angles(matrix(2, 9), matrix(3, 9)), r"other has shape \[3, 9\], expected \[\*runs r m\]"),
        (lambda: lyapunov(Y, B, START.W, START.Z), r"Z has shape \[3, 3, 10\], expected \[runs n r\]"),
        (lambda: lyapunov_rate(Y, B, START.W, START.Z), r"Z has shape \[3, 3, 10\], expected \[runs n r\]"),
        (lambda: near_orthogonality(matrix(8, 8, runs=3), B), r"Y has shape \[3, 8, 8\], expected \[n m\]"),
        (lambda: sampling_bound(matrix(8, 8, runs=3), B), r"Y has shape \[3, 8, 8\], expected \[n m\]"),
        (
            lambda: range_finder_ratios(Y, B, rank="a", oversampling=[0], power=[0]),
            "rank must be an integer, got 'a' of type str",
        ),
        (lambda: expected_bound(torch.ones(2, 2), 2), r"singular_values has shape \[2, 2\], expected \[values\]"),
    ],
)
def test_what_checked_annotations_refuse_too(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_a_flow_that_takes_too_long_says_so(monkeypatch):
    monkeypatch.setattr("falign.theory.factorisation._simulate._LONGEST", 50)
    with pytest.raises(RuntimeError, match=r"gradient flow took 50 evaluations to t = .* of 100: ask for"):
        _flow(times=[0.0, 100.0])


@pytest.mark.parametrize("near", [3e-8, 1e-8, 1e-9])
def test_rows_that_nearly_depend_on_each_other_are_refused_under_the_optimal_output(near):
    start = normal(Y, B, seeds=range(3))
    start.W[:, 2] = start.W[:, 0] + near * start.W[:, 2]
    for refused in (lambda: _descend("fa*", start=start), lambda: sufficient_rate("fa*", Y, B, start)):
        with pytest.raises(ValueError, match=r"has condition number .*e\+.* in run 0, expected at most 6.7e\+06: draw"):
            refused()
