"""Ticks of logarithmic axes, with numbers written without mathtext, which other fonts would pull apart.

In a file of its own as it subclasses matplotlib, which :mod:`falign.lab.report.style` imports only to draw.
"""

import math
from typing import Any

from matplotlib.ticker import Formatter, LogLocator

from falign.lab.report._numbers import format_number, power_of_ten


class Decades(LogLocator):
    """Powers of ten; where there are too few of them, also their double and fivefold."""

    def __init__(self) -> None:
        super().__init__(numticks=7)

    def tick_values(self, vmin: Any, vmax: Any) -> Any:
        """Places of the ticks."""
        self.set_params(subs=(1.0, 2.0, 5.0) if vmin > 0 and max(vmin, vmax) < 50 * min(vmin, vmax) else (1.0,))
        return super().tick_values(vmin, vmax)


class Powers(Formatter):
    """Plain numbers where all ticks of an axis are handy, powers of ten where there are none else."""

    def __call__(self, x: Any, pos: Any = None) -> str:
        return format_number(x, 3)

    def format_ticks(self, values: Any) -> list[str]:
        """The labels of all ticks together."""
        ticks = [float(value) for value in values]
        low, high = sorted(self.axis.get_view_interval())  # pyright: ignore
        seen = [value for value in ticks if low <= value <= high]
        if not all(_is_power(value) for value in ticks) or all(0.01 <= value <= 1000 for value in seen):
            return [format_number(value, 3) for value in ticks]
        return ["1" if value == 1 else power_of_ten(round(math.log10(value))) for value in ticks]


def _is_power(value: float) -> bool:
    return value > 0 and math.isclose(value, 10 ** round(math.log10(value)))
