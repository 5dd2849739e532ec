"""Errors that backpropagation hands to what a direct rule cuts: how large they are, and which samples they are of."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from falign._cuts import map_arguments
from falign._delivery import project
from falign._enclose import Failure
from falign._outputs import pick
from falign._positions import at_least_two, batch_axes
from falign._survey import call, detached, without_trace
from falign.feedback import generator

if TYPE_CHECKING:
    from falign._direct import DirectPlan, Run


@contextmanager
def _tapped(
    plan: "DirectPlan", *, gradients: bool = True
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, Tensor]]]:
    """Note what runs hand to the cuts, a tensor a call, and what leaves the modules of ends."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    names = {(site.owner, site.path): name for name, site in plan.sites.items()}

    def through(owner: str, path: str, x: Tensor) -> Tensor:
        if not x.is_floating_point() or (owner, path) not in names:
            return x
        x = x.requires_grad_() if gradients and not x.requires_grad else x
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
        with without_trace(plan.model, gradients=gradients):
            yield inputs, outputs


def check_samples(plan: "DirectPlan", base: "Run") -> None:
    """Note a failure for each cut whose rows are not those of the output in its order, such as tokens sorted by expert.

    Sizes do not show an order. Of an error at the first sample alone the true gradient at the cut does: it may not be
    where the route delivers nothing. Where both have as many rows, so does a run with the samples in other places.
    """
    others = set()
    for name, shapes in plan.shapes.items():
        calls = base.inputs.get((plan.sites[name].owner, plan.sites[name].path))
        if calls and any(calls[0][:1] != (base.ends[number] or ())[:1] for number in shapes):
            others.add(name)
    try:
        wrong = _misplaced(plan, others) | (_reordered(plan) - others)
    except Exception:  # a model without gradients
        return
    for name in sorted(wrong):
        why = f"layer {name!r} works on rows that are not those of the output in its order (sorted, or picked)"
        plan.failures[name] = Failure(
            f"{why}: a direct rule would deliver errors to other samples; name a module around it in cut=, or the "
            "layer in skip=",
            why,
        )


def _misplaced(plan: "DirectPlan", names: set[str]) -> set[str]:
    """Name the cuts at which a true gradient is where the route delivers nothing, of an error at the first sample."""
    if not names:
        return set()
    wrong = set()
    with _tapped(plan) as (inputs, outputs):
        plan.model.eval()  # a normalisation over the batch would spread the error over it
        result = call(plan.model, at_least_two(detached(plan.example)))
        flat = [(name, each, x) for name in sorted(names) for each, x in enumerate(inputs.get(name, []))]
        for number, end in enumerate(plan.ends):
            at = pick(result, end.output) if end.layer is None else outputs[end.layer]
            error = torch.zeros_like(at)
            error[0] = 1 + torch.rand(error[0].shape, generator=generator(0, "", "an error to look by")).to(error)
            carried = torch.autograd.grad(at, [x for *_, x in flat], error, retain_graph=True, allow_unused=True)
            for (name, each, x), true in zip(flat, carried, strict=True):
                if true is not None and number in plan.shapes[name]:
                    shape, route = plan.shapes[name][number]
                    ones = torch.ones(shape, dtype=error.dtype, device=error.device)
                    given = project(error, ones, tuple(x.shape), route, call=each)
                    if bool(((given == 0) & (true != 0)).any()):
                        wrong.add(name)
    return wrong


def _reordered(plan: "DirectPlan") -> set[str]:
    """Name the cuts whose rows do not move, or to other places, when samples of the example and of the output move."""
    example = at_least_two(detached(plan.example))
    axes = batch_axes(example)
    leaves, spec = tree_flatten(example)
    tensors = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for number, axis in axes:
        leaves[tensors[number]] = leaves[tensors[number]].roll(1, axis)
    rows: list[dict[str, Tensor]] = []
    ends: list[list[Tensor]] = []
    for each in (example, tree_unflatten(leaves, spec)):
        with _tapped(plan, gradients=False) as (inputs, outputs):
            plan.model.eval()
            result = call(plan.model, each)
            ends.append(
                [_sums(pick(result, end.output) if end.layer is None else outputs[end.layer]) for end in plan.ends]
            )
        rows.append({name: _sums(calls[0]) for name, calls in inputs.items() if calls[0].dim() > 1})
    wrong: set[str] = set()
    if not all(_close(one.roll(1, 0), other) for one, other in zip(*ends, strict=True)):
        return wrong  # what was moved were no samples of the output
    for name in rows[0].keys() & rows[1].keys():
        one, other = rows[0][name], rows[1][name]
        if one.shape == other.shape and not _close(one.roll(1, 0), other) and _close(one.sort()[0], other.sort()[0]):
            wrong.add(name)
    return wrong


def _sums(x: Tensor) -> Tensor:
    """Sum up each row in float64, weighted so that other rows have other sums."""
    flat = (x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)).detach().double()
    return flat @ torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device).sin()


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().mean()))


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
