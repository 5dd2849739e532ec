"""Figure 2: alignment against width, and the loss along training, for three activations and several ridges."""

from collections.abc import Sequence

import polars as pl
import torch

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task, grid
from falign.lab.experiment.statistics import final, summary
from falign.papers.song2021 import figure2_claims as claims
from falign.papers.song2021.blocks import batch, engine_bytes, outcomes, trained
from falign.papers.song2021.drawing import alignment_and_loss
from falign.papers.song2021.sizes import RATES, STEPS, STRENGTHS, WIDTHS, shown_width
from falign.theory.two_layer import Dual, WidthFree, draw_reduced, spaced

_KEPT = ("loss", "cosine", "beta_norm")
_NANOSECONDS = {"identity": 1.0, "relu": 0.05, "tanh": 0.065}
"""Of a step of a run, for n² numbers width-free and n² p in the dual form: measured at p from 200 to 12,800."""
_DRAWN = 6.5
"""Nanoseconds for an entry of W."""


def points(
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


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train all networks of a block together: the linear ones width-free, the others in the dual form."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    activation, rate = str(point["activation"]), float(point["rate"])
    linear = activation == "identity"
    start = draw_reduced(
        [seed for seed, _ in rows],
        n=int(point["n"]),
        d=int(point["d"]),
        p=int(point["p"]),
        activation=activation,
        inputs=str(point["inputs"]),  # pyright: ignore[reportArgumentType]  # the grid holds the two names
        dtype=torch.float64 if linear else torch.float32,
        device=setting.device,
    )
    if linear:
        engine = WidthFree.from_start(start, rate=rate, penalties=penalties)
    else:
        engine = Dual(start, activation=activation, rate=rate, penalties=penalties)
    return outcomes(tasks, trained(engine, spaced(int(point["steps"]), 150), _KEPT, progress=setting.report))


def memory(tasks: Sequence[Task]) -> int:
    """Bytes of a block."""
    if tasks[0].point["activation"] == "identity":
        return engine_bytes(tasks, "width-free", torch.float64)
    return engine_bytes(tasks, "dual", torch.float32)


def cost(task: Task) -> float:
    """What a run costs, in nanoseconds of a core: its steps, and the drawing of its weights."""
    point = task.point
    p, steps = int(point["p"]), int(point["n"]) ** 2 * int(point["steps"])
    trained = _NANOSECONDS[str(point["activation"])] * steps * (1 if point["activation"] == "identity" else p)
    return trained + _DRAWN * p * int(point["d"])


def _data(table: pl.DataFrame) -> pl.DataFrame:
    """Both rows of the figure: final cosines by width, and losses by step at one width."""
    ends = summary(final(table, by=["activation", "p", "strength"]), "cosine", by=["activation", "strength", "p"])
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
        "smoke": points((40, 80, 160), n=10, d=30, shorter=20),
        "quick": points((200, 800, 3200)),
        "paper": points(WIDTHS),
    },
    seeds={"smoke": 2, "quick": 5, "paper": 50},
    run=run,
    agreement=1e-4,
    together=("strength",),
    memory=memory,
    cost=cost,
    pictures=(
        Picture(
            name="figure-2",
            caption="Figure 2 of the paper. Above: cosine of the angle between β and b at the end of training, against "
            "the width p; mean ± standard deviation over the runs. Below: training loss along training, "
            "with the same band. One line a ridge λ.",
            data=_data,
            draw=alignment_and_loss,
        ),
    ),
    claims=(claims.VANISHES, claims.GROWS, claims.SLOWER, claims.EARLY, claims.PLATEAU),
)
