"""Binding of a grid's axes to the keywords of an experiment's functions: which there are, of which types.

An experiment is a function of its axes. Its ``run`` takes each axis as a keyword that has a type, and

* either ``seed``: the runs of a block are computed one after the other, each by a call that gives its ``Outcome``;
* or ``seeds``: a block is computed by one call that gives a list of outcomes. An axis that is annotated as a sequence,
  such as ``strength: Sequence[float]``, brings a value for every run; any other is the same for the whole block.

``memory`` and ``cost`` are bound likewise, but take the axes that they name and no others.

There is one other form, ``run(tasks, setting)``, ``memory(tasks)`` and ``cost(task)``: a block as it is, for what has
to know the keys of its runs, or has points that differ in their axes. No paper needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from falign.lab.experiment._specification import Outcome, Point, Setting, Task

_NOT_AXES = ("seed", "seeds", "setting")


@dataclass(frozen=True)
class _Form:
    """Keywords of a function.

    Args:
        seeds: How it takes seeds: "seed", "seeds", or "" if it takes none.
        tasks: Whether it takes tasks as they are.
        setting: Whether it takes the setting.
        kinds: {axis: its type, or None if it has none that is looked at}.
        columns: Axes that bring a value for every run.
        optional: Axes that a point may lack.
        open: Whether it takes any other axis as well.
    """

    seeds: str
    tasks: bool
    setting: bool
    kinds: Mapping[str, type | None]
    columns: frozenset[str]
    optional: frozenset[str]
    open: bool


@lru_cache(maxsize=1024)
def _form(function: Callable) -> _Form:
    parameters = signature(function).parameters
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # annotations for readers only
        hints = {}
    axes = {
        name: parameter
        for name, parameter in parameters.items()
        if name not in _NOT_AXES and parameter.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    }
    columns = {name for name in axes if get_origin(hints.get(name)) in (Sequence, list, tuple)}
    return _Form(
        seeds=next((name for name in ("seed", "seeds") if name in parameters), ""),
        tasks="tasks" in parameters or "task" in parameters,
        setting="setting" in parameters,
        kinds={name: _kind(hints.get(name), in_column=name in columns) for name in axes},
        columns=frozenset(columns),
        optional=frozenset(name for name, parameter in axes.items() if parameter.default is not Parameter.empty),
        open=any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()),
    )


def _kind(hint: Any, *, in_column: bool) -> type | None:
    """The scalar type of an annotation: of its elements if it is a sequence, and without None if it is optional."""
    if in_column:
        hint = get_args(hint)[0] if get_args(hint) else None
    if get_origin(hint) in (Union, UnionType):
        alternatives = [each for each in get_args(hint) if each is not NoneType]
        hint = alternatives[0] if len(alternatives) == 1 else None
    return hint if hint in (str, bool, int, float) else None


def mismatch(run: Callable, points: Sequence["Point"], together: Sequence[str]) -> str | None:
    """A sentence on how a grid's axes and the keywords of ``run`` do not fit each other; None if they do."""
    form = _form(run)
    if form.tasks:
        return None
    if not form.seeds:
        return "its run takes neither seed nor seeds: add one of these keywords, or take tasks and setting"
    if not (form.setting or form.open):
        return "its run takes no setting: add this keyword, which brings device and data"
    for axis in together:
        if form.seeds == "seeds" and axis in form.kinds and axis not in form.columns:
            return f"its blocks differ in {axis!r}: annotate it in run as Sequence[…], one value a run"
    for point in points:
        for axis, value in point.items():
            if axis not in form.kinds and not form.open:
                return f"its run takes no axis {axis!r}: add this keyword, or leave the axis out of the grid"
            if not _fits(form.kinds.get(axis), value):
                kind = form.kinds[axis]
                return f"axis {axis!r} has {value!r}, expected {getattr(kind, '__name__', kind)} as run annotates it"
        if lacking := [axis for axis in form.kinds if axis not in point and axis not in form.optional]:
            return f"its run takes {lacking[0]!r}, which is no axis of its grid: add the axis, or give it a default"
    return None


def _fits(kind: type | None, value: object) -> bool:
    return kind is None or type(value) is kind or (kind is float and type(value) is int)


def call_run(run: Callable, tasks: Sequence["Task"], setting: "Setting") -> "Sequence[Outcome]":
    """Compute a block of runs by whichever form ``run`` has.

    Args:
        run: The function of an experiment.
        tasks: The runs, alike in all axes that ``run`` takes once for the whole block.
        setting: Device, data, and to whom progress is told.

    Returns:
        What ``run`` gave: an outcome for each run, in their order.
    """
    form = _form(run)
    if form.seeds == "seed":
        return [run(seed=task.seed, setting=setting, **_scalars(form, task.point)) for task in setting.each(tasks)]
    if form.seeds == "seeds":
        return run(seeds=tuple(task.seed for task in tasks), setting=setting, **_columns(form, tasks))
    return run(tasks, setting)


def call_memory(memory: Callable, tasks: Sequence["Task"]) -> int:
    """Bytes that a block needs, by whichever form ``memory`` has."""
    form = _form(memory)
    if form.tasks or not (form.seeds or form.kinds):
        return memory(tasks)
    seeds = {"seeds": tuple(task.seed for task in tasks)} if form.seeds else {}
    return memory(**seeds, **_columns(form, tasks))


def call_cost(cost: Callable, task: "Task") -> int | float:
    """Cost of a run, by whichever form ``cost`` has."""
    form = _form(cost)
    return cost(task) if form.tasks or not form.kinds else cost(**_scalars(form, task.point))


def _scalars(form: _Form, point: "Point") -> dict[str, Any]:
    """The values of a point that a function takes, whole numbers made real where it annotates them so."""
    return {
        axis: float(value) if form.kinds.get(axis) is float else value
        for axis, value in point.items()
        if form.open or axis in form.kinds
    }


def _columns(form: _Form, tasks: Sequence["Task"]) -> dict[str, Any]:
    """The values of a block that a function takes: one for each run of the axes that it annotates as sequences."""
    points = [_scalars(form, task.point) for task in tasks]
    return {
        axis: tuple(point[axis] for point in points) if axis in form.columns else value
        for axis, value in points[0].items()
    }
