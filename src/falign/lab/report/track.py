"""A check as a small picture: where the number lies beside its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from falign.lab.experiment import Check

_EDGE = 5.0
"""Percent that are kept free at both ends, so that a number far off is still seen."""


@dataclass(frozen=True)
class Track:
    """Positions in percent of the track's length.

    Args:
        start: Where the interval begins.
        end: Where it ends.
        at: Where the number lies; at the track's end if it is farther off.
        open: To which side the interval has no end.
    """

    start: float
    end: float
    at: float
    open: Literal["", "up", "down"]


def tracks(checks: Sequence[Check]) -> list[Track | None]:
    """Where the numbers of a claim lie beside their intervals.

    A closed interval takes the middle half of its track. An open one begins or ends at a third, and the farthest
    of the claim's numbers from such an end sets the scale.

    Args:
        checks: All checks of a claim.

    Returns:
        The positions, check by check; None where there is nothing to see: no end, no width, or no finite number.
    """
    off = [abs(check.measured - end) for check in checks if (end := _only_end(check)) is not None]
    farthest = max((distance for distance in off if math.isfinite(distance)), default=0.0) or 1.0
    return [_track(check, farthest) for check in checks]


def _track(check: Check, farthest: float) -> Track | None:
    low, high, measured = check.low, check.high, check.measured
    if not math.isfinite(measured) or not low < high:
        return None
    if (end := _only_end(check)) is not None:
        far = 50.0 * (measured - end) / farthest
        up = math.isfinite(low)
        return Track(33.0, 100.0, _within(33.0 + far), "up") if up else Track(0.0, 67.0, _within(67.0 + far), "down")
    if math.isinf(low):
        return None
    return Track(25.0, 75.0, _within(25.0 + 50.0 * (measured - low) / (high - low)), "")


def _only_end(check: Check) -> float | None:
    """The end of an interval that has one."""
    ends = [end for end in (check.low, check.high) if math.isfinite(end)]
    return ends[0] if len(ends) == 1 else None


def _within(position: float) -> float:
    return round(min(100.0 - _EDGE, max(_EDGE, position)), 2)
