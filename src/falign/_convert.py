"""Attach a rule to a model, look at it, take it off."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from falign._attached import Feedback
from falign._conversion import Conversion
from falign._cuts import Cuts
from falign._delivery import in_backward
from falign._expand import contract
from falign._guard import unguard
from falign._outputs import Outputs
from falign._plan import FeedbackChoice, Plan
from falign._preserve import forget_compiled_code, preserve_generators
from falign._projector import Projector
from falign._saved import SavedHooks
from falign._show import Loud, Sheet, Shown
from falign._style import Points, dots, height_of, nothing_to_draw
from falign._survey import call, detached, gradients_aside, plain_copy
from falign._validation import whole_number
from falign._wiring import (
    DDP_IGNORED,
    SPARED,
    WIRING,
    Start,
    Wiring,
    converted,
    feedbacks,
    parts_of,
    wiring_of,
)
from falign.feedback import faults_of
from falign.rules import Rule
from falign.transforms import Transforms


class ConversionError(ValueError):
    """Raised where a model cannot be converted as asked; the message lists every reason, one a line."""


def convert(
    model: nn.Module,
    rule: str | Rule | type[Rule] = "fa",
    *,
    seed: int = 0,
    feedback: FeedbackChoice = None,
    scale: float | None = None,
    skip: Iterable[str] = (),
    example: Any = None,
    output: Outputs = None,
    cut: Cuts | None = None,
    error_at: str | tuple[str, ...] | list[str] | None = None,
    transform: Transforms = None,
    projector: Projector | None = None,
) -> nn.Module:
    """Make a model learn by a rule, in place: from now on ``loss.backward()`` delivers errors without weight transport.

    Nothing else in a training loop changes. Layerwise rules carry the error at a layer's output (..., out) to its
    input (..., in) by the layer's own linear map, transposed, with B (of the weight's shape) in place of W. Direct
    rules carry e, the gradient at the network's output (batch, outputs), batch reduction included, as
    ``(e @ B).reshape(x.shape)`` to the input x of every layer, B (outputs, elements of one sample of x); where output
    and x share their position axes (sequence models), position by position with B (outputs, features). The last layer
    always has its true gradient.

    Args:
        model: any module of linear maps (``nn.Linear``, convolutions, transposed convolutions, embeddings) and of
            operations without weights or with elementwise ones. Convert before ``torch.compile``, DDP and, for
            learned feedback, before the optimizer is made.
        rule: a name (bp, fa, dfa, usf, frsf, brsf, drtp, kp, adafa, eprop, dkp, pfa, probe, wm, fdfa, grape, ebd,
            ldfa, afa, frozen, shallow), a ``Rule``, or a subclass of it whose options have defaults.
        seed: of the feedback; B is a function of (seed, layer name, family) alone.
        feedback: a family by name ("normal", "uniform", "orthogonal", "low-rank(8)", "sparse(1)", "shared"), a
            callable ((rows, columns), generator) -> tensor of entries of variance one, or {layer name: B}, used as
            it is; layers that the dict does not name are drawn from the normal family. Default: normal.
        scale: B's entries have variance scale²/fan_in, fan_in the number of inputs to which one element of the error
            is carried, so that E|error carried|² = scale²·|error|². Default: an error keeps the norm that it would
            keep under backpropagation now: B of a layer has the size of its W (rounded, see docs/scales.md); for
            direct rules, what backpropagation carries from the output to the layer, measured on the example.
        skip: names of layers, or of modules with all inside, that keep backpropagation.
        example: an input of the model (a tuple: positional arguments, a dict: keyword arguments); one forward without
            gradients then finds layers that never run and weights used outside their layer. Direct rules read the
            shapes off it and need it unless all layers are ``nn.Linear``.
        output: for direct rules, which tensor carries the error where the model returns a structure: a key, an index,
            or a function of what the model returns. A tuple of these: each delivers its own error e_o, with feedback
            of its own, to the layers that it is made of: Σ_o e_o B_o (a VAE: reconstruction, mean and variance).
        cut: for direct rules, what is cut at its input: "layers" (the default: every linear layer and convolution, the
            products inside attention and recurrent modules, and whatever module multiplies parameters of its own),
            "blocks" (every module of the longest row of siblings of one class: the stream between blocks), a name or a
            pattern of module names ("blocks.*", part by part between the dots), or a tuple of these. All
            floating-point tensors that a module is given are cut, each with a B of its own ("dec.0", "dec.0[memory]");
            inside of it errors are backpropagated, unless its own layers are cut as well. With "layers", where the
            example shows what cannot be cut by itself (a weight that is changed before its product, rows that a router
            picks), the smallest module around it is cut as a whole, as ``check`` says.
        error_at: for direct rules, the name of a module (or several): at its output the error is taken in place of the
            model's output, and what follows is backpropagated ("ln_f" in front of a vocabulary: B is then (d, d)).
        transform: of the error that is carried on: a name ("centred", "signs", "ternary", "quantised(4)", "noisy(0.1)",
            "whitened", see ``falign.transforms``), a callable (error, its features last) -> error of the same shape, or
            a tuple of these, the first applied first. Under direct rules it changes the output's error, under layerwise
            ones that at the output of every layer.
        projector: for direct rules with fixed feedback, what carries errors in place of matrices, a device for
            instance: a callable (rows, outputs) -> (rows, N), N at least the features of the largest input. It is
            called once a backward, with an error of root mean square 1, which its result is then times; every layer
            reads its features from a start of its own (as of the shared family), times what gives B the size that
            ``scale`` says. B is what it makes of the unit matrix, (outputs, N) in all, once. In compiled code it must
            be PyTorch's operations.

    Returns:
        The model.

    Raises:
        ConversionError: with everything that stands in the way, as ``check`` lists it.
    """
    plan = Conversion(model, rule, feedback, scale, skip, example, output, cut, error_at, transform, projector)
    try:
        seed = whole_number("seed", seed)
    except ValueError as error:
        plan.problems.append(str(error))
    if plan.problems:
        raise ConversionError("the model cannot be converted:\n" + "\n".join(f"- {line}" for line in plan.problems))
    plan.attach(seed)
    return model


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """Row of ``check``: a layer or parameter, and its feedback.

    Attributes:
        name: of the layer, of the module, or of the parameter that is multiplied by hand.
        kind: "linear", "convolution", "module" or "parameter".
        mechanism: "cut and delivered" (a layer), "direct" (its input receives the output's error), "cut as a whole" (so
            does that of a module, and inside of it errors are backpropagated), "saved tensor" (a parameter, in whose
            place autograd is handed B).
        rule: the rule's name.
        shapes: of B, one an output that delivers to it.
        family: of which B is drawn, "given", "signs of W" or "zero at first".
        bytes: of B.
        why: reason why a module is cut as a whole although ``cut=`` does not name it.
    """

    name: str
    kind: str
    mechanism: str
    rule: str
    shapes: tuple[tuple[int, ...], ...]
    family: str
    bytes: int
    why: str = ""


class Check(Shown, list[str]):
    """Obstacles to a conversion, a sentence each: empty where there are none. Prints as a table.

    Attributes:
        rows: what would happen to each layer and parameter.
        untrained: names of parameters that would receive no gradient on the example; None without one, or where the
            converted model cannot be run on it.
    """

    def __init__(
        self, problems: Iterable[str], rows: tuple[CheckRow, ...] = (), untrained: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(problems)
        self.rows = rows
        self.untrained = untrained

    @property
    def memory(self) -> int:
        """Bytes of all feedback together."""
        return sum(row.bytes for row in self.rows)

    def _sheet(self) -> Sheet:
        titles = ("layer", "kind", "mechanism", "rule", "B", "family", "memory")
        table = [titles] + [
            (
                row.name,
                row.kind,
                row.mechanism,
                row.rule,
                " + ".join("x".join(map(str, shape)) or "a number" for shape in row.shapes),
                row.family,
                _in_bytes(row.bytes),
            )
            for row in self.rows
        ]
        notes = [f"feedback in all: {_in_bytes(self.memory)}"] if self.rows else []
        notes += [
            f"backpropagated inside of {row.name}: {row.why}" for row in self.rows if row.why and "[" not in row.name
        ]
        if self.untrained:
            notes.append(f"trained by nobody: {', '.join(self.untrained)}")
        if self:
            notes += [Loud("cannot be converted:"), *(f"- {line}" for line in self)]
        head = "" if notes else "nothing to convert, and nothing in the way"
        return Sheet(head=head, table=table if self.rows else (), left=range(len(titles)), notes=notes)

    def _size(self) -> tuple[float, float]:
        return 7.0, height_of(len(self.rows))

    def _draw(self, axes: Any) -> None:
        if not self.rows:
            nothing_to_draw(str(self).replace("\n", " "))
        mechanisms = dict.fromkeys(row.mechanism for row in self.rows)
        series = [
            Points(label=one, values=[row.bytes / 1024 if row.mechanism == one else None for row in self.rows])
            for one in mechanisms
        ]
        names, title = (
            [row.name for row in self.rows],
            f"rule {self.rows[0].rule}: {_in_bytes(self.memory)} of feedback",
        )
        dots(axes, names, series, xlabel="KiB of feedback", title=title)
        axes.set_xlim(left=0.0)


def _in_bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # pyright: ignore[reportAssignmentType]
    return f"{count:.1f} GiB"


def check(
    model: nn.Module,
    rule: str | Rule | type[Rule] = "fa",
    *,
    feedback: FeedbackChoice = None,
    scale: float | None = None,
    skip: Iterable[str] = (),
    example: Any = None,
    output: Outputs = None,
    cut: Cuts | None = None,
    error_at: str | tuple[str, ...] | list[str] | None = None,
    transform: Transforms = None,
    projector: Projector | None = None,
) -> Check:
    """List everything that would keep ``convert`` from converting the model with these arguments; empty when fine.

    Printed, it is a table of what would happen: layer, kind, mechanism, rule, B's shape, family and memory, the sum of
    the memory and, with an example, the parameters that no gradient would reach. The model stays as it is.

    Args:
        model: as for ``convert``, as are the others.
        rule: see there.
        feedback: see there.
        scale: see there.
        skip: see there.
        example: see there.
        output: see there.
        cut: see there.
        error_at: see there.
        transform: see there.
        projector: see there.

    Returns:
        A sentence a problem, with what came, what was expected and what to do; a ``Check``, with the table's rows.
    """
    plan = Plan(model, rule, feedback, scale, skip, example, output, cut, error_at, transform, projector)
    if plan.problems:
        return Check(plan.problems)
    if plan.untrained:
        return Check((), (), plan.untrained)
    asked = (rule, feedback, scale, skip, example, output, cut, error_at, transform, projector)
    untrained = None if example is None else _untrained(model, asked, example)
    rows = tuple(CheckRow(**row) for row in plan.rows())
    return Check((), rows, untrained)


def _untrained(model: nn.Module, asked: tuple[Any, ...], example: Any) -> tuple[str, ...] | None:
    """Name the parameters that receive no gradient in a pass of a converted copy; None where there is none."""
    try:
        with gradients_aside(model), preserve_generators(model), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            twin = plain_copy(model)
            Conversion(twin, *asked).attach(0)
            result = call(twin, detached(example))
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if converted(twin)[0].rule.targeted:
                return None
            torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    except Exception:  # no copy, no pass with gradients: nothing is known
        return None
    return tuple(
        name
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad and parameter.grad is None and "feedback" not in name.split(".")
    )


def revert(model: nn.Module) -> nn.Module:
    """Take the rule off: the plain network again, with the weights as they are.

    Raises:
        ValueError: the model is not converted.
    """
    converted(model)
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = (Calibration, Feedback, SavedHooks, Start, Wiring)
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), ours)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        # In _modules and __dict__, not by getattr, which some wrappers forward to the module that they wrap.
        if parts := parts_of(module):
            for weight in (weight for part in parts for weight in part.weights(module)):
                unguard(weight)
            del module._modules["feedback"]
        module.__dict__.pop(SPARED, None)
        wiring = module.__dict__.pop(WIRING, None)
        for name in () if wiring is None else wiring.untrained:
            module.get_parameter(name).requires_grad_(True)
        if wiring is not None and DDP_IGNORED in module.__dict__:
            kept = [name for name in module.__dict__[DDP_IGNORED] if "feedback" not in name.split(".")]
            module.__dict__[DDP_IGNORED] = kept
    contract(model)
    forget_compiled_code()
    return model


@contextmanager
def backprop(model: nn.Module) -> Iterator[nn.Module]:
    """Backpropagate forward passes of the model truly within this context, on the same weights.

    What counts is where the forward runs: a loss of a forward from within has the true gradient wherever its
    ``backward`` is called, also where activation checkpointing recomputes a part (of the latest forward). Feedback
    neither learns nor draws.

    Raises:
        ValueError: the model is not converted.
    """
    with _holding(model, "on", False):
        yield model


class Calibration:
    """Hooks of a model of whose training passes one in so many is backpropagated."""

    def __init__(self, wiring: Wiring, every: int, passes: int) -> None:
        self.wiring, self.every, self.passes = wiring, every, passes

    def begin(self, model: nn.Module, args: tuple) -> None:
        """Count a training pass, and take the rule off for the one that is due: first forward pre-hook of the root.

        Raises:
            RuntimeError: the model is compiled.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "falign.calibrate counts passes, which compiled code does not do: leave it out, and every so many "
                "steps call the uncompiled model within falign.backprop"
            )
        state = self.wiring.state
        if not (model.training and torch.is_grad_enabled() and state.on) or state.measured or in_backward():
            return
        self.passes += 1
        if self.passes % self.every == 0:
            state.on, state.calibrates = False, True

    def end(self, model: nn.Module, args: tuple, result: Any) -> None:
        """Put the rule back: forward hook of the root."""
        if self.wiring.state.calibrates:
            self.wiring.state.on, self.wiring.state.calibrates = True, False


def calibrate(model: nn.Module, *, every: int | None, passes: int = 0) -> nn.Module:
    """Backpropagate one training pass in so many truly: what a rule learns is corrected by a true mini-batch.

    That is weight transport, seldom, and a result is to say so. A pass counts if the model is in training mode and
    gradients are wanted: with accumulation every micro-batch is one. Feedback neither learns nor draws in a true pass.

    Args:
        model: a converted model, the one that was given to ``convert``; not for compiled code.
        every: the true pass is the every-th, the 2·every-th, …; None: no more.
        passes: training passes that there were before, in a run that is resumed.

    Returns:
        The model.

    Raises:
        ValueError: the model is not converted, the rule has no feedback, or a number is out of range.

    Source: the calibration of Caillon et al. 2026 (GrAPE), one true mini-batch an epoch.
    """
    wiring = wiring_of(model)
    if wiring is None:
        converted(model)
        raise ValueError("calibrate takes the model that was given to falign.convert, not a part or a wrapper of it")
    if wiring.rule.wiring == "none":
        raise ValueError(f"rule {wiring.rule.name!r} has no feedback, so there is nothing to calibrate: leave it out")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"every is {every!r}, expected a whole number of passes from 1 on, or None")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0:
        raise ValueError(f"passes is {passes!r}, expected a whole number of passes from 0 on")
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Calibration)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if every is not None:
        calibration = Calibration(wiring, every, passes)
        model.register_forward_pre_hook(calibration.begin, prepend=True)
        model.register_forward_hook(calibration.end, always_call=True)
    return model


@contextmanager
def targets(model: nn.Module, target: Tensor) -> Iterator[nn.Module]:
    """Give forward passes of the model their targets within this context; rules that need none take no notice.

    Args:
        model: a converted model.
        target: class indices, of the output's shape without its classes, or floating-point targets in its shape.

    Raises:
        ValueError: the model is not converted.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"targets are a {type(target).__name__}, expected a tensor of class indices or of outputs")
    with _holding(model, "target", target):
        yield model


@contextmanager
def _holding(model: nn.Module, attribute: str, value: object) -> Iterator[None]:
    """Set an attribute of the state that this thread's forward passes see, and put it back afterwards."""
    states = [wiring.state for wiring in converted(model)]
    before = [getattr(state, attribute) for state in states]
    for state in states:
        setattr(state, attribute, value)
    try:
        yield
    finally:
        for state, old in zip(states, before, strict=True):
            setattr(state, attribute, old)


def feedback_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the feedback of a converted model.

    Returns:
        {layer name: B}; for random signs B is the magnitude |B₀|, for uniform signs the number c. Further state of a
        rule is under "layer name.key".

    Raises:
        ValueError: the model is not converted.
    """
    state: dict[str, Tensor] = {}
    for name, part in feedbacks(model).items():
        state[name] = (part.matrix.detach() * part.gain).clone()
        state |= {f"{name}.{key}": getattr(part, key).detach().clone() for key, _ in part.others.values()}
        for key in part.kept:
            state[f"{name}.{key}"] = getattr(part, key).detach().clone()
    return state


def load_feedback_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put feedback back that ``feedback_state`` gave, of this model or of one of the same layers and rule.

    Args:
        model: a converted model.
        state: every B of the model, by layer name. Under the shared family each layer then holds its own copy.

    Raises:
        TypeError: the state is no mapping.
        ValueError: names, shapes or numbers do not fit; all of them are listed, and nothing was loaded.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"the state is a {type(state).__name__}, expected {{layer name: B}}, as feedback_state gives it"
        )
    here, parts = feedback_state(model), feedbacks(model)
    problems = [f"layer {name!r} has feedback here, but not in the state" for name in here if name not in state]
    problems += [f"the state has {name!r}, which takes no feedback here" for name in state if name not in here]
    for name in here.keys() & state.keys():
        if not isinstance(state[name], Tensor):
            problems.append(f"{name!r} is a {type(state[name]).__name__}, expected a tensor")
        elif tuple(state[name].shape) != tuple(here[name].shape):
            problems.append(f"{name!r} has shape {tuple(state[name].shape)}, expected {tuple(here[name].shape)}")
        else:
            faults = faults_of(state[name], here[name].dtype)
            problems += [f"{name!r} {fault}" for fault in faults]
            if (
                not faults
                and name in parts
                and parts[name].wiring.rule.magnitudes
                and not state[name].is_complex()
                and bool((state[name] < 0).any())
            ):
                problems.append(f"{name!r} holds negative numbers, expected magnitudes: the signs are the weights'")
    if problems:
        listed = "\n".join(f"- {line}" for line in sorted(problems))
        raise ValueError(f"this is the feedback of another network, nothing was loaded:\n{listed}")
    with torch.no_grad():
        for name, part in parts.items():
            if part.B is None:
                part.unshare(here[name])
            part.matrix.copy_(state[name])
            part.deviations = []  # no longer of the size that was drawn, so no state_dict may rescale it
            for key in (*(key for key, _ in part.others.values()), *part.kept):
                getattr(part, key).copy_(state[f"{name}.{key}"])
