"""Figure 2: alignment against width, and loss along training; and how it depends on what the paper leaves open."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import polars as pl
import torch

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Outcome, Picture, Point, Setting, grid
from falign.lab.experiment.statistics import Estimate, final, mean, paired, summary
from falign.papers.song2021._drawing import alignment_and_loss, readings
from falign.papers.song2021._shared import (
    RATES,
    STEPS,
    STRENGTHS,
    WIDTHS,
    Batch,
    shown_width,
    simulate_quietly,
    vanishing,
)
from falign.theory.two_layer import Dual, WidthFree, draw_reduced, spaced

__all__ = ["FIGURE2", "OPEN"]


def _points(
    widths: Sequence[int], *, n: int = 50, d: int = 150, shorter: int = 1, inputs: Sequence[str] = ("standard",)
) -> tuple[Point, ...]:
    """Every activation with its rate and its ridges, at several widths and laws of the inputs.

    Args:
        widths: p.
        n: Sample size.
        d: Input dimension.
        shorter: What the number of steps is divided by.
        inputs: Laws of the inputs.
    """
    return tuple(
        point
        for name, rate in RATES.items()
        for point in grid(
            activation=name,
            inputs=inputs,
            p=widths,
            strength=STRENGTHS[name],
            n=n,
            d=d,
            rate=rate,
            steps=STEPS[name] // shorter,
        )
    )


_KEPT = ("loss", "cosine", "beta_norm")
_NANOSECONDS = {"identity": 1.0, "relu": 0.05, "tanh": 0.065}
"""Of a step of a run, for n² numbers width-free and n² p in the dual form: measured at p from 200 to 12,800."""
_NANOSECONDS_DRAWN = 6.5
"""Nanoseconds for an entry of W."""


def _run(
    *,
    seeds: Sequence[int],
    setting: Setting,
    activation: str,
    inputs: str,
    p: int,
    strength: Sequence[float],
    n: int,
    d: int,
    rate: float,
    steps: int,
) -> list[Outcome]:
    """Train all networks of a block together: the linear ones width-free, the others in the dual form."""
    batch, linear = Batch(seeds, p, strength), activation == "identity"
    start = draw_reduced(
        batch.row_seeds,
        n=n,
        d=d,
        p=p,
        activation=activation,
        inputs=inputs,  # pyright: ignore[reportArgumentType]  # the grid holds the two names
        dtype=torch.float64 if linear else torch.float32,
        device=setting.device,
    )
    if linear:
        engine = WidthFree.from_start(start, rate=rate, penalties=batch.penalties)
    else:
        engine = Dual(start, activation=activation, rate=rate, penalties=batch.penalties)
    return batch.outcomes(simulate_quietly(engine, spaced(steps, 150), _KEPT, progress=setting.report))


def _memory(*, seeds: Sequence[int], activation: str, p: int, strength: Sequence[float], n: int, d: int) -> int:
    """Bytes of a block."""
    engine, dtype = ("width-free", torch.float64) if activation == "identity" else ("dual", torch.float32)
    return Batch(seeds, p, strength).bytes_needed(engine, n=n, d=d, dtype=dtype)


def _cost(*, activation: str, p: int, n: int, d: int, steps: int) -> float:
    """Nanoseconds of a core that a run costs: its steps, and the drawing of its weights."""
    width = 1 if activation == "identity" else p
    return _NANOSECONDS[activation] * n**2 * steps * width + _NANOSECONDS_DRAWN * p * d


_RUN = ["activation", "p", "strength"]


def _activations(table: pl.DataFrame) -> list[str]:
    return sorted(table["activation"].unique().to_list())


def _ends(table: pl.DataFrame, activation: str) -> pl.DataFrame:
    """The last record of each run of an activation."""
    return final(table.filter(pl.col("activation") == activation), by=_RUN)


def _vanishes(table: pl.DataFrame) -> Evidence:
    names = _activations(table)
    ends = {name: _ends(table, name).filter(pl.col("strength") == 0) for name in names}
    return Evidence(checks=tuple(vanishing(ends[name], name, len(names)) for name in names))


def _growth(ends: pl.DataFrame, p: int, low: float, high: float) -> Estimate:
    return paired(ends.filter(pl.col("p") == p), "cosine", axis="strength", low=low, high=high, by=["p"])


def _grows(table: pl.DataFrame) -> Evidence:
    checks, names = [], _activations(table)
    for name in names:
        ends = _ends(table, name)
        strengths, widths = (sorted(ends[axis].unique().to_list()) for axis in ("strength", "p"))
        steps = {(p, *pair): _growth(ends, p, *pair) for p in widths for pair in pairwise(strengths)}
        count = len(steps) * len(names)
        p, low, high = min(steps, key=lambda key: steps[key].value + steps[key].half(count))
        least = steps[p, low, high]  # the one nearest to a fall beyond chance: it stands for all
        whole = _growth(ends, widths[-1], strengths[0], strengths[-1])
        checks += [
            Check(
                label=f"{name}: least growth between neighbouring λ of {len(steps)} (p = {p}, λ = {low:g} to {high:g})",
                measured=least.value,
                low=-least.half(count),
            ),
            Check(
                label=f"{name}: growth from λ = {strengths[0]:g} to {strengths[-1]:g} at p = {widths[-1]}",
                measured=whole.value,
                low=whole.above(len(names)),
            ),
        ]
    return Evidence(checks=tuple(checks))


def _shown(table: pl.DataFrame, activation: str) -> pl.DataFrame:
    """Records of an activation at the width whose trajectories are shown."""
    return table.filter((pl.col("activation") == activation) & (pl.col("p") == shown_width(table)))


def _slower(table: pl.DataFrame, share: int) -> Evidence:
    collected: list[tuple[str, bool, Estimate]] = []
    for name in _activations(table):
        records = _shown(table, name)
        plain = records.filter(pl.col("strength") == 0).group_by("step").agg(pl.col("loss").mean()).sort("step")
        below = plain.filter(pl.col("loss") <= plain["loss"][0] / share)
        if below.is_empty():
            raise Missing(f"{name}: without a ridge the loss does not fall to 1/{share} within the run")
        step = below["step"][0]
        # The same step for all ridges: losses at the end would compare plateaus, not speeds.
        then = records.filter(pl.col("step") == step).with_columns(logarithm=pl.col("loss").log())
        strengths = sorted(then["strength"].unique().to_list())
        collected += [
            (
                f"{name}: log(loss at λ = {high:g} / loss at 0) at step {step}",
                high == strengths[-1],
                paired(then, "logarithm", axis="strength", low=0.0, high=high, by=["p"]),
            )
            for high in strengths[1:]
        ]
    leading = sum(largest for _, largest, _ in collected)
    return Evidence(
        checks=tuple(
            Check(
                label=label,
                measured=ratio.value,
                low=ratio.above(leading) if largest else -ratio.half(len(collected) - leading),
            )
            for label, largest, ratio in collected
        )
    )


def _plateau(table: pl.DataFrame) -> Evidence:
    checks = []
    for name in _activations(table):
        ends = final(_shown(table, name), by=_RUN)
        for strength in sorted(set(ends["strength"].to_list()) - {0.0}):
            losses = ends.filter(pl.col("strength") == strength)["loss"]
            measured = mean(losses, of=f"loss of {name} at λ = {strength:g}").value / strength
            checks.append(
                Check(label=f"{name}, λ = {strength:g}: final loss / λ", measured=measured, low=0.1, high=10.0)
            )
    return Evidence(checks=tuple(checks))


_VANISHES = Claim(
    name="alignment-vanishes",
    statement="For all three types of networks, as p increases, alignment vanishes if there is no regularization.",
    reference="Section 5, figure 2a-c; cos∠(b, β) = O(n/√p), section 4.1",
    quotation="For all three types of networks, as p increases, alignment vanishes if there is no regularization",
    headline="cosine of widest networks without a ridge",
    method="Mean final cosine at λ = 0, at the widest network against the narrowest.",
    tolerance_reason="O(n/√p) is read as: between two widths the cosine shrinks at least by √(p_narrow/p_wide). On top "
    "half the 99 % interval of the difference, runs of one seed paired; below 0 no more than half that of the mean.",
    read=_vanishes,
)

_GROWS = Claim(
    name="alignment-grows",
    statement="Alignment grows with the level of regularization λ for the same network.",
    reference="Section 5, figure 2a-c",
    quotation="alignment … grows with the level of regularization λ for the same network",
    method="Mean differences of final cosines between values of λ, paired by seed, at every width.",
    tolerance_reason="From no ridge to the largest it must rise with 99 % confidence (Student's t over the seeds), and "
    "between no neighbours may it fall with 99 % confidence, over all neighbours and widths together (Bonferroni).",
    read=_grows,
)

_SLOWER = Claim(
    name="loss-slower",
    statement="The training loss converges slower with larger regularization.",
    reference="Section 5, figure 2d-f",
    quotation="the training loss converges slower with larger regularization",
    method="Logarithm of the loss against λ = 0, paired by seed, at the step where the mean loss at λ = 0 first is a "
    "hundredth of what it was at the start.",
    tolerance_reason="The largest λ must be behind with 99 % confidence (Student's t over the seeds, the activations "
    "together); the smaller ones may not be ahead with 99 % confidence, all together.",
    read=partial(_slower, share=100),
)

_EARLY = Claim(
    name="loss-slower-early",
    statement="The training loss converges slower with larger regularization from the beginning.",
    origin="beyond",
    reference="Not stated: whether the loss falls slower from the beginning, or only once it nears its plateau",
    method="As for loss-slower, where the mean loss at λ = 0 first is a tenth of what it was at the start.",
    tolerance_reason="As for loss-slower. A ridge also shrinks the random output that the network starts with, which "
    "lowers the loss.",
    read=partial(_slower, share=10),
)

_PLATEAU = Claim(
    name="loss-of-order-lambda",
    statement="Due to the regularization, the loss converges to a positive number that is of the same order as λ.",
    reference="Section 5",
    quotation="Due to the regularization, the loss converges to a positive number that is of the same order as λ.",
    method="Mean loss at the end of the run, divided by λ.",
    tolerance_reason="Of the same order is read as within a factor of 10.",
    read=_plateau,
)


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    """Both rows of the figure: final cosines by width, and losses by step at one width."""
    ends = summary(final(table, by=_RUN), "cosine", by=["activation", "strength", "p"])
    paths = summary(table.filter(pl.col("p") == shown_width(table)), "loss", by=["activation", "strength", "p", "step"])
    return pl.concat(
        [ends.with_columns(shown=pl.lit("cosine")), paths.with_columns(shown=pl.lit("loss"))], how="diagonal"
    )


FIGURE2 = Experiment(
    name="song2021.figure2",
    title="Alignment against width, and loss along training",
    source="Song, Xu and Lafferty 2021, section 5, figure 2",
    revision=1,
    grid={
        "smoke": _points((40, 80, 160), n=10, d=30, shorter=20),
        "quick": _points((200, 800, 3200)),
        "paper": _points(WIDTHS),
    },
    seeds={"smoke": 2, "quick": 5, "paper": 50},
    run=_run,
    agreement=1e-4,
    together=("strength",),
    memory=_memory,
    cost=_cost,
    pictures=(
        Picture(
            name="figure-2",
            caption="Figure 2 of the paper. Above: cosine of the angle between β and b at the end of training, against "
            "the width p; mean ± standard deviation over the runs. Below: training loss along training, "
            "with the same band. One line a ridge λ.",
            data=_picture_data,
            draw=alignment_and_loss,
        ),
    ),
    claims=(_VANISHES, _GROWS, _SLOWER, _EARLY, _PLATEAU),
)


def _longer(p: int, *, longer: int, shorter: int = 1, n: int = 50, d: int = 150) -> tuple[Point, ...]:
    """Figure 2's points at one width with both laws of the inputs, trained for longer."""
    points = _points((p,), n=n, d=d, shorter=shorter, inputs=("standard", "scaled"))
    return tuple({**point, "steps": int(point["steps"]) * longer} for point in points)


OPEN = Experiment(
    name="song2021.open",
    title="What figure 2 depends on",
    source="Song, Xu and Lafferty 2021, section 5: the input law and the end of training are not stated there",
    revision=1,
    grid={
        "smoke": _longer(60, longer=1, shorter=20, n=10, d=30),
        "quick": _longer(200, longer=2),
        "paper": _longer(800, longer=8),
    },
    seeds={"smoke": 2, "quick": 2, "paper": 20},
    run=_run,
    agreement=1e-4,
    together=("strength",),
    memory=_memory,
    cost=_cost,
    pictures=(
        Picture(
            name="readings",
            caption="Cosine along training for both laws of the inputs, mean ± standard deviation; the vertical line "
            "is where figure 2 is read. With constant λ > 0 the cosine keeps rising: there is no fixed point, and the "
            "end of training is a choice. With inputs N(0, I/d) the same rates learn d times slower.",
            data=lambda table: summary(table, "cosine", by=["activation", "inputs", "strength", "p", "step"]),
            draw=readings,
        ),
    ),
)
