"""Alignment dominance: how the hidden layers' part in the descent of the loss stands to the last layer's own.

It works on plain tensors, so on what ``falign.measure`` finds on real networks as on the courses of
``falign.theory.conservation``.
"""

from falign.theory.dominance.convergence import (
    convergence,
    lojasiewicz_constant,
    lojasiewicz_exponent,
    predicted_loss,
)
from falign.theory.dominance.scalar_output import (
    lasting_descent,
    least_product,
    neuron_descent,
    rising_example,
    squared_loss_rate,
)
from falign.theory.dominance.split import Split, largest_kappa, split

__all__ = [
    "Split",
    "convergence",
    "largest_kappa",
    "lasting_descent",
    "least_product",
    "lojasiewicz_constant",
    "lojasiewicz_exponent",
    "neuron_descent",
    "predicted_loss",
    "rising_example",
    "split",
    "squared_loss_rate",
]
