"""A learning rule: where the error is delivered, and which matrix carries it there."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from torch import Generator, Tensor

if TYPE_CHECKING:
    from falign._scratch import Scratch

__all__ = ["LawKind", "LayerState", "Rule"]


@runtime_checkable
class LayerState(Protocol):
    """One layer's feedback as its rule sees it."""

    @property
    def matrix(self) -> Tensor:
        """B as the layer keeps it, which is what ``Rule.init_feedback`` made of the draw."""
        ...

    def get_buffer(self, target: str, /) -> Tensor:
        """A buffer of ``Rule.state`` or ``Rule.factors``, by its key."""
        ...

    def remember(self, key: str, value: Tensor) -> None:
        """Write B (key "B") or a buffer of ``Rule.state``; the only way that survives ``torch.compile``."""
        ...


class LawKind(Enum):
    """V, the term beside ½|w|² in the conservation law of a neuron, by how the feedback follows the weights.

    A step changes V by ``⟨B, ΔW⟩`` to first order, summed over the weights out of the neuron. The value is (V, how the
    feedback moves, order of the drift by that), as texts. Where the feedback does not move, or moves as the weights do,
    C is conserved up to the squares of the steps alone; else ``falign.measure.ConservationLaw`` accounts for what its
    motion does as well: a weight that passes zero under sign feedback adds O(η), a B that moves by itself O(1).
    """

    STILL = ("⟨B,W⟩", "", "")
    WEIGHTS = ("½|W|²", "", "")  # B = W
    LEARNED = ("(⟨B,W⟩ - {share}½|W|²)", "", "")  # B moves with W: Kolen-Pollack
    SIGNS = ("Σ|B||W|", "its feedback follows the signs of the weights", "O(η)")
    MOVING = ("⟨B(t),W⟩", "its feedback moves by itself", "O(1)")
    PATH = ("∫⟨B(W),dW⟩", "its feedback is a function of the weights", "O(η)")
    PARTNER = ("½|w'|²", "", "")  # no rule's: of neurons multiplied with each other, as queries with keys
    NORMALISED = ("", "the ε of its batch normalisation", "O(ε/v)")  # no rule's: a normalisation leaves |w| alone

    @property
    def text(self) -> str:
        """V."""
        return self.value[0]

    @property
    def motion(self) -> str:
        """Motion of the feedback, in words."""
        return self.value[1]

    @property
    def order(self) -> str:
        """Order of what its motion adds to the drift."""
        return self.value[2]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules; a rule is a frozen value, its state lives in the buffers of each layer's feedback.

    A rule of your own is a subclass with a ``name``, the class attributes that differ and, where B is not simply kept
    as drawn, some of the methods. The fields of the dataclass are its options, on the command line as well. ``convert``
    takes the class or an instance, ``falign train`` takes ``--rule package.module:Class``::

        @dataclass(frozen=True, kw_only=True)
        class HalvedFeedback(falign.Rule):
            name: ClassVar[str] = "halved"
            factor: float = 0.5

            def feedback_matrix(self, *inputs, scratch=None):
                return self.factor * inputs[0]

    Class attributes:
        name: the word that ``convert`` and the command take, and that messages say.
        wiring: "none" (ordinary autograd), "layerwise" (every layer hands its own error back through B of W's shape)
            or "direct" (the network's output hands its error to every layer at once).
        size: of B where the user gives no ``scale``, relative to what carries an error as far as backpropagation
            does at conversion; chosen by measurement (``docs/scales.md``).
        law: the term beside ½|w|² in the conservation law. None: the general one that the other attributes imply,
            LEARNED of a learned B, MOVING where the rule adapts or advances, PATH where it reads W, else STILL.
        trained_layers: how many layers are trained, counted from the output; None: all. For rules without a wiring.
        draws: whether B is drawn from a family.
        learned: B is a parameter and receives a gradient; it is in ``state_dict`` and in ``model.parameters()``.
        reuses_gradient: learned B of a layer takes the gradient that W has received, where W is an ordinary parameter
            in eager mode, and not one that is computed for it.
        adapts: B is moved by the rule itself; it is in ``state_dict``.
        answers_noise: B learns in a phase of its own, in which layers are given noise.
        advances: a training pass changes what the rule keeps.
        fresh: every training pass has feedback of its own.
        reads_weight: the feedback of a pass depends on W.
        targeted: the rule needs ``falign.targets``.
        through_time: whether a direct rule delivers errors to the states of a recurrent layer as well.
        magnitudes: what a layer keeps as B is the size of its entries, the signs are the weights'.
        follows_input: whether ``follow`` is given what the first layer's B becomes on its way forward.
        moved: key of what ``observe_error`` moves: "B", or a matrix of ``factors``.
    """

    name: ClassVar[str]
    wiring: ClassVar[Literal["none", "layerwise", "direct"]] = "layerwise"
    size: ClassVar[float] = 1.0
    law: ClassVar[LawKind | None] = None
    trained_layers: ClassVar[int | None] = None
    draws: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    reuses_gradient: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    answers_noise: ClassVar[bool] = False
    advances: ClassVar[bool] = False
    fresh: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    targeted: ClassVar[bool] = False
    through_time: ClassVar[bool] = True
    magnitudes: ClassVar[bool] = False
    moved: ClassVar[str] = "B"
    follows_input: ClassVar[bool] = False

    @property
    def observes(self) -> bool:
        """Tell whether training passes move the feedback by what they see: ``observe`` or ``observe_error``."""
        own = type(self)
        return own.observe is not Rule.observe or own.observe_error is not Rule.observe_error

    @property
    def factored(self) -> bool:
        """Tell whether a direct rule makes B of several matrices, of which it keeps one as B."""
        return self.wiring == "direct" and type(self).feedback_matrix is not Rule.feedback_matrix

    def init_feedback(self, draw: Callable[[], Tensor], deviation: float) -> Tensor:
        """Make what a layer keeps as B at conversion.

        Args:
            draw: draws a matrix of the feedback's shape from the family that the user chose, scaled; not called by a
                rule that draws nothing.
            deviation: standard deviation of its entries.
        """
        return draw()

    def state(self) -> dict[str, Tensor]:
        """Further buffers that the rule keeps at every layer, by key, with their first values."""
        return {}

    def factors(self, shape: tuple[int, ...], random: Generator) -> dict[str, Tensor]:
        """Draw what else a rule keeps at a layer: fixed matrices beside B, by key; in ``state_dict`` if B is.

        Args:
            shape: of B.
            random: generator of the layer, on the CPU.
        """
        return {}

    def feedback_inputs(self, layer: LayerState, weight: Tensor | None, *, advance: bool) -> tuple[Tensor, ...]:
        """Collect the tensors that determine the feedback of a pass, in the forward of the layer.

        Args:
            layer: the layer's feedback.
            weight: W of a rule that reads it, with the shape that the layer gives it (out, in, …), else None.
            advance: whether the pass is one of training, by which state may move.
        """
        return (layer.matrix,)

    def feedback_matrix(self, *inputs: Tensor, scratch: "Scratch | None" = None) -> Tensor:
        """Make the B that carries the error, of W's shape, from what ``feedback_inputs`` gave, in the backward.

        Args:
            inputs: as ``feedback_inputs`` gave them, saved in the graph between the two.
            scratch: memory in which the result may lie, used up before the next call; None where it may not.
        """
        return inputs[0]

    def learned_gradient(self, gradient: Tensor, *inputs: Tensor) -> Tensor:
        """Make the gradient of a learned B from that of W, or from what a direct rule's e and x say in its place.

        Args:
            gradient: of W's shape; under a direct rule ``Σ eᵀ x``, of B's.
            inputs: as ``feedback_inputs`` gave them.
        """
        return gradient

    def observe(self, matrix: Tensor, output: Tensor, x: Tensor) -> Tensor:
        """Move direct feedback by what a training pass shows, before its error is delivered; here B stays as it is.

        Args:
            matrix: B (outputs, features of x), of one cut.
            output: the network's output (rows, outputs), a row for every sample, or position that output and x share.
            x: the cut input (rows, features).

        Returns:
            The new B, which the layer keeps, and which carries the error of this pass.
        """
        return matrix

    def observe_error(self, matrix: Tensor, error: Tensor, x: Tensor) -> Tensor:
        """Move direct feedback by what a training backward shows, before it delivers; here it stays as it is.

        It moves once a backward, by all calls of the layer together. The error is what is projected: it carries
        whatever the loss is times, a mean's 1/batch, an accumulation's share, a loss scaler's factor, so that a rule
        divides by its size. A backward whose error is not finite, as a loss scaler provokes, moves nothing.

        Args:
            matrix: what ``moved`` names, of one cut; of a "B", (outputs, features of x).
            error: the projected error (rows, outputs), a row for every sample, or position that output and x share.
            x: the cut input (rows, features).

        Returns:
            The new matrix, which the layer keeps; a "B" carries the error of this backward.
        """
        return matrix

    def follow(self, matrix: Tensor, jacobian: Tensor) -> Tensor:
        """Move direct feedback by an estimate of the mean Jacobian, in ``falign.follow``; here B stays as it is.

        Where the rule ``follows_input`` it is that of the cut by the network's input, times the first layer's B.

        Args:
            matrix: B (outputs, features), of one cut.
            jacobian: the estimate, of B's shape.
        """
        return matrix

    def error(self, error: Tensor, output: Tensor, target: Tensor | None, axis: int) -> Tensor:
        """Make what a direct rule projects to the layers, of the error's shape; here the error itself.

        Args:
            error: the gradient at the output.
            output: the output.
            target: the targets in the output's shape, where the rule is ``targeted``.
            axis: the axis of the classes.
        """
        return error
