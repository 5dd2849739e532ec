"""The remark of section 5 on dropout: it helps narrow networks to align, and wide ones not."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Claim, Evidence, Experiment, Outcome, Picture, Setting, grid
from falign.lab.experiment.statistics import above_zero, final, paired, summary
from falign.papers.song2021._drawing import dropout_by_width
from falign.papers.song2021._shared import Batch, simulate_quietly, vanishing
from falign.theory.two_layer import WeightSpace, draw, spaced

__all__ = ["DROPOUT"]

_SHARE = 0.5
"""Of the hidden neurons, dropped; the paper names none."""
_RATE = 5e-4
"""η: half of figure 2's for ReLU, as dropout doubles the second moments that bound a stable step."""


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    activation: str,
    p: int,
    dropout: float,
    strength: float,
    n: int,
    d: int,
    rate: float,
    steps: int,
) -> list[Outcome]:
    """Train with dropout on the hidden neurons, every weight in memory."""
    batch = Batch(seeds, p, strength)
    start = draw(batch.row_seeds, n=n, d=d, p=p, activation=activation, dtype=torch.float32, device=setting.device)
    engine = WeightSpace(start, activation=activation, rate=rate, penalties=batch.penalties, dropout=dropout)
    return batch.outcomes(simulate_quietly(engine, spaced(steps, 40), ("loss", "cosine"), progress=setting.report))


def _memory(*, seeds: Sequence[int], p: int, strength: float, n: int, d: int) -> int:
    """Bytes of a block: the engine, and three arrays of hidden activities for the masks."""
    batch = Batch(seeds, p, strength)
    masks = 3 * len(batch.rows) * len(batch.penalties) * p * n
    return 4 * masks + batch.bytes_needed("weight-space", n=n, d=d, dtype=torch.float32)


def _helps(table: pl.DataFrame) -> Evidence:
    ends = final(table, by=["activation", "p", "dropout"])
    low = min(ends["p"].to_list())
    gain = paired(ends.filter(pl.col("p") == low), "cosine", axis="dropout", low=0.0, high=_SHARE, by=["p"])
    return above_zero([(f"p = {low}: cosine gained by dropout {_SHARE:g}", gain)])


def _fails_wide(table: pl.DataFrame) -> Evidence:
    ends = final(table.filter(pl.col("dropout") == _SHARE), by=["activation", "p"])
    return Evidence(checks=(vanishing(ends, f"dropout {_SHARE:g}", 1),))


DROPOUT = Experiment(
    name="song2021.dropout",
    title="Dropout in place of a ridge",
    source="Song, Xu and Lafferty 2021, section 5",
    revision=1,
    grid={
        preset: grid(
            activation="relu", p=widths, dropout=(0.0, _SHARE), strength=0.0, n=n, d=d, rate=_RATE, steps=steps
        )
        for preset, widths, n, d, steps in (
            ("smoke", (50, 200), 10, 30, 100),
            ("quick", (100, 400, 1600), 50, 150, 1000),
            ("paper", tuple(100 * 2**k for k in range(8)), 50, 150, 2000),
        )
    },
    seeds={"smoke": 2, "quick": 4, "paper": 50},
    run=_run,
    agreement=1e-4,
    at_most=50,
    memory=_memory,
    cost=lambda *, p, steps: float(p * steps),
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
            reference="Section 5; no figure",
            quotation="using dropout as a form of regularization can also help the alignment between forward and "
            "backward weights",
            method="Final cosine with dropout ½ against none, paired by seed, at the narrowest network.",
            tolerance_reason="Above 0 with 99 % confidence (Student's t over the seeds).",
            read=_helps,
        ),
        Claim(
            name="dropout-fails-wide",
            statement="Dropout fails to keep the alignment away from zero for networks with large hidden layer width.",
            reference="Section 5; no figure",
            quotation="dropout regularization fails to keep the alignment away from zero for networks with large "
            "hidden layer width",
            method="Mean final cosine of the widest network against the narrowest.",
            tolerance_reason="It falls at least as 1/√p, the rate by which section 4.1 bounds alignment without "
            "regularization; half the 99 % interval of the difference on top (Student's t, paired by seed).",
            read=_fails_wide,
        ),
    ),
)
