"""Errors that backpropagation hands to what a direct rule cuts: how large they are, and which samples they are of."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from falign._attached import map_arguments
from falign._delivery import project
from falign._outputs import pick
from falign._positions import at_least_two
from falign._survey import call, detached, without_trace
from falign.feedback import generator

if TYPE_CHECKING:
    from falign._direct import DirectPlan, Run


@contextmanager
def _tapped(plan: "DirectPlan") -> Iterator[tuple[dict[str, list[Tensor]], dict[str, Tensor]]]:
    """Note what runs with gradients hand to the cuts, a tensor a call, and what leaves the modules of ends."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    names = {(site.owner, site.path): name for name, site in plan.sites.items()}

    def through(owner: str, path: str, x: Tensor) -> Tensor:
        if not x.is_floating_point() or (owner, path) not in names:
            return x
        x = x if x.requires_grad else x.requires_grad_()
        x = x.clone() if path else x.view_as(x)  # through it passes this layer's share of the error alone
        inputs.setdefault(names[owner, path], []).append(x)
        return x

    def before(owner: str, whole: bool) -> Any:
        def replaced(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
            if whole:
                return map_arguments(args, kwargs, lambda path, x: through(owner, path, x))
            return (through(owner, "", args[0]), *args[1:]), kwargs

        return replaced

    def keep(name: str) -> Any:
        return lambda module, args, y: outputs.update({name: y})

    with ExitStack() as hooks:
        for owner, module, whole in {(s.owner, s.module, s.kind is None) for s in plan.sites.values()}:
            hooks.callback(module.register_forward_pre_hook(before(owner, whole), with_kwargs=True).remove)
        for end in plan.ends:
            if end.layer is not None:
                hook = plan.model.get_submodule(end.layer).register_forward_hook(keep(end.layer))
                hooks.callback(hook.remove)
        with without_trace(plan.model, gradients=True):
            yield inputs, outputs


def check_samples(plan: "DirectPlan", base: "Run") -> None:
    """Refuse a cut whose rows are not those of the output in its order, such as tokens sorted by their expert.

    Sizes do not show an order. A gradient does: of an error at the first sample alone, the true one at the cut may
    not be where the route delivers nothing.
    """
    asked = [
        (number, name)
        for name, shapes in plan.shapes.items()
        for number in shapes
        if (calls := base.inputs.get((plan.sites[name].owner, plan.sites[name].path)))
        and calls[0][:1] != (base.ends[number] or ())[:1]
    ]
    if not asked:
        return
    try:
        with _tapped(plan) as (inputs, outputs):
            plan.model.eval()  # a normalisation over the batch would spread the error over it
            result = call(plan.model, at_least_two(detached(plan.example)))
            wrong = {name for number, name in asked if not _fits(plan, number, name, result, inputs, outputs)}
    except Exception:  # a model without gradients
        return
    plan.problems += [
        f"layer {name!r} works on rows that are not those of the output in its order (sorted, or picked): a direct "
        "rule would deliver errors to other samples; name a module around it in cut=, or the layer in skip="
        for name in sorted(wrong)
    ]


def _fits(
    plan: "DirectPlan",
    number: int,
    name: str,
    result: Any,
    inputs: dict[str, list[Tensor]],
    outputs: dict[str, Tensor],
) -> bool:
    """Tell whether the true gradient of an error at the first sample is nowhere but where the route delivers it."""
    end, (shape, route) = plan.ends[number], plan.shapes[name][number]
    at = pick(result, end.output) if end.layer is None else outputs[end.layer]
    error = torch.zeros_like(at)
    error[0] = 1 + torch.rand(error[0].shape, generator=generator(0, "", "an error to look by")).to(error)
    xs = inputs.get(name, [])
    carried = torch.autograd.grad(at, xs, error, retain_graph=True, allow_unused=True)
    for each, (x, true) in enumerate(zip(xs, carried, strict=True)):
        if true is not None:
            ones = torch.ones(shape, dtype=error.dtype, device=error.device)
            if bool(((project(error, ones, tuple(x.shape), route, call=each) == 0) & (true != 0)).any()):
                return False
    return True


def measure_gains(plan: "DirectPlan") -> dict[tuple[int, str], float]:
    """Measure {(number of the end, name): |error that backpropagation hands to the cut| / |error at the end|}.

    Of one random error, on the example; empty where the model does not run with gradients.
    """
    gains: dict[tuple[int, str], float] = {}
    try:
        with _tapped(plan) as (inputs, outputs):
            result = call(plan.model, detached(plan.example))
            for number, end in enumerate(plan.ends):
                at = pick(result, end.output) if end.layer is None else outputs[end.layer]
                random = generator(0, "", "an error to measure by")
                error = torch.randn(at.shape, generator=random, device="cpu", dtype=torch.float32)
                error = error.to(at.device, at.dtype)
                flat = [(name, x) for name, calls in inputs.items() for x in calls]
                carried = torch.autograd.grad(at, [x for _, x in flat], error, retain_graph=True, allow_unused=True)
                squares: dict[str, list[float]] = {}
                for (name, _), here in zip(flat, carried, strict=True):
                    if here is not None:
                        squares.setdefault(name, []).append(float(here.double().square().sum()))
                for name, each in squares.items():
                    if number in plan.shapes.get(name, {}):
                        route = plan.shapes[name][number][1]
                        steps = route.spread or "q" in "".join(route.output)
                        total = sum(each) if steps else each[-1]
                        gains[number, name] = total**0.5 / float(error.double().norm())
    except Exception:  # a model without gradients, or one that runs only so: then the layers' own gains must do
        return {}
    return gains
