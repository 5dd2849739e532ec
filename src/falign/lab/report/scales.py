"""Logarithmic axes, with numbers written without mathtext, which other fonts would pull apart."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, LogLocator, NullFormatter, NullLocator

from falign.lab.report.numbers import power_of_ten, shown


def logarithmic(axes: Axes, which: Literal["x", "y", "both"], ticks: Sequence[float | int] | None = None) -> None:
    """Scale axes by powers of ten.

    Args:
        axes: The panel; its lines may come before or after.
        which: Which of its axes.
        ticks: Where to write numbers, such as the widths that were run; None is powers of ten.
    """
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which not in (name, "both"):
            continue
        axes.set(**{f"{name}scale": "log"})
        if ticks is None:
            axis.set_major_locator(_Decades())
        else:
            axis.set_ticks(list(ticks))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(_Powers())
        axis.set_minor_formatter(NullFormatter())


class _Decades(LogLocator):
    """Powers of ten; where there are too few of them, also their double and fivefold."""

    def __init__(self) -> None:
        super().__init__(numticks=7)

    def tick_values(self, vmin: Any, vmax: Any) -> Any:
        """Where the ticks are."""
        self.set_params(subs=(1.0, 2.0, 5.0) if vmin > 0 and max(vmin, vmax) < 50 * min(vmin, vmax) else (1.0,))
        return super().tick_values(vmin, vmax)


class _Powers(Formatter):
    """Plain numbers where all ticks of an axis are handy, powers of ten where there are none else."""

    def __call__(self, x: Any, pos: Any = None) -> str:
        return shown(x, 3)

    def format_ticks(self, values: Any) -> list[str]:
        """The labels of all ticks together."""
        ticks = [float(value) for value in values]
        low, high = sorted(self.axis.get_view_interval())  # pyright: ignore
        seen = [value for value in ticks if low <= value <= high]
        if not all(_is_power(value) for value in ticks) or all(0.01 <= value <= 1000 for value in seen):
            return [shown(value, 3) for value in ticks]
        return ["1" if value == 1 else power_of_ten(round(math.log10(value))) for value in ticks]


def _is_power(value: float) -> bool:
    return value > 0 and math.isclose(value, 10 ** round(math.log10(value)))
