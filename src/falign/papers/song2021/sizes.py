"""Rates, ridges, widths and lengths of the synthetic runs: the paper's own, and those that it leaves open."""

import polars as pl

RATES = {"identity": 1e-4, "relu": 1e-3, "tanh": 1e-2}
"""η of each activation, as the paper states them."""
STEPS = {"identity": 5000, "relu": 2000, "tanh": 3000}
"""Length of a run; the paper trains "until the loss converges" without a number."""
STRENGTHS = {"identity": (0.0, 1.0, 3.0, 10.0, 30.0), "relu": (0.0, 1.0, 3.0, 10.0), "tanh": (0.0, 0.03, 0.1, 0.3)}
"""λ; the paper's are in a legend that is not readable. These span no alignment to strong alignment."""
WIDTHS = tuple(100 * 2**k for k in range(1, 8))
SHOWN = 3200
"""Width whose trajectories figure 2d-f shows; the widest below it where a preset has none."""


def shown_width(table: pl.DataFrame) -> int:
    """The width whose trajectories are shown."""
    widths = sorted(table["p"].unique().to_list())
    return max((width for width in widths if width <= SHOWN), default=widths[0])
