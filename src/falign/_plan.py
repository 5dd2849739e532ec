"""A conversion before it is carried out: which layers it reaches, the shapes of their feedback, and every problem."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from falign._cuts import Cuts, cut_modules, cut_words
from falign._delivery import Route
from falign._direct import DirectPlan
from falign._expand import contract, expand, expandable, refusal
from falign._guard import shared_weight
from falign._outputs import Outputs
from falign._projector import Projection, Projector, measure_projector, refuse_projector
from falign._survey import ByHand, Survey, call, detached, without_trace
from falign._true_errors import measure_gains
from falign._validation import describe
from falign._wiring import WIRING, End, wirings
from falign.feedback import Family, Normal, Shared, family, faults_of
from falign.layers import LOOKUPS, Layer, weight_of
from falign.rules import ALL_RULES, Rule
from falign.transforms import Transform, Transforms, transforms

FeedbackChoice = str | Family | Mapping[str, Tensor] | None


class Plan:
    """A conversion before it is carried out: which layers, which shapes of B, and every problem.

    The steps of ``__init__`` have this order because each needs what those before it found: the rule, without which
    nothing is known; the survey of the modules, which runs nothing; the run on the example, only of a model whose
    layers have shapes and weights; the shapes of B, read off that run under a direct rule; scale and family last, as
    given tensors are compared with these shapes. Whatever would fail after a problem is left out, so that ``check``
    lists causes and not their consequences.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule | type[Rule],
        feedback: FeedbackChoice,
        scale: float | None,
        skip: Iterable[str],
        example: Any,
        output: Outputs,
        cut: Cuts | None = None,
        error_at: str | tuple[str, ...] | list[str] | None = None,
        transform: Transforms = None,
        projector: Projector | None = None,
    ) -> None:
        self.model = model
        self.projector = projector
        self.projection: Projection | None = None
        self.problems: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.shapes: dict[str, dict[int, tuple[tuple[int, ...], Route]]] = {}
        self.expanded: list[tuple[nn.Module, dict[str, nn.Module]]] = []
        self.direct: DirectPlan | None = None
        self.enclosed: dict[str, str] = {}
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        self.ends: tuple[End, ...] = tuple(End(output=one) for one in outputs)
        self.skip: tuple[str, ...] = ()
        self.by_hand: dict[str, ByHand] = {}
        self.gains: dict[tuple[int, str], float] = {}
        self.family, self.given = Normal(), {}
        self.untrained: tuple[str, ...] = ()
        self.changes: tuple[Transform, ...] = ()
        chosen = self._rule(rule)
        self._refuse_wrapped()
        if chosen is None or self.problems:
            return
        self.rule = chosen
        if not isinstance(skip, (str, Collection, Iterator, type(None))) or isinstance(skip, (Tensor, range)):
            self.problems.append(f"skip is a {type(skip).__name__}, expected names of layers or parameters")
            return
        skip = (skip,) if isinstance(skip, str) else tuple(skip if skip is not None else ())
        if wrong := [name for name in skip if not isinstance(name, str)]:
            self.problems.append(f"skip holds {wrong[0]!r:.40}, expected names of layers or parameters")
            return
        self.skip = skip
        try:
            self.changes = transforms(transform)
        except (TypeError, ValueError) as error:
            self.problems.append(str(error))
        self.words = ("layers",)
        if projector is not None and self.rule.wiring != "direct":
            self.problems.append(str(refuse_projector(projector, self.rule, feedback, 1, [], {})))
        if self.changes and self.rule.wiring == "none":
            self.problems.append(f"transform= is for rules with feedback, {self.rule.name!r} has none: leave it out")
        if self.rule.wiring != "direct":
            given = [f"{name}=" for name, value in (("cut", cut), ("error_at", error_at)) if value is not None]
            if given:
                self.problems.append(
                    f"{' and '.join(given)} is for direct rules, rule {self.rule.name!r} is none: leave it out"
                )
                return
        elif cut is not None:
            self.words, self.problems = cut_words(cut)
        if self.rule.wiring == "direct":
            self._start_errors_at(error_at, output)
        if self.problems:
            return
        try:
            if self.rule.wiring == "direct" and "layers" in self.words:
                self._expand()
            self._look(feedback, scale, example)
        finally:
            self.expanded = contract(model) if isinstance(model, nn.Module) else []

    def _start_errors_at(self, error_at: Any, output: Outputs) -> None:
        """Let errors begin at the outputs of modules, beside those at outputs of the model that are named as well."""
        names = () if error_at is None else (error_at,) if isinstance(error_at, str) else tuple(error_at)
        known = [name for name, _ in self.model.named_modules() if name]
        for name in names:
            if name not in known:
                near = get_close_matches(str(name), known, n=3) or known[:6]
                self.problems.append(
                    f"error_at names {describe(name)}, which the model does not have; near it: {', '.join(near)}"
                )
        if names:
            starts = tuple(End(layer=name, picked=False) for name in names)
            self.ends = starts if output is None else (*starts, *self.ends)

    def _expand(self) -> None:
        """Turn attention and recurrent modules into layers, until everything is known."""
        for name, module in expandable(self.model, self.skip):
            if why := refusal(module):
                if name not in cut_modules(self.model, self.words)[0]:
                    self.problems.append(f"layer {name or '(root)'!r} ({type(module).__name__}) {why}")
            else:
                expand(module)
                self.expanded.append((module, {}))

    def _look(self, feedback: FeedbackChoice, scale: float | None, example: Any) -> None:
        """Survey the model, run it on the example, and find what the feedback has to be."""
        model, skip, earlier = self.model, self.skip, self.problems
        survey = self.survey = Survey(model, skip)
        if self.rule.wiring == "none":
            self.problems = [line for line in survey.problems if line.startswith("skip")]
            if feedback is not None or scale is not None:
                self.problems.append(f"rule {self.rule.name!r} has no feedback: pass neither feedback= nor scale=")
            elif self.rule.trained_layers is not None and not survey.lazy:
                self._find_untrained(example)
            return
        self.layers, self.kinds, self.problems = survey.layers, survey.kinds, [*earlier, *survey.problems]
        self.by_hand = survey.by_hand
        if survey.lazy:
            return  # a run would give the layers their shapes, behind the user's back
        if self.rule.wiring == "direct":
            self._look_direct(example)
        else:
            self._look_layerwise(example)
        by_hand = {name: getattr(one.owner, one.key).detach() for name, one in self.by_hand.items()}
        self.shapes |= {name: {0: (tuple(weight.shape), Route())} for name, weight in by_hand.items()}
        self.weights |= by_hand
        if by_hand and self.rule.answers_noise:
            self.problems.append(
                f"rule {self.rule.name!r} gives noise to layers, and {next(iter(by_hand))!r} is multiplied outside "
                "one: make it an nn.Linear, or name it in skip="
            )
        if self.changes and by_hand:
            self.problems.append(
                f"transform= cannot reach the errors that autograd itself carries through {next(iter(by_hand))!r}, "
                "multiplied outside a layer: make it an nn.Linear, or use a direct rule"
            )
        self.scale = self._scale(scale)
        if self.scale is None and self.direct is not None and not self.problems:
            self.gains = measure_gains(self.direct)
        self.family, self.given = self._family(feedback)
        if self.projector is not None and not self.problems:
            self._look_at_projector(self.projector, feedback)

    def _look_at_projector(self, projector: Projector, feedback: FeedbackChoice) -> None:
        shapes = {name: self._shape(name) for name in self.layers if name in self.shapes}
        why = refuse_projector(projector, self.rule, feedback, len(self.ends), list(self.by_hand), shapes)
        measured = why or (measure_projector(projector, shapes) if shapes else None)
        if isinstance(measured, str):
            self.problems.append(measured)
        elif measured is not None:
            self.projection, self.family = measured, Shared()

    def _find_untrained(self, example: Any) -> None:
        """Find the parameters that a rule leaves as they are that trains the last layers alone."""
        count = self.rule.trained_layers
        assert count is not None
        if example is not None:
            before = len(self.survey.problems)
            self.survey.run(example)
            new = self.survey.problems[before:]
            self.problems += [line for line in new if line.startswith("the model does not run")]
            if self.problems:
                return
        below = _parameters_below(self.model, count, example)
        if below is None:
            layers = f"{count} layer{'s' * (count > 1)}"
            self.problems.append(f"rule {self.rule.name!r} trains the last {layers}, the model has fewer")
            return
        self.untrained = tuple(name for name in below if self.model.get_parameter(name).requires_grad)

    def rows(self) -> list[dict[str, Any]]:
        """List what the conversion does with each layer and parameter, as ``check`` shows it."""
        rows = []
        for name, shapes in self.shapes.items():
            learned = self.rule.wiring == "direct" and not self.rule.draws
            given = tuple(shape for shape, _ in shapes.values()) if self.rule.draws or learned else ((),)
            mechanism = "direct" if self.rule.wiring == "direct" else "cut and delivered"
            source = "zero at first" if learned else "signs of W"
            if self.rule.draws:
                source = "given" if name in self.given else str(self.family)
            rows.append(
                {
                    "name": name,
                    "kind": self.kinds[name].name if name in self.kinds else "parameter",
                    "mechanism": "saved tensor" if name in self.by_hand else mechanism,
                    "why": "",
                    "rule": self.rule.name,
                    "shapes": given,
                    "family": source,
                    "bytes": sum(torch.Size(shape).numel() for shape in given) * self.weights[name].element_size(),
                }
            )
            site = None if self.direct is None else self.direct.sites.get(name)
            if site is not None and site.kind is None:
                rows[-1]["kind"] = "module"
                if site.owner in self.enclosed:
                    rows[-1] |= {"mechanism": "cut as a whole", "why": self.enclosed[site.owner]}
        if isinstance(self.family, Shared) and rows:  # one sequence, as long as the largest needs
            largest = max(row["bytes"] for row in rows)
            rows = [{**row, "bytes": largest if row["bytes"] == largest else 0} for row in rows]
        return rows

    def _look_layerwise(self, example: Any) -> None:
        survey = self.survey
        if example is None:
            self.problems += survey.unclear
        something = self.layers or self.by_hand or survey.unclear
        self._refuse_nothing()
        if example is not None and something:
            before = len(survey.problems)
            survey.run(example)
            self.problems += [*survey.problems[before:], *(one.sentence for one in survey.derived.values())]
        self.weights = {name: weight_of(layer) for name, layer in self.layers.items()}
        self.by_hand = survey.by_hand
        self.shapes = {name: {0: (tuple(weight.shape), Route())} for name, weight in self.weights.items()}

    def _refuse_nothing(self) -> None:
        if not (self.layers or self.by_hand or self.problems or self.survey.unclear):
            self.problems.append(
                f"nothing to convert: the model ({type(self.model).__name__}) has no nn.Linear or convolution outside "
                "skip"
            )

    def _look_direct(self, example: Any) -> None:
        """Find what a direct rule cuts, and take that over."""
        direct = DirectPlan(self.model, self.rule, self.survey, self.ends, self.words, self.skip, bool(self.expanded))
        if "layers" not in self.words:
            cut_layers = tuple(f"layer {name!r}" for name in direct.sites)
            self.problems = [line for line in self.problems if line.startswith(("skip", *cut_layers))]
        self.layers = direct.layers
        self.problems += direct.problems
        if not direct.modules:
            self._refuse_nothing()
        if not self.problems:
            direct.look(example)
            self.problems += direct.problems
        self.survey, self.layers, self.kinds, self.weights = direct.survey, direct.layers, direct.kinds, direct.weights
        self.by_hand, self.shapes, self.ends = direct.by_hand, dict(direct.shapes), direct.ends
        self.direct, self.enclosed = direct, direct.enclosed

    def _rule(self, rule: str | Rule | type[Rule]) -> Rule | None:
        if isinstance(rule, Rule) and hasattr(rule, "name"):
            return rule
        if isinstance(rule, str) and rule in ALL_RULES:
            return ALL_RULES[rule]()
        if isinstance(rule, type) and issubclass(rule, Rule) and hasattr(rule, "name"):
            try:
                return rule()
            except TypeError as error:
                self.problems.append(f"rule {rule.name!r} cannot be made without options ({error}): pass an instance")
                return None
        self.problems.append(
            f"unknown rule {describe(rule)}: choose one of {', '.join(ALL_RULES)}, or pass a falign.Rule"
        )
        return None

    def _refuse_wrapped(self) -> None:
        if not isinstance(self.model, nn.Module):
            self.problems.append(f"expected a torch.nn.Module, got {type(self.model).__name__}")
        elif converted := wirings(self.model):
            self.problems.append(
                f"the model, or a part of it, is converted already, to rule {converted[0].rule.name!r}: "
                "call falign.revert(model) first"
            )
            if WIRING in self.model.__dict__:
                self.problems += converted[0].newcomers(self.model, converted[0].skip)
        elif (shared := shared_weight(self.model)) is not None:
            self.problems.append(shared)
        elif type(self.model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule") or isinstance(
            self.model, torch.jit.ScriptModule
        ):
            self.problems.append(
                f"the model is wrapped in {type(self.model).__name__}: convert the plain model first, then wrap it"
            )

    def _scale(self, scale: float | None) -> float | None:
        if scale is None:
            return None
        if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 < scale < inf:
            self.problems.append(f"scale is {describe(scale)}, expected a positive number")
            return None
        try:
            rounded = float(torch.tensor(float(scale), dtype=torch.float32, device="cpu"))
        except OverflowError:  # whole numbers and fractions have no bound
            rounded = inf
        if not 0 < rounded < inf:
            self.problems.append(f"scale is {describe(scale)}, which float32 cannot hold: expected a number near 1")
            return None
        if self.rule.wiring == "direct" and not self.rule.draws:
            self.problems.append(f"rule {self.rule.name!r} finds the size of its feedback in training: pass no scale=")
        return float(scale)

    def _family(self, feedback: FeedbackChoice) -> tuple[Family, dict[str, Tensor]]:
        if feedback is None:
            return Normal(), {}
        if not self.rule.draws:
            source = "from the weights" if self.rule.wiring == "layerwise" else "in training, from zero"
            self.problems.append(f"rule {self.rule.name!r} makes its feedback {source}: pass no feedback=")
        if isinstance(feedback, Mapping):
            return Normal(), self._tensors(feedback)
        if isinstance(feedback, str):
            try:
                feedback = family(feedback)
            except ValueError as error:
                self.problems.append(str(error))
                return Normal(), {}
        if not callable(feedback):
            self.problems.append(
                f"feedback is a {type(feedback).__name__}, expected a family, a callable or {{layer name: tensor}}"
            )
        if isinstance(feedback, Shared) and (self.rule.learned or self.rule.adapts):
            self.problems.append(
                f"rule {self.rule.name!r} changes each layer's feedback: the shared family cannot serve it"
            )
        return feedback, {}

    def _tensors(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in given.items():
            if name not in self.weights:
                near = get_close_matches(str(name), self.weights, n=3) or list(self.weights)[:6]
                self.problems.append(f"feedback names {name!r}, which takes no feedback; layers: {', '.join(near)}")
            elif not isinstance(tensor, Tensor):
                self.problems.append(f"feedback of layer {name!r} is a {type(tensor).__name__}, expected a tensor")
            elif name in self.shapes and self.rule.draws and tuple(tensor.shape) != self._shape(name):
                self.problems.append(
                    f"feedback of layer {name!r} has shape {tuple(tensor.shape)}, expected {self._shape(name)}"
                )
            else:
                dtype = self.weights[name].dtype
                self.problems += [f"feedback of layer {name!r} {fault}" for fault in faults_of(tensor, dtype)]
        return dict(given)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a layer's feedback from the first output that delivers to it."""
        return next(iter(self.shapes[name].values()))[0]


def _parameters_below(model: nn.Module, count: int, example: Any) -> list[str] | None:
    """Name the parameters of modules that run before the last ``count`` layers; None where there are fewer layers.

    Args:
        model: the network. Its layers are the modules with matrices of their own, lookups left out.
        count: how many.
        example: an input, which shows the order; without it, that is the order of the names.
    """
    owners = {name: module for name, module in model.named_modules() if _own(module) and not _is_parametrization(name)}
    order = list(owners)
    if example is not None:
        order = []
        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
            for name, module in owners.items()
        ]
        try:
            with without_trace(model):
                call(model, detached(example))
        finally:
            for handle in handles:
                handle.remove()
        order = list(dict.fromkeys(reversed(order)))[::-1]  # by the last time that each has run
    matrices = [
        name
        for name in order
        if any(one.dim() > 1 for one in _own(owners[name])) and not isinstance(owners[name], LOOKUPS)
    ]
    if len(matrices) < count:
        return None
    trained = order[order.index(matrices[-count]) :]
    kept = {id(parameter) for name in trained for parameter in _own(owners[name])}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in kept]


def _own(module: nn.Module) -> list[nn.Parameter]:
    """List a module's own parameters, and those of which parametrizations make them."""
    made = module._modules.get("parametrizations")
    return [*module.parameters(recurse=False), *(() if made is None else made.parameters())]


def _is_parametrization(name: str) -> bool:
    return "parametrizations" in name.split(".")
