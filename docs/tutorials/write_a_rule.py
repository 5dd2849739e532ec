# %% [markdown]
# # Write a rule
#
# A rule is a frozen dataclass that says which matrix carries an error. It need not be in the package. This one mixes fixed random
# feedback with the weights; the package's own test suites take it as one rule more.

# %%
from dataclasses import dataclass
from typing import ClassVar

import torch

from falign import Rule


@dataclass(frozen=True, kw_only=True)
class MixedFeedback(Rule):
    """B = (1 - mix) B₀ + mix W, taken anew at every pass.

    Args:
        mix: from 0 (fa) to 1 (bp).
    """

    name: ClassVar[str] = "mixed"
    size: ClassVar[float] = 0.7
    reads_weight: ClassVar[bool] = True
    mix: float = 0.25

    def __post_init__(self):
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mixed: mix is {self.mix}, expected a number from 0 (fa) to 1 (bp)")

    def feedback_inputs(self, layer, weight, *, advance):
        return layer.matrix, weight.detach()

    def feedback_matrix(self, *inputs, scratch=None):
        fixed, weight = inputs
        return torch.lerp(fixed, weight.to(fixed.dtype), self.mix)


# %% [markdown]
# **Class attributes** say what kind of rule it is: its `name`, its `wiring` ("layerwise", which is the default, or "direct"), the
# relative `size` of B, and that it `reads_weight`. **Fields** are options, here and on the command line. **Methods** are overridden
# only where B is not simply kept as drawn: `feedback_inputs` collects in the forward pass what the matrix depends on, and
# `feedback_matrix` makes it in the backward pass. [`Rule`](../_generated/falign.rules.rst) lists all of them.
#
# Now everything knows it: conversion, checks, measurements and the conservation law.

# %%
from torch import nn

import falign

torch.manual_seed(0)
x, y = torch.randn(64, 20), torch.randint(4, (64,))
loss_fn = nn.functional.cross_entropy
for mix in (0.0, 0.25, 1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 4))
    falign.convert(model, MixedFeedback(mix=mix), example=x)
    assert falign.verify(model, x, lambda output: loss_fn(output, y))
    report = falign.measure.alignment(model, loss_fn, x, y)
    print(f"mix {mix}: gradient angles", [f"{row.gradient_angle:.0f}°" for row in report.layers])

# %% [markdown]
# A wrong option is one sentence, as everywhere.

# %%
try:
    MixedFeedback(mix=2)
except ValueError as error:
    print(error)

# %% [markdown]
# Saved as `mine.py`, it trains from the shell as well: `falign train digits --rule mine:MixedFeedback --rule-option mix=0.5`.
#
# To prove it, write its gradient down a second way. For a rule of the package that is NumPy, in `tests/oracles.py`; the recipe is in
# [Contributing](../_generated/contributing.md). Here the definition is short: fa on a matrix that is put in by hand.

# %%
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double()
x = x.double()
falign.convert(model, MixedFeedback(mix=0.25), seed=3)
loss_fn(model(x), y).backward()
mixed = model[0].weight.grad.clone()

B = falign.feedback_state(model)["2"]
by_hand = {"2": 0.75 * B + 0.25 * model[2].weight.detach()}
falign.convert(falign.revert(model), "fa", feedback=by_hand)
model.zero_grad()
loss_fn(model(x), y).backward()
torch.testing.assert_close(mixed, model[0].weight.grad, rtol=1e-12, atol=1e-15)
print("equal")
