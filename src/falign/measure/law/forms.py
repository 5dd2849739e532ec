"""What stands beside ½|w|² in the law, by how the feedback follows the weights."""

from enum import Enum

from falign.attached import Feedback
from falign.rules import FixedRandomSignFeedback, UniformSignFeedback


class Form(Enum):
    """V, whose change in a step is ``⟨B, ΔW⟩`` to first order, summed over the weights out of a neuron.

    The value is (V, how the feedback moves, order of the drift by that), as texts. Where the feedback does not move,
    or moves as the weights do, C is conserved up to the squares of the steps alone; else what its motion does is
    accounted for as well: a weight that passes zero under sign feedback adds O(η), a B that moves by itself O(1).
    """

    STILL = ("⟨B,W⟩", "", "")
    WEIGHTS = ("½|W|²", "", "")  # B = W
    LEARNED = ("(⟨B,W⟩ - {share}½|W|²)", "", "")  # B moves with W: Kolen-Pollack
    SIGNS = ("Σ|B||W|", "its feedback follows the signs of the weights", "O(η)")
    MOVING = ("⟨B(t),W⟩", "its feedback moves by itself", "O(1)")
    PATH = ("∫⟨B(W),dW⟩", "its feedback is a function of the weights", "O(η)")
    NORMALISED = ("", "the ε of its batch normalisation", "O(ε/v)")  # what it hands back does not change |w|

    @property
    def text(self) -> str:
        """V."""
        return self.value[0]

    @property
    def motion(self) -> str:
        """How the feedback moves."""
        return self.value[1]

    @property
    def order(self) -> str:
        """What its motion adds to the drift."""
        return self.value[2]


def times(factor: float) -> str:
    """A factor before a term, left out where it is one."""
    return "" if abs(factor - 1) < 1e-9 else f"{factor:.4g}·"


def form_of(part: Feedback | None, *, trained: bool) -> Form:
    """The form of a layer with this feedback.

    Args:
        part: None where the error returns by backpropagation.
        trained: Whether the optimizer has the feedback as a parameter.
    """
    if part is None:
        return Form.WEIGHTS
    rule = part.wiring.rule
    if rule.learned and trained:
        return Form.LEARNED
    if isinstance(rule, (UniformSignFeedback, FixedRandomSignFeedback)):
        return Form.SIGNS
    if rule.adapts or rule.advances:
        return Form.MOVING
    return Form.PATH if rule.reads_weight else Form.STILL
