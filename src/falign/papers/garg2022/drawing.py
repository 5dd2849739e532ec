"""What the pictures of Garg and Vempala 2022 share: how methods are told apart."""

from typing import NamedTuple

import polars as pl

from falign.lab.report.style import COLOURS, INK


class Look(NamedTuple):
    """How a method from a start is drawn."""

    label: str
    colour: str
    marker: str


GD, ZERO, RANDOM, STAR = (
    Look("GD", INK, "s"),
    Look("FA, zero start", COLOURS[0], "o"),
    Look("FA, random start", COLOURS[1], "^"),
    Look("FA*", COLOURS[2], "D"),
)
LOOKS = (GD, ZERO, RANDOM, STAR)
"""In the order of legends."""


def look(method: str, scale: float) -> Look:
    """Of a method from a start of that scale."""
    if method == "fa":
        return RANDOM if scale else ZERO
    return STAR if method == "fa*" else GD


def methods(data: pl.DataFrame) -> list[tuple[Look, pl.DataFrame]]:
    """Each method and start that is there, with its rows, in the order of legends."""
    there = [(look(*key), data.filter(method=key[0], scale=key[1])) for key in _kinds(data)]
    return sorted(there, key=lambda found: LOOKS.index(found[0]))


def _kinds(data: pl.DataFrame) -> list[tuple[str, float]]:
    return data.select("method", "scale").unique().rows()
