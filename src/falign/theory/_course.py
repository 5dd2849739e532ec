"""Trajectories as tables and pictures: quantities of a block of runs along its steps or times.

A run that left the finite numbers has a word in the table from there on, ends with a cross in the picture, and is named
below with its step and the quantities that went first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from falign._show import Loud, Sheet, Tabular, evenly
from falign._style import COLOURS, INK, axes_for, law, literal, sequence
from falign._validation import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # for annotations only
    Axes = Any

_COLUMNS, _LINES, _NAMED = 4, 12, 3
"""Records, places of an axis, and runs that diverged which a table names at most."""
_DRAWN = 40
"""Lines that are drawn one by one at most; of more, the median and the middle 80 %."""
_WIDE, _FAR = 100.0, 1e100
"""Ratio of the largest to the smallest number from which on the axis is logarithmic; numbers are drawn to here at most,
as matplotlib adds margins to an axis."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """Content of what is shown of a block of runs.

    Attributes:
        what: A few words.
        clock: "step" or "time".
        at: Steps or times of the records.
        axes: Names of the axes of runs.
        values: name -> [*runs times …].
        main: The quantity that is drawn where none is named; the first by default.
        limit: The quantity that is drawn beside it, dashed.
        diverged: Step from which a run is not finite, -1 where it always is [*runs].
        lost: quantity -> step at which it was first not finite, -1 where it always is [*runs].
        apart: The axis whose places are shown each by itself; the others are averaged.
        labels: Names of its places.
    """

    what: str
    clock: str
    at: Sequence[float | int]
    axes: tuple[str, ...]
    values: Mapping[str, Tensor]
    main: str = ""
    limit: str = ""
    diverged: Tensor
    lost: Mapping[str, Tensor] = field(default_factory=dict)
    apart: str = ""
    labels: Sequence[str] = ()

    @property
    def runs(self) -> tuple[int, ...]:
        """Sizes of the axes of runs."""
        return tuple(self.diverged.shape)

    def groups(self) -> "Iterator[tuple[str, _Runs]]":
        """Each place of the axis that is shown apart, with its runs."""
        if self.apart not in self.axes or self.runs[self.axes.index(self.apart)] < 2:
            yield "", _Runs(self.values, self.diverged)
            return
        axis = self.axes.index(self.apart)
        for place in range(self.runs[axis]):
            values = {name: value.select(axis, place) for name, value in self.values.items()}
            yield self.place(self.apart, place), _Runs(values, self.diverged.select(axis, place))

    def place(self, axis: str, index: int) -> str:
        """Name a place of an axis of runs."""
        return self.labels[index] if axis == self.apart and self.labels else f"{axis} {index}"

    def averaged(self) -> str:
        """Name what a mean is over, such as "4 seeds"; empty where it is over one run."""
        sizes = [(name, size) for name, size in zip(self.axes, self.runs, strict=True) if name != self.apart]
        return " × ".join(_count(size, name) for name, size in sizes if size > 1)


class _Runs(NamedTuple):
    """Values [*runs times …] of some runs, and when each diverged [*runs]."""

    values: Mapping[str, Tensor]
    diverged: Tensor

    def of(self, name: str) -> Tensor:
        """The values of a quantity [runs times entries]."""
        value, runs = self.values[name].detach().cpu().double(), self.diverged.ndim
        times, *entries = value.shape[runs:]
        return value.reshape(self.diverged.numel(), times, prod(entries))

    def gone(self, at: Sequence[float | int]) -> Tensor:
        """Tell which runs had diverged at each record [runs times]."""
        diverged = self.diverged.detach().cpu().reshape(-1, 1)
        return (diverged >= 0) & (torch.tensor(list(at)) >= diverged)


class Trajectories(Tabular):
    """Base of what was recorded along steps or times."""

    def _course(self) -> Course:
        """Describe what was recorded."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """Give a dict a run and record: its place on the axes of runs, step or time, and the quantities.

        None stands for what is not finite; a quantity of several numbers is a list.
        """
        course = self._course()
        places = torch.cartesian_prod(*(torch.arange(size) for size in course.runs)).reshape(-1, len(course.runs))
        parts = _Runs(course.values, course.diverged)
        entries = {name: _listed(parts.of(name), course.values[name].ndim > len(course.runs) + 1) for name in parts[0]}
        return [
            dict(zip(course.axes, place, strict=True))
            | {course.clock: when}
            | {name: entry[run][record] for name, entry in entries.items()}
            for run, place in enumerate(places.tolist())
            for record, when in enumerate(course.at)
        ]

    def plot(self, name: str | None = None, *, ax: "Axes | None" = None) -> "Axes":
        """Draw a quantity along the steps or times, a line a run, and a cross where a run left the finite numbers.

        Args:
            name: Of the quantity; None for the loss, or what else tells most.
            ax: The axes to draw on; None makes a figure of its own in the house style.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: ``ax`` is no axes.
            ValueError: No such quantity was recorded.
        """
        course = self._course()
        name = name if name is not None else course.main or next(iter(course.values), "")
        if not isinstance(name, str) or name not in course.values:
            raise ValueError(f"{describe(name)} was not recorded: choose from {', '.join(course.values)}")
        with axes_for(ax, self._size()) as axes:
            _draw(axes, course, name)
        return axes

    def _sheet(self) -> Sheet:
        course = self._course()
        groups = list(course.groups())
        shown, places = evenly(groups, _LINES), evenly(range(len(course.at)), _COLUMNS)
        table = [["quantity", *[course.apart] * (len(groups) > 1)]]
        table[0] += [f"{course.clock} {course.at[place]:.4g}" for place in places]
        for name in course.values:
            for label, runs in shown:
                values, gone = runs.of(name), runs.gone(course.at)
                cells = [_cell(values[:, place], gone[:, place]) for place in places]
                if any(cell != "-" for cell in cells):
                    table.append([name, *[label] * (len(groups) > 1), *cells])
        return Sheet(head=_head(course), table=table, left=(0,), notes=_notes(course, len(shown), len(groups)))


# Tables.


def _count(size: int, name: str) -> str:
    plural = name if size == 1 else f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"
    return f"{size} {plural}"


def _head(course: Course) -> str:
    runs = " × ".join(_count(size, name) for name, size in zip(course.axes, course.runs, strict=True))
    records = _count(len(course.at), "record")
    return f"{course.what}: {runs}, {records} to {course.clock} {course.at[-1]:.6g}"


def _notes(course: Course, shown: int, groups: int) -> list[str]:
    notes = []
    several = any(value.ndim > len(course.runs) + 1 for value in course.values.values())
    over = [*filter(None, (course.averaged(), "entries" if several else ""))]
    if over:
        notes.append(f"mean ± standard deviation over {' and '.join(over)}")
    if shown < groups:
        notes.append(f"{shown} of {groups} are shown: to_polars() has all")
    return notes + [Loud(line) for line in departures(course)]


def departures(course: Course) -> list[str]:
    """Say which runs left the finite numbers, at which step, and which quantities went first."""
    gone = (course.diverged >= 0).nonzero().tolist()
    if not gone:
        return []
    total = _count(course.diverged.numel(), "run")
    lines = [f"{len(gone)} of {total} left the finite numbers, and no number is told from there:"]
    for run in gone[:_NAMED]:
        place = ", ".join(course.place(name, index) for name, index in zip(course.axes, run, strict=True))
        lines.append(f"- {place or 'it'} at {course.clock} {_left(course, run)}")
    return lines + [f"- and {len(gone) - _NAMED} more"] * (len(gone) > _NAMED)


def _left(course: Course, run: Sequence[int]) -> str:
    """Name the step at which a run left, and what went first."""
    step = course.diverged[tuple(run)]
    first = went_first({name: steps[tuple(run)] for name, steps in course.lost.items()})
    return f"{step.item():.6g}" + f" ({first})" * bool(first)


def went_first(lost: Mapping[str, Tensor]) -> str:
    """Name the quantities that were the first that were not finite, of the step of each, -1 for never."""
    steps = {name: float(step) for name, step in lost.items() if step >= 0}
    names = [name for name, step in steps.items() if step == min(steps.values())]
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


def _cell(values: Tensor, gone: Tensor) -> str:
    """The mean and standard deviation [runs entries] over what is finite, or a word."""
    kept = values[~gone]
    kept = kept[kept.isfinite()]
    if gone.all():
        return Loud("diverged")
    if not len(kept):
        return "-"
    spread = f" ± {kept.std(correction=0):.2g}" if len(kept) > 1 else ""
    text = f"{kept.mean():.4g}{spread}"
    return Loud(f"{text} ({int((~gone).sum())} of {len(gone)})") if gone.any() else text


def _listed(values: Tensor, several: bool) -> list[list[Any]]:
    """Values [runs times entries] as lists, None for what is not finite; of one entry the number itself."""
    array = values.numpy().astype(object)
    array[~values.isfinite().numpy()] = None
    return (array if several else array[..., 0]).tolist()


# Pictures.


def _draw(axes: Axes, course: Course, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    groups = list(course.groups())
    colours = sequence(len(groups)) if len(groups) > 1 else [COLOURS[0]]
    named = [label for label, _ in (groups if len(groups) <= _LINES else evenly(groups, _NAMED))]
    one_by_one = sum(runs.of(name)[:, 0].numel() for _, runs in groups) <= _DRAWN
    for (label, runs), colour in zip(groups, colours, strict=True):
        lines = runs.of(name).masked_fill(runs.gone(course.at).unsqueeze(-1), torch.nan)
        lines = lines.masked_fill(lines.isinf(), torch.nan).clamp(-_FAR, _FAR).transpose(1, 2).flatten(0, 1)
        parts = label, f"mean of {over}" if (over := course.averaged()) and one_by_one else over
        text = literal(", ".join(filter(None, parts)) or name) if label in named else None
        _lines(axes, course.at, lines, colour, text, one_by_one=one_by_one or len(lines) == 1)
    if name == course.main and course.limit in course.values:
        limits = _Runs(course.values, course.diverged).of(course.limit)[..., 0]
        # One record is a point: its limit is drawn as far as one can see it.
        x = course.at if len(course.at) > 1 else [course.at[0] - 0.4, course.at[0] + 0.4]
        for place, line in enumerate(limits.masked_fill(~limits.isfinite(), torch.nan)[:_DRAWN]):
            law(axes, x, line.expand(len(x)), literal(course.limit) if not place else "")
    drawn = [float(y) for line in axes.get_lines() for y in line.get_ydata()]  # pyright: ignore
    drawn = torch.tensor(drawn, dtype=torch.float64)
    drawn = drawn[drawn.isfinite()]
    if len(drawn) and float(drawn.min()) > 0 and float(drawn.max() / drawn.min()) > _WIDE:
        axes.set_yscale("log")
    else:
        _look_at_the_kept(axes, course, name)
    _cross(axes, course, name)
    if course.clock != "time":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_xlabel(course.clock)
    axes.set_ylabel(literal(name.replace("_", " ")))
    axes.set_title(course.what, loc="left")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def _look_at_the_kept(axes: Axes, course: Course, name: str) -> None:
    """Scale the vertical axis by the runs that stayed finite, where one that left would make them a flat line."""
    stayed = course.diverged.flatten() < 0
    kept = _Runs(course.values, course.diverged).of(name)[stayed]
    kept = kept[kept.isfinite()]
    if stayed.all() or not len(kept):
        return
    low, high = float(kept.min()), float(kept.max())
    seen, span = axes.get_ylim(), high - low
    if 0 < 10 * span < seen[1] - seen[0]:
        axes.set_ylim(low - 0.05 * span, high + 0.05 * span)


def _lines(
    axes: Axes, at: Sequence[float | int], lines: Tensor, colour: str, label: str | None, *, one_by_one: bool
) -> None:
    """Draw lines [lines times]: each, and their mean; of many the median and the middle 80 %."""
    marker = "o" if len(at) <= _LINES else None
    if len(lines) == 1:
        axes.plot(at, lines[0], color=colour, label=label, marker=marker)
    elif one_by_one:
        for line in lines:
            axes.plot(at, line, color=colour, marker=marker, markersize=3.0, linewidth=0.8, alpha=0.55)
        axes.plot(at, lines.mean(0), color=colour, marker=marker, label=label)
    else:
        low, middle, high = lines.nanquantile(torch.tensor([0.1, 0.5, 0.9], dtype=lines.dtype), dim=0)
        axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(at, middle, color=colour, label=label and f"{label}: median, middle 80 %")


def _cross(axes: Axes, course: Course, name: str) -> None:
    """Mark where runs left the finite numbers, and say in the legend when the first did and what went first."""
    gone = (course.diverged >= 0).nonzero().tolist()
    if not gone:
        return
    whole = _Runs(course.values, course.diverged)
    values = whole.of(name).masked_fill(whole.gone(course.at).unsqueeze(-1), torch.nan)[..., 0]
    ends = [(line.isfinite().nonzero().flatten().tolist(), line) for line in values[course.diverged.flatten() >= 0]]
    first = min(gone, key=lambda run: float(course.diverged[tuple(run)]))
    x = [course.at[kept[-1]] if kept else course.at[0] for kept, _ in ends]
    low, high = axes.get_ylim()
    y = [max(low, min(high, float(line[kept[-1]]))) if kept else low for kept, line in ends]
    axes.plot(
        x, y, color=INK, marker="x", markersize=7, linestyle="none", clip_on=False, zorder=4,
        label=f"{len(gone)} of {course.diverged.numel()} diverged, the first at {course.clock} {_left(course, first)}",
    )  # fmt: skip
