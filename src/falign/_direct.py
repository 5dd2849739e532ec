"""The plan of a direct rule: what is cut, which positions of the output a cut shares, and where errors begin."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from falign._cuts import cut_modules, is_below, map_arguments
from falign._delivery import Route
from falign._enclose import Failure, enclose_changed, enclose_failures, refuse_unasked
from falign._expand import Product
from falign._outputs import NESTED, pick
from falign._positions import Shape, at_least_two, axes_to_change, batch_axes, changed, features, find_route
from falign._recurrent import ExpandedCell, ExpandedRecurrent
from falign._survey import ByHand, Survey, call, detached, without_trace
from falign._true_errors import check_samples
from falign._wiring import End
from falign.feedback import generator
from falign.layers import KINDS, Kind, Layer, weight_of
from falign.rules import Rule


@dataclass(kw_only=True)
class Site:
    """One place that a direct rule cuts: the input of a layer, or one of the arguments of a module.

    Attributes:
        owner: name of the layer or module.
        module: the layer or module.
        kind: of a layer; None of a module that is cut as a whole.
        path: which argument of such a module ("[0]", "[memory]").
        channels_first: whether the features of the input are axis 1.
    """

    owner: str
    module: nn.Module
    kind: Kind | None
    path: str = ""
    channels_first: bool = False


@dataclass(kw_only=True, eq=False)
class Run:
    """The shapes that were seen in one run of the model.

    Attributes:
        ends: of the tensors where errors begin; None where there was none.
        outputs: of the model's outputs that are picked for them, or the same.
        inputs: {(owner, path): of every call}.
        wanted: those of ``inputs`` that a gradient was recorded for; None where none was asked for.
    """

    ends: list[Shape | None]
    outputs: list[Shape | None]
    inputs: dict[tuple[str, str], list[Shape]]
    wanted: set[tuple[str, str]] | None


class DirectPlan:
    """Everything about a direct rule's conversion that the example shows.

    Attributes:
        problems: one sentence each.
        sites: name -> what is cut.
        shapes: name -> {number of the end: (shape of B, route)}.
        ends: where errors begin.
        silent: names of what is cut and receives no error.
        dormant: name -> layer that the example did not reach, and whose feedback has no known shape.
        behind: names of layers and parameters that no error is delivered to: they come behind where it begins.
        named: names of the modules that ``cut=`` names.
        enclosed: name -> why, of the modules that are cut as a whole since what is inside cannot be cut.
        failures: name of a cut -> why it cannot be made.
        by_hand: parameters that take feedback although they are multiplied outside a layer.
        layers: name -> layer or module of every site; so are ``kinds`` of layers, and ``weights``, of which feedback
            takes device and dtype.
        example: what the model was run on.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        survey: Survey,
        ends: tuple[End, ...],
        words: tuple[str, ...],
        skip: tuple[str, ...],
        expanded: bool,
    ) -> None:
        self.model, self.rule, self.survey, self.ends = model, rule, survey, ends
        self.problems: list[str] = []
        self.sites: dict[str, Site] = {}
        self.shapes: dict[str, dict[int, tuple[tuple[int, int], Route]]] = {}
        self.silent: set[str] = set()
        self.dormant: dict[str, nn.Module] = {}
        self.behind: tuple[str, ...] = ()
        self._each = getattr(rule, "positions", "each") == "each"
        modules, problems = cut_modules(model, words)
        self.problems += problems
        self.named = frozenset(modules)
        self.enclosed: dict[str, str] = {}
        self.failures: dict[str, Failure] = {}
        self.by_hand: dict[str, ByHand] = {}
        self.example: Any = None
        self.skip, self._expanded, self._everything = skip, expanded, "layers" in words
        self._asked = ends
        modules = {name: module for name, module in modules.items() if not is_below(name, *skip)}
        for name, layer in survey.layers.items():
            if "layers" in words or name in modules:
                self.sites[name] = Site(
                    owner=name, module=layer, kind=survey.kinds[name], channels_first=survey.kinds[name].channel_first
                )
        self.modules = {name: module for name, module in modules.items() if name not in self.sites}

    @property
    def layers(self) -> dict[str, Layer]:
        """Map names to layers and modules."""
        return {name: site.module for name, site in self.sites.items()}

    @property
    def kinds(self) -> dict[str, Kind]:
        """Map names to the kinds of those that are layers."""
        return {name: site.kind for name, site in self.sites.items() if site.kind is not None}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Map names to weights; of a module, to its first parameter."""
        everywhere = [p.detach() for p in self.model.parameters() if p.is_floating_point()]
        return {
            name: weight_of(site.module)
            if site.kind is not None
            else next((p.detach() for p in site.module.parameters() if p.is_floating_point()), everywhere[0])
            for name, site in self.sites.items()
        }

    def look(self, example: Any) -> None:
        """Run the model on the example or, if all layers are linear, on numbers made up, and find everything out."""
        survey, everything = self.survey, self._everything
        starts = {end.layer: self.model.get_submodule(end.layer) for end in self.ends if end.layer is not None}
        survey.places, survey.starts = {**self.modules, **starts}, frozenset(starts)
        result = None
        if example is not None:
            before = len(survey.problems)
            result = survey.run(example)
            new = survey.problems[before:]
            self.problems += new if everything else [line for line in new if line.startswith("the model does not run")]
        elif everything:
            self.problems += survey.unclear
            if not (self.modules or starts or self._expanded or survey.by_hand or len(self.ends) > 1):
                example, result = self._make_example()
                survey = self.survey
        self.example = example
        self.by_hand = survey.by_hand if everything else {}
        if survey.watch is not None:  # what is multiplied behind the error's start carries it as it is
            behind = survey.watch.only_behind()
            self.by_hand = {name: one for name, one in self.by_hand.items() if name not in behind}
        for name in self.sites.keys() - survey.layers.keys():
            del self.sites[name]  # a layer that never runs, whose weight is used by hand
        self._cut_around_products()
        if everything:
            enclose_changed(self)
        if self.problems:
            return
        if survey.watch is None:
            self._shapes_without_example()
            return
        self._look_at(result, example)
        if not (self.shapes or self.by_hand or self.problems):
            self.problems.append(
                "no error reaches anything that is to be cut: name what it passes in cut= or error_at="
            )

    def _make_example(self) -> tuple[Any, Any]:
        """Make an example for a model of linear layers, and its result; neither where the model does not run on it."""
        if not self.layers or not all(isinstance(layer, nn.Linear) for layer in self.layers.values()):
            return None, None
        first = next(iter(self.weights.values()))
        random = generator(0, "", "an example")
        values = torch.randn(64, first.shape[1], generator=random, device="cpu", dtype=torch.float32)
        example = values.to(first.device, first.dtype)
        trial = Survey(self.model, self.skip)
        result = trial.run(example)
        if trial.problems or trial.unreached or trial.derived:
            self.problems += [one.sentence for one in trial.derived.values()]
            return None, None
        self.survey = trial
        return example, result

    def _shapes_without_example(self) -> None:
        """Read the sizes of inputs off linear layers, and take the last for the output; else ask for an example."""
        others = [
            name
            for name, layer in self.layers.items()
            if not isinstance(layer, nn.Linear) or isinstance(layer, Product)
        ]
        if others or self.modules:
            self.problems.append(
                f"rule {self.rule.name!r} needs an example: the size of the input of "
                f"{', '.join(dict.fromkeys([*others, *self.modules]))} cannot be read off the layer; pass example=x "
                "with a batch x"
            )
        if len(self.ends) > 1:
            self.problems.append("several outputs need an example: pass example=x with a batch x")
        elif any(end.layer is not None for end in self.ends):
            self.problems.append("error_at needs an example: pass example=x with a batch x")
        weights = self.weights
        outputs = list(weights.values())[-1].shape[0] if weights else 0
        if not self.problems:
            self.shapes = {name: {0: ((outputs, weight.shape[1]), Route())} for name, weight in weights.items()}
        self.ends = tuple(replace(end, seen=False) for end in self.ends)

    def _cut_around_products(self) -> None:
        """Cut the modules as a whole in whose forward parameters are multiplied by hand, unless it is the model's."""
        for one in self.by_hand.values():
            for name in sorted(one.within):
                if name and not is_below(name, *self.skip):
                    self.modules[name] = self.model.get_submodule(name)
                    self.sites.pop(name, None)  # a layer whose weight is multiplied elsewhere as well

    def _look_at(self, result: Any, example: Any) -> None:
        """Find shapes of feedback, and where errors begin, from what the model does with the example.

        Args:
            result: what the model returned in the survey's run.
            example: what it was run on.
        """
        try:
            tensors = [pick(result, end.output) for end in self.ends if end.picked]
        except TypeError as error:
            self.problems.append(str(error))
            return
        if any(tensor.is_nested for tensor in tensors):
            self.problems.append(NESTED)
            return
        larger = at_least_two(example)
        while not self.problems:
            if (len(self.ends) > 1 or self.survey.starts) and self.modules.keys() - self.survey.places.keys():
                self.survey.places = {**self.survey.places, **self.modules}  # which outputs are they made into?
                result = self.survey.watch_again(example)
            self._try_cuts(result, larger)
            if self.problems or not self.failures:
                break
            enclose_failures(self, self.failures, larger)

    def _try_cuts(self, result: Any, example: Any) -> None:
        """Find shapes of feedback, with the cuts as they are; note failures where one cannot be made."""
        self.ends, self.shapes, self.silent, self.dormant, self.failures = self._asked, {}, set(), {}, {}
        self.sites = {name: site for name, site in self.sites.items() if site.kind is not None}
        self._find_ends(result)
        base = self.observe(example, gradients=True) or self.observe(example)
        if base is None or self.problems:
            return
        self._find_arguments(base)
        runs = [base, *self._varied(example, base)]
        for number, end in enumerate(self.ends):
            out = base.ends[number]
            if out is None:
                self.problems.append(f"error_at names {end.layer!r}, which returned no single floating-point tensor")
                continue
            self._check_batch(number, runs)
            convolutions = self._made_by_convolutions(number, result)
            for name, site in self.sites.items():
                watched = site.kind is not None or site.owner in self.survey.places
                reached = end.reached is None or site.owner in end.reached or not watched
                if reached and (site.owner, site.path) in base.inputs:
                    self._route(number, name, site, runs, convolutions)
        if not (self.problems or self.failures):
            check_samples(self, base)
        if not (self.problems or self.failures):
            refuse_unasked(self, base)
        self._take_after_siblings(base)

    def _take_after_siblings(self, base: Run) -> None:
        """Give a layer that the example did not reach the feedback of a sibling's shape: one of several routed experts.

        Without such a sibling it stays without feedback, and is refused where it runs with gradients after all.
        """
        for name, site in self.sites.items():
            if site.kind is None or (site.owner, site.path) in base.inputs:
                continue
            shape = self.weights[name].shape
            sibling = next(
                (
                    other
                    for other, one in self.sites.items()
                    if other in self.shapes and one.kind is site.kind and self.weights[other].shape == shape
                    and _differ_in_one(name, other)
                ),
                None,
            )  # fmt: skip
            if sibling is not None:
                self.shapes[name] = dict(self.shapes[sibling])
            else:
                self.dormant[name] = site.module

    # --- where errors begin

    def _find_ends(self, result: Any) -> None:
        watch = self.survey.watch
        assert watch is not None
        found = []
        for end in self.ends:
            if end.layer is not None:
                calls = watch.places.get(end.layer, [])
                if len(calls) != 1 or not isinstance(calls[0], Tensor) or not calls[0].is_floating_point():
                    what = (
                        "did not run on the example" if not calls
                        else f"runs {len(calls)} times, each with an error of its own" if len(calls) > 1
                        else f"returns a {type(calls[0]).__name__}, expected one floating-point tensor"
                    )  # fmt: skip
                    self.problems.append(f"error_at names {end.layer!r}, which {what}")
                    continue
                around = {name for name in self.modules if is_below(end.layer, name)}  # they are cut in front of it
                reached = watch.upstream(calls[0]) | around
                found.append(replace(end, reached=reached))
            else:
                found.append(self._end(end, pick(result, end.output)))
        self.ends = tuple(found)
        if all(end.reached is not None for end in self.ends):
            reached = frozenset().union(*(end.reached or () for end in self.ends))
            self.behind = (*(name for name in self.survey.layers if name not in reached), *watch.behind)

    def _end(self, end: End, tensor: Tensor) -> End:
        """Find where an output's error is taken, and which layers it reaches."""
        watch = self.survey.watch
        assert watch is not None
        reached = watch.upstream(tensor) if len(self.ends) > 1 else None
        # At the output of the last layer, if only operations without parameters follow it (a softmax): there the error
        # is that of the logits. A layer that ran twice, or behind which the shape changes, does not tell which of its
        # outputs that is.
        layers = {name.removeprefix("layer ") for name in watch.sources(tensor)}
        last = layers.pop() if len(layers) == 1 else ""
        single = last in watch.outputs and watch.order.count(last) == 1 and watch.outputs[last].shape == tensor.shape
        if not single or watch.outputs[last] is tensor or (reached is None and watch.order[-1] != last):
            last = ""
        return replace(end, layer=last or None, reached=reached)

    def _check_batch(self, number: int, runs: list[Run]) -> None:
        """Refuse outputs whose batch is not the first axis, or whose other axes grow with it."""
        shape, after = runs[0].outputs[number], self._doubled.outputs[number] if self._doubled is not None else None
        if not shape or after is None or len(after) != len(shape) or after == (2 * shape[0], *shape[1:]):
            return
        grown = [run.outputs[number] for run in runs[2:]]
        if after == shape and any(out is not None and out[1:] == shape[1:] and out[0] != shape[0] for out in grown):
            return  # what was doubled were positions, time being the first axis of the input, and the batch another
        self.problems.append(
            f"the model's output {shape} becomes {after} with twice the samples: a direct rule needs the batch as "
            "the first axis, and no other axis that grows with it; move the axis, or use a layerwise rule"
        )

    # --- runs of the model

    def observe(
        self, example: Any, *, gradients: bool = False, modules: Mapping[str, nn.Module] | None = None
    ) -> Run | None:
        """Run the model, and note shapes; None where it does not run.

        Args:
            example: what it is run on.
            gradients: whether to note which inputs want a gradient.
            modules: what to look at in place of the cuts.
        """
        wholes = self.modules if modules is None else modules
        sites = self.sites if modules is None else {}
        inputs: dict[tuple[str, str], list[Shape]] = {}
        wanted: set[tuple[str, str]] = set()
        places: dict[str, Shape] = {}

        owners = {*wholes, *(site.owner for site in sites.values())}
        first: set[str] = set()  # those that the run in evaluation mode has shown

        def see(owner: str, path: str, x: Tensor) -> None:
            if owner in first:
                return
            inputs.setdefault((owner, path), []).append(tuple(x.shape))
            if x.requires_grad:
                wanted.add((owner, path))

        def before(owner: str, whole: bool) -> Any:
            def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                if whole:
                    map_arguments(args, kwargs, lambda path, x: see(owner, path, x) or x)
                elif args and isinstance(args[0], Tensor):
                    see(owner, "", args[0])

            return note

        def after(name: str) -> Any:
            return lambda module, args, y: places.update({name: tuple(y.shape)} if isinstance(y, Tensor) else {})

        with ExitStack() as hooks:
            for name, module in wholes.items():
                hook = module.register_forward_pre_hook(before(name, True), with_kwargs=True)
                hooks.callback(hook.remove)
            for name, site in sites.items():
                if site.kind is not None:
                    hook = site.module.register_forward_pre_hook(before(name, False), with_kwargs=True)
                    hooks.callback(hook.remove)
            for end in self.ends:
                if end.layer is not None:
                    hook = self.model.get_submodule(end.layer).register_forward_hook(after(end.layer), prepend=True)
                    hooks.callback(hook.remove)
            try:
                with without_trace(self.model, gradients=gradients):
                    modes = {module: module.training for module in self.model.modules()}
                    self.model.eval()
                    result = call(self.model, detached(example) if gradients else example)
                    first |= {owner for owner, _ in inputs}
                    if len(first) < len(owners) and any(modes.values()):  # auxiliary heads run only in training
                        for module, mode in modes.items():
                            module.training = mode
                        call(self.model, example)
                    outputs = [
                        tuple(pick(result, end.output).shape) if end.picked else places.get(end.layer or "")
                        for end in self.ends
                    ]
            except Exception:
                return None
        ends = [
            shape if end.layer is None else places.get(end.layer) for end, shape in zip(self.ends, outputs, strict=True)
        ]
        return Run(ends=ends, outputs=outputs, inputs=inputs, wanted=wanted if gradients else None)

    def _find_arguments(self, base: Run) -> None:
        """Enter the arguments of modules that are cut as a whole: the first, and those that want a gradient."""
        for name, module in self.modules.items():
            paths = [path for owner, path in base.inputs if owner == name]
            if not paths and name in self.named:
                self.problems.append(
                    f"module {name!r} is to be cut and got no floating-point tensor on the example: cut the modules "
                    "that work on one, or call it in forward"
                )
            for path in paths:
                if path == paths[0] or (name, path) in (base.wanted or ()):
                    site = f"{name}{path if path != paths[0] else ''}"
                    shape = base.inputs[name, path][0]
                    self.sites[site] = Site(
                        owner=name, module=module, kind=None, path=path, channels_first=_channels_first(module, shape)
                    )

    def _varied(self, example: Any, base: Run) -> list[Run]:
        """Run the example with every sample twice, and with each axis of its tensors longer (or shorter) by one."""
        self._doubled = self.observe(changed(example, batch_axes(example), 2))
        runs = [] if self._doubled is None else [self._doubled]
        shapes = [shape for calls in base.inputs.values() for shape in calls[:1]]
        plain = all(len(out or ()) < 3 for out in base.ends) and all(
            len(shape) < 3 or site.channels_first
            for name, site in self.sites.items()
            for shape in base.inputs.get((site.owner, site.path), [])[:1]
        )
        samples = {shape[:1] for shape in [*shapes, *base.ends] if shape}
        if plain and len(samples) < 2 and all(len(calls) == 1 for calls in base.inputs.values()):
            return runs
        batch = batch_axes(example)
        tried = {batch}
        for axes in axes_to_change(example):
            for group in axes:
                # Samples of one tensor alone are no other positions, although a broadcast may run with them.
                if group in tried or (self._doubled is not None and group <= batch):
                    break
                tried.add(group)
                run = next(filter(None, (self.observe(changed(example, group, by)) for by in (None, -1))), None)
                if run is not None:
                    runs.append(run)
                    break
        return [
            run for run in runs if all(len(a or ()) == len(b or ()) for a, b in zip(run.ends, base.ends, strict=True))
        ]

    # --- which positions are the same

    def _route(self, number: int, name: str, site: Site, runs: list[Run], convolutions: bool) -> None:
        """Note the shape of the feedback from an output to a cut, and its route, or a problem."""
        key = site.owner, site.path
        runs = [run for run in runs if key in run.inputs and len(run.inputs[key][0]) == len(runs[0].inputs[key][0])]
        calls = runs[0].inputs[key]
        out, x = runs[0].ends[number], calls[0]
        assert out is not None
        routed = find_route(
            [run.ends[number] or () for run in runs],
            [run.inputs[key][0] for run in runs],
            [len(run.inputs[key]) for run in runs],
            channels_first=site.channels_first,
            output_channels_first=convolutions,
            doubled=len(runs) > 1 and runs[1] is self._doubled,
            each=self._each,
        )
        where = "layer" if site.kind is not None else "module"
        if routed is None:
            self.failures[name] = Failure(
                f"{where} {name!r} has input {x} and the model output {out}: a direct rule "
                "needs the batch first in both; name the layer in skip= or move the axis",
                f"{where} {name!r} works on {x}, which are not the rows of the output {out}",
            )
            return
        shape, route = routed
        sizes = {features(each, route) for each in calls}
        if len(sizes) > 1 or len({len(each) for each in calls}) > 1:
            different = f"{where} {name!r} runs on inputs of different sizes ({', '.join(map(str, calls))})"
            self.failures[name] = Failure(
                f"{different}: one direct feedback cannot serve them; use a layerwise rule or name it in skip=",
                different,
            )
            return
        self.shapes.setdefault(name, {})[number] = shape, route
        if not getattr(self.rule, "through_time", True) and self._recurs(site, route):
            self.silent.add(name)

    def _recurs(self, site: Site, route: Route) -> bool:
        """Tell whether a layer works on what it has made itself, one step before."""
        parent, _, child = site.owner.rpartition(".")
        if isinstance(self.model.get_submodule(parent), (ExpandedRecurrent, ExpandedCell)) and child.startswith("hh"):
            return True
        watch = self.survey.watch
        assert watch is not None
        in_steps = route.spread or "q" in "".join(route.output)
        return in_steps and site.kind is not None and site.owner in watch.reaching(site.owner)

    def _made_by_convolutions(self, number: int, result: Any) -> bool:
        """Tell whether convolutions made an output, so that its features are axis 1."""
        end, watch, kinds = self.ends[number], self.survey.watch, self.survey.kinds
        assert watch is not None
        names = {end.layer} if end.layer is not None else watch.sources(pick(result, end.output))
        made_by = [kinds[name] for each in names if (name := each.removeprefix("layer ")) in kinds]
        return bool(made_by) and all(kind.channel_first for kind in made_by)


def _differ_in_one(one: str, other: str) -> bool:
    """Tell whether two names differ in one part between dots: members of a list."""
    parts, others = one.split("."), other.split(".")
    return len(parts) == len(others) and sum(a != b for a, b in zip(parts, others, strict=True)) == 1


def _channels_first(module: nn.Module, shape: Shape) -> bool:
    """Tell whether the features of a module's input are axis 1, as its first layer or normalisation has them."""
    if len(shape) < 3:
        return False
    for part in module.modules():
        kind = next((kind for kind in KINDS.values() if isinstance(part, kind.types)), None)  # also with another map
        if kind is not None:
            return kind.channel_first and shape[1] == getattr(part, "in_channels", shape[1])
        if isinstance(part, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            return True
        if isinstance(part, (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.RNNBase)):
            return False
    return len(shape) > 3
