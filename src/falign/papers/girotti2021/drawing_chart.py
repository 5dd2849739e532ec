"""Picture of the maps: learning time over (K, λ), and how it changes with λ."""

import numpy as np
import polars as pl
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from falign.lab.report.style import COLOURS, each_of, law, logarithmic, panels
from falign.theory.deep_linear import critical_target

_BRANCHES = ("output", "aligned", "anti-aligned")
_NAMES = {"output": "θ₁ = 0, θ₂ = K", "aligned": "θ₁ = √(-2K), θ₂ = 0", "anti-aligned": "θ₁ = -√(-2K), θ₂ = 0"}


def maps(data: pl.DataFrame) -> Figure:
    """A column a branch of starts: time above, its slope in λ below."""
    figure, axes = panels(
        len(_BRANCHES),
        2,
        titles=[_NAMES[name] for name in _BRANCHES],
        xlabels=["invariant K"],
        ylabels=["λ"] * 2,
        height=2.9,
    )
    finite = data["time"].filter(data["time"].is_finite()).to_numpy()
    norm = LogNorm(float(finite.min()), min(float(finite.max()), 50.0))
    signs = LinearSegmentedColormap.from_list("order", [COLOURS[0], "#f4f4f2", COLOURS[1]])
    rows = axes[: len(_BRANCHES)], axes[len(_BRANCHES) :]
    for above, below, (branch, own) in zip(*rows, each_of(data, "branch", _BRANCHES), strict=True):
        K, λ, time, slope = _tables(own)
        shown = {"shading": "nearest", "rasterized": True}
        times = above.pcolormesh(K, λ, time.T, norm=norm, cmap="viridis_r", **shown)
        slopes = below.pcolormesh(K, λ, slope.T, vmin=-1, vmax=1, cmap=signs, **shown)
        for panel in (above, below):
            panel.grid(visible=False)
            if branch == "anti-aligned":
                law(panel, K, critical_target(K).numpy(), "λ_c(K)")
            panel.set_ylim(λ[0], λ[-1])
            logarithmic(panel, "y")
        if branch == _BRANCHES[-1]:
            figure.colorbar(times, ax=rows[0], label="time to 90 %", pad=0.01)
            figure.colorbar(slopes, ax=rows[1], label="d ln time / d ln λ", pad=0.01, extend="both")
            below.legend(loc="lower left", fontsize=8)
    return figure


def _tables(own: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """K, λ, and times and slopes as tables [K λ]."""
    rows = own.sort("invariant", "target")
    K, λ = (np.unique(rows[name].to_numpy()) for name in ("invariant", "target"))
    time, slope = (rows[name].to_numpy().reshape(len(K), len(λ)) for name in ("time", "slope"))
    return K, λ, time, slope
