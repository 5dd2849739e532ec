"""The discrete recursion of scalar modes in place, thousands of modes and steps a second."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from falign.theory.deep_linear.modes import Modes


class Recursion:
    """``θ_l ← θ_l + η c_l θ_{l-1}…θ_1 e`` on buffers that are allocated once.

    What is not finite stays so: a mode that overflowed is never again a number.

    Attributes:
        weights: θ of the step reached [layers modes], of one axis of modes.
        squares: ``Σ(Δθ_l)²`` over the steps so far [layers modes]; of the last layer under bp only.
    """

    weights: Float[ndarray, "layers modes"]
    squares: Float[ndarray, "layers modes"]

    def __init__(self, modes: Modes, rates: Float[ndarray, " modes"]):
        """From ``modes`` of one axis, on the CPU, each with a rate η of its own in their type."""
        self.weights = modes.weights.numpy().copy()
        self.squares = np.zeros_like(self.weights)
        self._target, self._variance = rates * modes.target.numpy(), rates * modes.variance.numpy()
        self._moving = modes.rule == "bp"
        self._carriers = modes.carriers.numpy().copy()
        self._below = np.empty_like(self.weights)
        self._error, self._move = np.empty_like(rates), np.empty_like(rates)

    def take(self, steps: int) -> None:
        """That many steps. Overflow is not reported."""
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            for _ in range(steps):
                self._step()

    def take_until_lost(self, steps: int) -> Int[ndarray, " modes"]:
        """That many steps, and after which of them each mode was first not finite, -1 where it always was."""
        lost = np.full(self.weights.shape[1], -1)
        for step in range(1, steps + 1):
            self.take(1)
            lost[(lost < 0) & ~np.isfinite(self.weights).all(0)] = step
        return lost

    def _step(self) -> None:
        weights, below, error, move = self.weights, self._below, self._error, self._move
        depth = len(weights)
        product = weights[0]
        for layer in range(1, depth):  # below[layer] holds the product of all before it; that of layer 1 is θ_1 itself
            product = np.multiply(product, weights[layer], out=below[layer + 1] if layer + 1 < depth else error)
        np.multiply(error, self._variance, out=error)
        np.subtract(self._target, error, out=error)  # η e
        if self._moving:
            self._carry_back()
        for layer in range(depth - 1, -1, -1):  # θ_1 last: it is what carries layer 2
            lower = weights[0] if layer == 1 else below[layer]
            moved = np.multiply(lower, error, out=move) if layer else error
            if layer < depth - 1:
                moved = np.multiply(moved, self._carriers[layer], out=move)
            np.add(weights[layer], moved, out=weights[layer])
            if layer < depth - 1 or self._moving:
                np.multiply(moved, moved, out=move)
                np.add(self.squares[layer], move, out=self.squares[layer])

    def _carry_back(self) -> None:
        """``θ_{l+1}…θ_L``, as the weights are before the step."""
        self._carriers[-2] = self.weights[-1]
        for layer in range(len(self.weights) - 3, -1, -1):
            np.multiply(self._carriers[layer + 1], self.weights[layer + 1], out=self._carriers[layer])
