"""Modules that a direct rule cuts as a whole by itself: inside of them is what cannot be cut one by one.

A weight that is changed before its product has no layer whose input could be cut; rows that a router picks are not the
rows of the output. The smallest module around them that takes and gives rows of the batch is cut in their place: its
input receives e B, and inside of it errors are backpropagated.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from falign._cuts import compiled_around, is_below

if TYPE_CHECKING:
    from falign._direct import DirectPlan, Run


class Failure(NamedTuple):
    """Reason why a cut cannot be made.

    Attributes:
        sentence: with what to do, where nothing around it can be cut in its place.
        why: the reason alone.
    """

    sentence: str
    why: str


def enclose_changed(plan: "DirectPlan") -> None:
    """Cut the modules in whose forward a parameter is changed before its product; note those of the model itself."""
    survey = plan.survey
    spared = survey.watch.only_behind() if survey.watch is not None else frozenset()
    for name, one in survey.derived.items():
        if name in spared:
            continue
        if one.within and all(module and compiled_around(plan.model, module) is None for module in one.within):
            for module in sorted(one.within):
                if not is_below(module, *plan.skip):
                    _enclose(plan, module, f"parameter {name!r} is changed by {one.operation} before its product")
        else:
            plan.problems.append(f"{one.sentence}; in a module of its own, whose input can be cut, it may be changed")


def enclose_failures(plan: "DirectPlan", failures: dict[str, Failure], example: Any) -> None:
    """Cut the next module around each cut that failed; note a problem where there is none.

    Args:
        plan: the plan.
        failures: {name of the cut: why it failed}.
        example: what the model runs on.
    """
    owners = {name: plan.sites[name].owner for name in failures}
    around: dict[str, list[str]] = {}
    for name, owner in owners.items():
        parts = owner.split(".")
        outer = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
        around[name] = [one for one in outer if owner not in plan.named and compiled_around(plan.model, one) is None]
    candidates = {one: plan.model.get_submodule(one) for names in around.values() for one in names}
    seen = plan.observe(example, modules=candidates) if candidates else None
    called = {owner for owner, _ in seen.inputs} if seen is not None else set()
    for name, failure in failures.items():
        module = next((one for one in around[name] if one in called), None)
        if module is None:
            plan.problems.append(failure.sentence)
        else:
            _enclose(plan, module, plan.enclosed.get(owners[name], failure.why))


def _enclose(plan: "DirectPlan", name: str, why: str) -> None:
    """Cut a module as a whole, and nothing inside of it but what ``cut=`` names."""
    if is_below(name, *plan.enclosed):
        return
    plan.enclosed = {other: text for other, text in plan.enclosed.items() if not is_below(other, name)} | {name: why}
    plan.modules = {
        other: module for other, module in plan.modules.items() if other in plan.named or not is_below(other, name)
    } | {name: plan.model.get_submodule(name)}
    plan.sites = {
        key: site
        for key, site in plan.sites.items()
        if not is_below(site.owner, name) or (site.owner in plan.named and site.owner != name)
    }
    for key, one in list(plan.by_hand.items()):
        kept = frozenset(module for module in one.modules if not is_below(module, name))
        if kept:
            plan.by_hand[key] = replace(one, modules=kept, expected=one.expected & kept, always=one.always & kept)
        else:
            del plan.by_hand[key]


def refuse_unasked(plan: "DirectPlan", base: "Run") -> None:
    """Refuse to cut a module in front of which nothing wants an error and which holds half of the network or more.

    Little would be left of the rule. One product alone, such as the first convolution, has no error to hand on.
    """
    if base.wanted is None:
        return
    survey = plan.survey
    ran = survey.layers.keys() & survey.shapes.keys()
    products = {*ran, *survey.by_hand}.union(*(one.within for one in survey.derived.values()))
    for name, why in plan.enclosed.items():
        inside = sum(is_below(product, name) for product in products)
        asked = name in plan.named or any(owner == name for owner, _ in base.wanted)
        if not asked and inside > 1 and 2 * inside >= len(products):
            plan.problems.append(
                f"{why}, so that module {name!r} would be cut as a whole; but nothing in front of it wants an error, "
                f"and {inside} of {len(products)} products would be backpropagated inside of it: add {name!r} to cut= "
                "if that is meant, or use a layerwise rule"
            )
