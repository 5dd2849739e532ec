"""Options with several values: the grid of ``falign train --rule fa,dfa --seed 0..4``, the ranges of ``falign tune``.

A value with commas between its parts is several values; so is an option that is given several times, which is the way
for ``--model`` and ``--transform``, whose values have commas of their own. ``0..4`` are the whole numbers from 0 to 4,
and in a study any range. ``none`` leaves the option out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite, prod
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from falign.lab.config import ConfigError, TrainConfig, option

_OWN_COMMAS = ("model", "transform")
"""Fields whose values have commas of their own."""
_SINGLE = ("dataset", "rule_option")
"""Fields of which there is one value, or whose option means something else when it is repeated."""
_MOST = 10_000
"""Runs that a grid may have."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An option with several values.

    Attributes:
        field: The field of the configuration.
        values: Its values as words of the command line; "none" leaves the option out. None if it is a range.
        low: Lower end of a range.
        high: Upper end of a range.
        whole: Whether the numbers of the range are whole.
    """

    field: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    @property
    def option(self) -> str:
        """The option as messages name it."""
        return f"--{short(self.field)}"


@dataclass(frozen=True)
class Point:
    """A point of a grid.

    Attributes:
        values: {field: value as a word of the command line}, of what differs.
        words: All words of the command for it.
    """

    values: dict[str, str]
    words: tuple[str, ...]

    @property
    def label(self) -> str:
        """Differing options, as ``rule=fa,seed=0``."""
        return ",".join(f"{short(field)}={value}" for field, value in self.values.items())


def short(field: str) -> str:
    """Return a field's name as labels, tables and names of folders have it."""
    return "lr" if field == "learning_rate" else field.replace("_", "-")


def read_axes(words: Sequence[str], *, ranges: bool) -> tuple[list[str], list[Axis]]:
    """Take the options that have several values out of the words of a command.

    Args:
        words: The words behind the command's name.
        ranges: Whether ``LOW..HIGH`` stays a range, as a study takes it; else it is the whole numbers of it.

    Returns:
        The other words, and the axes in the order of the words.

    Raises:
        ConfigError: A list or a range is none.
    """
    kinds = _kinds()
    names = {option(field): field for field in kinds} | {"--lr": "learning_rate"}
    given: dict[str, list[str]] = {}
    places: dict[str, list[int]] = {}
    index = 0
    while index < len(words):
        name, equals, value = words[index].partition("=")
        at, index = [index], index + 1
        if name not in names:
            continue
        if not equals and index < len(words):
            value, at, index = words[index], [*at, index], index + 1
        given.setdefault(names[name], []).append(value)
        places.setdefault(names[name], []).extend(at)
    axes, taken = [], set()
    for field, texts in given.items():
        axis = _axis(field, texts, whole=int in kinds[field], number=float in kinds[field], ranges=ranges)
        if axis is not None:
            axes.append(axis)
            taken.update(places[field])
    return [word for place, word in enumerate(words) if place not in taken], axes


def points(words: Sequence[str], axes: Sequence[Axis]) -> list[Point]:
    """List the points of a grid, the last axis running fastest.

    Args:
        words: The words of the command that all have in common.
        axes: The axes.

    Raises:
        ConfigError: There are too many.
    """
    if (number := prod(len(axis.values) for axis in axes)) > _MOST:
        raise ConfigError(f"the grid has {number:,} runs, expected at most {_MOST:,}: give fewer values")
    listed = []
    for values in product(*(axis.values for axis in axes)):
        differing = {axis.field: value for axis, value in zip(axes, values, strict=True)}
        said = (f"{option(field)}={value}" for field, value in differing.items() if value != "none")
        listed.append(Point(differing, (*words, *said)))
    return listed


def _kinds() -> dict[str, tuple[type, ...]]:
    """Return {field: the types that it may have} of the options that may have several values."""
    hints = get_type_hints(TrainConfig)
    kinds = {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for name, hint in hints.items()
        if name not in _SINGLE
    }
    return {name: kind for name, kind in kinds.items() if bool not in kind}


def _axis(field: str, texts: Sequence[str], *, whole: bool, number: bool, ranges: bool) -> Axis | None:
    """Read the texts of an option; None if it has one value."""
    values: list[str] = []
    for text in texts:
        for value in [text] if field in _OWN_COMMAS else _split(text):
            if (whole or number) and (found := _RANGE.fullmatch(value)):
                if ranges:
                    if len(texts) > 1 or value != text:
                        raise ConfigError(f"{option(field)} is {text:.60}, expected one range, or values without one")
                    return _range(field, *found.groups(), whole=whole)
                values += _whole_numbers(field, *found.groups(), whole=whole)
            else:
                values.append(value)
    if len(values) < 2:
        return None if values and values == list(texts) else Axis(field=field, values=tuple(values))
    if "" in values:
        raise ConfigError(f"{option(field)} is {','.join(texts):.60}, with nothing at a comma: give a value there")
    if twice := [value for value in values if values.count(value) > 1]:
        raise ConfigError(f"{option(field)} has the value {twice[0]:.60} twice: leave one of them out")
    return Axis(field=field, values=tuple(values))


def _split(text: str) -> list[str]:
    """Split at commas that are in no parentheses."""
    return re.split(r",(?![^()]*\))", text)


def _range(field: str, low: str, high: str, *, whole: bool) -> Axis:
    ends = float(low), float(high)
    if not (ends[0] < ends[1] and all(map(isfinite, ends))) or (whole and not all(each.is_integer() for each in ends)):
        kind = "whole numbers" if whole else "numbers"
        raise ConfigError(f"{option(field)} is {low}..{high}, expected LOW..HIGH, two {kind}, the smaller one first")
    return Axis(field=field, low=ends[0], high=ends[1], whole=whole)


def _whole_numbers(field: str, low: str, high: str, *, whole: bool) -> list[str]:
    if not whole:
        raise ConfigError(
            f"{option(field)} is {low}..{high}, a range of real numbers, which falign tune searches: for a grid give "
            f"the values, as {option(field)} {low},{high}"
        )
    axis = _range(field, low, high, whole=True) if low != high else Axis(field=field, low=float(low), high=float(low))
    first, last = int(axis.low), int(axis.high)
    if last - first >= _MOST:
        raise ConfigError(f"{option(field)} is {low}..{high}, expected at most {_MOST:,} numbers: give fewer")
    return [str(number) for number in range(first, last + 1)]
