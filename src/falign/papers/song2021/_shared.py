"""A simulator's batch of the runs of a block, theorems as experiments, and what figure 2 and its kin have in common."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, sqrt
from warnings import catch_warnings, simplefilter

import polars as pl
import torch
from torch import Tensor

from falign.lab.experiment import Check, Missing, Outcome
from falign.lab.experiment.statistics import least_share, mean, sorted_groups
from falign.theory.two_layer import Engine, Penalty, Trajectory, bytes_needed, simulate
from falign.theory.two_layer.theorems import TheoremCheck


@dataclass(frozen=True)
class Batch:
    """A simulator's batch: rows are seeds, of a width each, columns are ridges; it holds all runs of a block once.

    Simulators compute every row with every column, which costs no more than the runs that were asked for: the runs of
    a grid are such a product.

    Args:
        seeds: Of every run.
        p: Width of every run, or of all of them.
        strength: Ridge λ of every run, constant in time, or of all of them.
    """

    seeds: Sequence[int]
    p: int | Sequence[int]
    strength: float | Sequence[float]

    @cached_property
    def places(self) -> list[tuple[tuple[int, int], Penalty]]:
        """Row (seed, width) and column of every run."""
        count = len(self.seeds)
        widths = [self.p] * count if isinstance(self.p, int) else self.p
        ridges = self.strength if isinstance(self.strength, Sequence) else [self.strength] * count
        rows = zip(self.seeds, widths, strict=True)
        return list(zip(rows, map(Penalty, ridges), strict=True))

    @cached_property
    def rows(self) -> list[tuple[int, int]]:
        """Seed and width of every row."""
        return sorted({row for row, _ in self.places})

    @cached_property
    def penalties(self) -> list[Penalty]:
        """The ridge of every column."""
        return list(dict.fromkeys(penalty for _, penalty in self.places))

    @property
    def row_seeds(self) -> list[int]:
        """The seed of every row."""
        return [seed for seed, _ in self.rows]

    def bytes_needed(self, engine: str, *, n: int, d: int, dtype: torch.dtype) -> int:
        """Bytes that an engine needs for it: see :func:`falign.theory.two_layer.bytes_needed`."""
        return bytes_needed(
            engine=engine,
            n=n,
            d=d,
            p=max(p for _, p in self.rows),
            seeds=len(self.rows),
            penalties=len(self.penalties),
            dtype=dtype,
        )

    def outcomes(self, trajectory: Trajectory, unit: str = "step") -> list[Outcome]:
        """One outcome a run, with a record at every recorded step until it diverged.

        Args:
            trajectory: Of this batch.
            unit: What its steps are, for the message.
        """
        steps = trajectory.steps.tolist()
        outcomes = []
        for row, penalty in self.places:
            place = self.rows.index(row), self.penalties.index(penalty)
            values = {name: column[place] for name, column in trajectory.values.items()}
            outcomes.append(_outcome(values, steps, int(trajectory.diverged[place]), unit))
        return outcomes


def simulate_quietly(
    engine: Engine,
    at: Sequence[int],
    names: Collection[str] | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """``simulate``, without its warning of runs that diverge: their outcomes say so."""
    with catch_warnings():
        simplefilter("ignore", UserWarning)
        return simulate(engine, at, names, progress=progress)


def _outcome(values: dict[str, Tensor], steps: list[int], diverged: int, unit: str) -> Outcome:
    kept = len(steps) if diverged < 0 else steps.index(diverged)
    records = {"step": steps[:kept], **{name: column[:kept].tolist() for name, column in values.items()}}
    if diverged < 0:
        return Outcome(records=records)
    return Outcome(
        records=records, diverged=f"a weight or the loss was not finite at {unit} {diverged}: lower the rate"
    )


# Theorems tried run by run, as experiments: what a check leaves in the table, and how often it held.

DELTA = 0.1
"""δ: the share of runs in which a theorem that holds "with probability at least 1 - δ" may fail."""


def outcome(check: TheoremCheck) -> Outcome:
    """One record: verdict, whether the inequality held, slack, what failed, and every constant that was measured."""
    numbers = {name.replace(" ", "_"): value for name, value in check.constants.items()}
    if "rate" in numbers:
        numbers["contraction"] = numbers.pop("rate")  # the point's "rate" is η
    numbers["slack"] = check.slack
    return Outcome(
        records={
            "verdict": [check.verdict],
            "held": [check.share],
            "failing": [", ".join(assumption.name for assumption in check.failing) or None],
            **{name: [value if isfinite(value) else None] for name, value in numbers.items()},
        }
    )


def shares(table: pl.DataFrame, by: Sequence[str], label: str) -> tuple[Check, ...]:
    """For every group, the share of runs in which the inequality held, among those that meet the assumptions.

    Args:
        table: One row a run.
        by: Columns that make a group.
        label: With a place for each of them, such as "n = {n}".

    Returns:
        One check a group: the least share that does not contradict 1 - δ at 99 %, by the binomial law.

    Raises:
        Missing: A group has no run that meets the assumptions, or too few to contradict anything.
    """
    checks = []
    for values, runs in sorted_groups(table, by):
        name = label.format(**dict(zip(by, values, strict=True)))
        # Of runs outside its assumptions a theorem says nothing: they speak neither for it nor against it.
        met = runs.filter(pl.col("verdict") != "assumption fails")
        if met.is_empty():
            failing = ", ".join(sorted(set(runs["failing"].drop_nulls().to_list())))
            raise Missing(f"{name}: no run meets the assumptions: {failing}")
        left_out = f", {runs.height - met.height} do not meet the assumptions" if met.height < runs.height else ""
        checks.append(
            Check(
                label=f"{name}: share of {met.height} runs (least slack {met['slack'].min():.2g}{left_out})",
                measured=float(met["held"].mean()),  # pyright: ignore[reportArgumentType]  # a column of numbers
                low=least_share(met.height, 1 - DELTA),
            )
        )
    return tuple(checks)


# Rates, ridges, widths and lengths of the synthetic runs: the paper's, and those that it leaves open.

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


def vanishing(ends: pl.DataFrame, label: str, comparisons: int) -> Check:
    """Check that the cosine falls between the narrowest and the widest network at least as 1/√p does.

    Args:
        ends: One row a run: columns "p", "seed" and "cosine", two widths or more.
        label: What the runs are.
        comparisons: How many such checks are judged together.
    """
    widths = sorted(ends["p"].unique().to_list())
    if len(widths) < 2:
        raise Missing(f"{label}: there is only one width")
    shrink = sqrt(widths[0] / widths[-1])
    narrow, wide = (ends.filter(pl.col("p") == p).sort("seed") for p in (widths[0], widths[-1]))
    mean_narrow, mean_wide = (mean(rows["cosine"], of=label) for rows in (narrow, wide))
    excess = mean(wide["cosine"] - shrink * narrow["cosine"], of=label)
    return Check(
        label=f"{label}: mean cosine at p = {widths[-1]}, where {mean_narrow.value:.3f} at p = {widths[0]}",
        measured=mean_wide.value,
        low=-mean_wide.half(comparisons),
        high=shrink * mean_narrow.value + excess.half(comparisons),
    )
