"""Checks of arguments: what they return, and the sentence of each refusal."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from falign import _validation as v

pytestmark = pytest.mark.unchecked  # arguments of wrong types are the point

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (lambda: v.positive("rate", 2), 2),
        (lambda: v.non_negative("decay", 0.0), 0.0),
        (lambda: v.fraction("delta", 0.5), 0.5),
        (lambda: v.fraction("share", 1, below=False), 1),
        (lambda: v.whole_number("n", np.int64(3)), 3),
        (lambda: v.whole_between("depth", 2, 2, 2), 2),
        (lambda: v.step_count(0), 0),
        (lambda: v.named("loss", "squared", {"squared": 7}), 7),
        (lambda: v.one_of("rule", "fa", ("bp", "fa")), "fa"),
        (lambda: v.as_list("seeds", np.arange(2)), [0, 1]),
        (lambda: v.recording_steps(3, None), [0, 1, 2, 3]),
        (lambda: v.recording_times([0, 1]).tolist(), [0.0, 1.0]),
        (lambda: v.class_labels([2, 0], 2).tolist(), [2, 0]),
        (lambda: v.dense_tensor("X", [1, 2])[1], True),
        (lambda: v.dense_tensor("X", np.ones(2))[1], False),
        (lambda: v.check_sizes(n=1, batch=None), None),
        (lambda: v.check_same_format(), None),
        (lambda: v.check_recording(5, [5, 7]), None),
    ],
)
def test_a_good_argument_comes_back(returned, expected):
    assert returned() == expected


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda: v.positive("rate", 0), "rate is 0, expected a positive number"),
        (lambda: v.positive("rate", True), "rate is True, expected a positive number"),
        (lambda: v.positive("rate", math.inf), "rate is inf, expected a positive number"),
        (lambda: v.positive("rate", 10**400), "rate is 1000"),
        (lambda: v.non_negative("decay", -1e-9), "decay is -1e-09, expected a number of at least 0"),
        (lambda: v.non_negative("decay", math.nan), "decay is nan"),
        (lambda: v.fraction("delta", 1), "delta is 1, expected a number above 0 and below 1"),
        (lambda: v.fraction("delta", 0.0), "delta is 0.0"),
        (lambda: v.fraction("share", 1.5, below=False), "share is 1.5, expected a number above 0 and up to 1"),
        (lambda: v.fraction("share", Fraction(1, 2)), r"share is Fraction\(1, 2\)"),  # pyright: ignore
        (lambda: v.whole_number("steps", 1e9), r"steps must be an integer, got 1000000000\.0 of type float: write int"),
        (lambda: v.whole_number("n", 2**63), "n must be below 2⁶³"),
        (lambda: v.whole_between("depth", 1, 2, 9), "depth is 1, expected a whole number from 2 on, up to 9"),
        (lambda: v.whole_between("r", 10**400, 1), "r must be below 2⁶³"),
        (lambda: v.whole_between("test", -1, 0), "test is -1, expected a whole number from 0 on$"),
        (lambda: v.check_sizes(n=2, p=0), "p is 0, expected a whole number from 1 on"),
        (lambda: v.step_count(0, least=1), "steps is 0, expected a whole number from 1 on"),
        (lambda: v.step_count(10**10), "steps is 10000000000, expected at most 1000000000"),
        (lambda: v.named("loss", ["squared"], {"squared": 7}), r"unknown loss \['squared'\]: choose one of squared"),
        (lambda: v.one_of("rule", "kp", ("bp", "fa")), "rule is 'kp', expected one of bp, fa"),
        (lambda: v.as_list("seeds", 3), "seeds is 3, expected a sequence, such as a list"),
        (lambda: v.recording_steps(3, [0, 0]), r"recording steps must increase from 0 to at most 3, got \[0, 0\]"),
        (lambda: v.check_recording(5, [4, 6]), r"recording steps must increase from the engine's t=5 on, got \[4, 6\]"),
        (lambda: v.recording_times([0.0]), "times must increase from 0, at least two of them"),
        (lambda: v.real_tensor("X", [1j]), "X are complex"),
        (lambda: v.float_tensor("X", torch.ones(1).half()), "X is in torch.float16, expected float32 or float64"),
        (lambda: v.feature_table("inputs", ONES / 0), "6 numbers of the inputs are not finite: clean them first"),
        (lambda: v.class_labels([0.5], 1), "label 0.5 is no whole number"),
        (lambda: v.check_floating(B=torch.ones(1).long()), "B is of type torch.int64, expected a tensor of floating"),
        (lambda: v.check_same_shape(W=ONES, B=ONES.mT), r"shapes are W \(2, 3\), B \(3, 2\): expected the same"),
        (
            lambda: v.check_same_format(W=ONES, B=ONES.double()),
            r"B is torch\.float64 on cpu, W torch\.float32 on cpu: pass one number format on one device, such as B\.to",
        ),
        (
            lambda: v.check_full_rank("B", ONES[None]),
            "B of run 0 has rank 1, expected 2, the full rank of a 2 by 3 matrix",
        ),
        (lambda: v.check_squarable("inputs", ONES.double() * 1e200), "the largest of the inputs is 1e\\+200"),
        (lambda: v.check_memory("weights", 10**9, 10**9), "weights of 1000000000 × 1000000000 numbers would take"),
    ],
)
def test_another_is_refused_in_a_sentence(refused, sentence):
    with pytest.raises(ValueError, match=sentence):
        refused()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ONES, "a tensor [2, 3] of torch.float32 on cpu"),
        (np.ones(3), "an array [3] of float64"),
        (10**5000, "one of type int with too many digits to be shown"),
        ("x" * 1000, "'xxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx'"),
    ],
    ids=["tensor", "array", "integer", "string"],
)
def test_what_came_is_described_in_a_few_words(value: Any, text: str):
    assert v.describe(value) == text
