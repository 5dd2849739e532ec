"""Theory takes NumPy's arrays, tensors and lists alike: every public function, with all of its arguments at once."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from good_calls import GOOD
from torch import Tensor

from hostile import alike

pytestmark = pytest.mark.unchecked


def given_as(convert: Callable[[Tensor], Any], value: Any) -> Any:
    """The same argument with every tensor in it converted, within tuples, lists and named tuples, too."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(given_as(convert, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(given_as(convert, part) for part in value)
    if isinstance(value, dict):
        return {name: given_as(convert, part) for name, part in value.items()}
    return value


WRAPPINGS = {"NumPy": lambda tensor: tensor.numpy(), "lists": lambda tensor: tensor.tolist()}


@pytest.mark.parametrize("name", GOOD)
def test_arrays_and_lists_give_what_tensors_give(name):
    call, good = GOOD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rates and runs that diverge, which others ask for
        held: list[Tensor] = []
        given_as(held.append, good())
        if held:
            expected = call(**good())
            for wrapping, convert in WRAPPINGS.items():
                assert alike(call(**given_as(convert, good())), expected), wrapping


def test_single_precision_of_arrays_is_kept():
    from falign.theory.factorisation import feedback, stationary

    Y = torch.randn(5, 6)
    B = feedback(5, 2, seeds=[0, 1]).float()
    assert stationary(Y.numpy(), B.numpy()).dtype == torch.float32
