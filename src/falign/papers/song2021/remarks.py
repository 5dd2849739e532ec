"""Remarks of section 5: dropout; and how figure 2 depends on what the paper leaves open."""

from collections.abc import Sequence
from math import sqrt

import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Experiment, Missing, Outcome, Picture, Reading, Setting, Task, grid
from falign.lab.experiment.statistics import final, mean, paired, summary
from falign.papers.song2021 import figure2
from falign.papers.song2021.blocks import batch, outcomes
from falign.papers.song2021.drawing_theory import dropout_by_width, readings
from falign.theory.two_layer import Literal, bytes_needed, draw, simulate, spaced


def run_dropout(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train with dropout on the hidden neurons, literally."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    activation = str(point["activation"])
    start = draw(
        [seed for seed, _ in rows],
        n=int(point["n"]),
        d=int(point["d"]),
        p=int(point["p"]),
        activation=activation,
        dtype=torch.float32,
        device=setting.device,
    )
    engine = Literal(
        start, activation=activation, rate=float(point["rate"]), penalties=penalties, dropout=float(point["dropout"])
    )
    return outcomes(tasks, simulate(engine, spaced(int(point["steps"]), 40), ("loss", "cosine")))


def memory_dropout(tasks: Sequence[Task]) -> int:
    """Bytes of a block."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    return bytes_needed(
        engine="literal",
        n=int(point["n"]),
        d=int(point["d"]),
        p=int(point["p"]),
        seeds=len(rows),
        penalties=len(penalties),
        dtype=torch.float32,
    )


def _ends(table: pl.DataFrame) -> pl.DataFrame:
    ends = final(table, by=["activation", "p", "dropout"])
    if ends["p"].n_unique() < 2:
        raise Missing("only one width is done, expected at least two")
    return ends


def _helps(table: pl.DataFrame) -> Reading:
    ends = _ends(table)
    low = int(ends["p"].to_numpy().min())
    checks = []
    for share in sorted(set(ends["dropout"].to_list()) - {0.0}):
        gain = paired(ends.filter(pl.col("p") == low), "cosine", axis="dropout", low=0.0, high=share, by=["p"])
        checks.append(
            Check(
                label=f"p = {low}, dropout {share:g}: cosine gained is {gain.value:.3f}; in standard errors",
                measured=gain.significance,
                low=3.0,
            )
        )
    return Reading(checks=tuple(checks))


def _fails_wide(table: pl.DataFrame) -> Reading:
    ends = _ends(table)
    low, high = int(ends["p"].to_numpy().min()), int(ends["p"].to_numpy().max())
    shrink = sqrt(low / high)
    checks = []
    for share in sorted(set(ends["dropout"].to_list()) - {0.0}):
        own = ends.filter(pl.col("dropout") == share)
        narrow, wide = (mean(own.filter(pl.col("p") == p)["cosine"], of=f"cosine at p = {p}") for p in (low, high))
        noise = 3 * sqrt(wide.error**2 + (shrink * narrow.error) ** 2)
        checks.append(
            Check(
                label=f"dropout {share:g}: mean cosine at p = {high}, where {narrow.value:.3f} at p = {low}",
                measured=wide.value,
                high=narrow.value * shrink + noise,
            )
        )
    return Reading(checks=tuple(checks))


DROPOUT = Experiment(
    name="song2021.dropout",
    title="Dropout in place of a ridge",
    source="Song, Xu and Lafferty 2021, section 5",
    revision=1,
    grid={
        preset: grid(activation="relu", p=widths, dropout=(0.0, 0.5), strength=0.0, n=n, d=d, rate=rate, steps=steps)
        for preset, widths, n, d, rate, steps in (
            ("smoke", (50, 200), 10, 30, 1e-3, 100),
            ("quick", (100, 400, 1600), 50, 150, 5e-4, 1000),
            ("paper", tuple(100 * 2**k for k in range(8)), 50, 150, 5e-4, 2000),
        )
    },
    seeds={"smoke": 2, "quick": 4, "paper": 50},
    run=run_dropout,
    at_most=50,
    memory=memory_dropout,
    cost=lambda task: float(int(task.point["p"]) * int(task.point["steps"])),
    pictures=(
        Picture(
            name="dropout",
            caption="Final cosine of ReLU networks with and without dropout on the hidden neurons; mean ± standard "
            "deviation.",
            data=lambda table: summary(
                final(table, by=["activation", "p", "dropout"]), "cosine", by=["activation", "dropout", "p"]
            ),
            draw=dropout_by_width,
        ),
    ),
    claims=(
        Claim(
            name="dropout-helps",
            statement="Dropout as a form of regularization can also help the alignment.",
            place="Section 5; no figure",
            how="Final cosine with dropout ½ against none, paired by seed, at the narrowest network.",
            because="Above 0 by 3 standard errors.",
            read=_helps,
        ),
        Claim(
            name="dropout-fails-wide",
            statement="Dropout fails to keep the alignment away from zero for networks with large hidden layer width.",
            place="Section 5; no figure",
            how="Mean final cosine of the widest network against the narrowest.",
            because="It falls at least as 1/√p, the rate that section 4.1 bounds alignment by without regularization; "
            "3 standard errors on top.",
            read=_fails_wide,
        ),
    ),
)


def _paths(table: pl.DataFrame) -> pl.DataFrame:
    return summary(table, "cosine", by=["activation", "inputs", "strength", "p", "step"])


def _points(p: int, *, longer: int, shorter: int = 1, n: int = 50, d: int = 150) -> tuple[dict, ...]:
    """Figure 2's points at one width with both laws of the inputs, trained for longer."""
    found = figure2.points((p,), n=n, d=d, shorter=shorter, inputs=("standard", "scaled"))
    return tuple({**point, "steps": int(point["steps"]) * longer} for point in found)


OPEN = Experiment(
    name="song2021.open",
    title="What figure 2 depends on",
    source="Song, Xu and Lafferty 2021, section 5: the input law and the end of training are not stated there",
    revision=1,
    grid={
        "smoke": _points(60, longer=1, shorter=20, n=10, d=30),
        "quick": _points(200, longer=2),
        "paper": _points(800, longer=8),
    },
    seeds={"smoke": 2, "quick": 2, "paper": 20},
    run=figure2.run,
    together=("strength",),
    memory=figure2.memory,
    cost=figure2.cost,
    pictures=(
        Picture(
            name="readings",
            caption="Cosine along training for both laws of the inputs, mean ± standard deviation; the vertical line "
            "is where figure 2 is read. With constant λ > 0 the cosine keeps rising: there is no fixed point, and the "
            "end of training is a choice. With inputs N(0, I/d) the same rates learn d times slower.",
            data=_paths,
            draw=readings,
        ),
    ),
)
