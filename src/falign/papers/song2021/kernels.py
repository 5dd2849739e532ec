"""Section 3's account of convergence: G stays at Ḡ, H stays near 0, and the error is what infinite width predicts."""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Experiment, Outcome, Picture, Point, Setting, Task, grid
from falign.lab.experiment.statistics import summary
from falign.papers.song2021.blocks import batch, engine_bytes, outcomes
from falign.papers.song2021.drawing_kernels import kernels_by_width
from falign.papers.song2021.kernels_claims import CLAIMS, worst
from falign.theory.two_layer import Dual, Trajectory, activation, draw_reduced, spaced
from falign.theory.two_layer.infinite_width import predicted_error
from falign.theory.two_layer.kernels import kernels_of_engine, limiting_kernel

_RECORDS = 20
_RATE = 0.1
_RIDGE = 0.1


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train all seeds and ridges of a block, and record kernels and errors on the way."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    name, rate, steps = str(point["activation"]), float(point["rate"]), int(point["steps"])
    start = draw_reduced(
        [seed for seed, _ in rows],
        n=int(point["n"]),
        d=int(point["d"]),
        p=int(point["p"]),
        activation=name,
        inputs="scaled",
        device=setting.device,
    )
    engine = Dual(start, activation=name, rate=rate, penalties=penalties)
    limit = limiting_kernel(start.X, activation(name)).unsqueeze(1)
    predicted = predicted_error(
        limit,
        engine.error(),
        start.y.unsqueeze(1),
        rate=rate,
        strengths=torch.stack([penalty.values(steps) for penalty in penalties]).to(limit),
    )
    at = spaced(steps, min(_RECORDS, steps + 1))
    columns = _followed(engine, at, predicted, torch.linalg.eigvalsh(limit)[..., 0], setting)
    whole = torch.full((len(rows), len(penalties)), -1)  # a number that is not finite is refused with its record
    return outcomes(tasks, Trajectory(steps=torch.tensor(at), values=columns, diverged=whole))


def _followed(
    engine: Dual,
    at: Sequence[int],
    predicted: Float[Tensor, "runs ridges steps n"],
    gamma: Float[Tensor, "runs 1"],
    setting: Setting,
) -> dict[str, Float[Tensor, "runs ridges times"]]:
    """What is recorded at each of those steps; the kernels in units of γ = λ_min(Ḡ)."""
    y = engine.start.y.norm(dim=-1, keepdim=True)
    columns: dict[str, list[Tensor]] = {}
    first = kernels_of_engine(engine)
    last, e = engine.t, engine.error().norm(dim=-1)
    for step in at:
        engine.advance(step - engine.t)
        now = kernels_of_engine(engine)
        before, error = e, engine.error()
        e = error.norm(dim=-1)
        measured = {
            **now.extremes(),
            "gamma": gamma.expand_as(e),
            "H_norm": _norm(now.H) / gamma,
            "G_change": _norm(now.G - first.G) / gamma,
            "H_change": _norm(now.H - first.H) / gamma,
            "error": e,
            "contraction": (e / before) ** (1 / max(1, step - last)),
            "discrepancy": (error - predicted[:, :, step]).norm(dim=-1) / y,
        }
        last = step
        for name, value in measured.items():
            columns.setdefault(name, []).append(value)
        setting.report(step / at[-1] if at[-1] else 1.0)
    return {name: torch.stack(values, -1).cpu() for name, values in columns.items()}


def _norm(kernel: Float[Tensor, "*runs n n"]) -> Float[Tensor, "*runs"]:
    """The spectral norm of a symmetric matrix."""
    return torch.linalg.eigvalsh(kernel).abs().amax(-1)


def memory(tasks: Sequence[Task]) -> int:
    """Bytes of a block: the engine's, and the arrays [n p] of all runs that its kernels are made of."""
    rows, penalties = batch(tasks)
    point = tasks[0].point
    n, p, runs = int(point["n"]), int(point["p"]), len(rows) * len(penalties)
    engine = engine_bytes(tasks, "dual", torch.float64)
    return engine + 8 * runs * n * (6 * p + int(point["steps"]) + 8 * n) + (128 << 20)


def _drawn(table: pl.DataFrame) -> pl.DataFrame:
    """Means and standard deviations over the seeds, of what is shown against the width and along training."""
    plain = table.filter(pl.col("strength") == 0)
    start = plain.filter(pl.col("step") == 0)
    along = table.filter(pl.col("activation") == "tanh")
    parts = (
        (start, "H_norm", ["activation", "p"]),
        (worst(plain, "G_change"), "G_change", ["activation", "p"]),
        (along, "discrepancy", ["strength", "p", "step"]),
    )
    found = [summary(runs, column, by=by).with_columns(shown=pl.lit(column)) for runs, column, by in parts]
    return pl.concat(found, how="diagonal_relaxed")


def _points(widths: Sequence[int], *, n: int, d: int, steps: int) -> tuple[Point, ...]:
    return grid(activation=("tanh", "relu"), strength=(0.0, _RIDGE), p=widths, n=n, d=d, rate=_RATE, steps=steps)


KERNELS = Experiment(
    name="song2021.kernels",
    title="Kernels along training",
    source="Song, Xu and Lafferty 2021, section 3",
    revision=1,
    grid={
        "smoke": _points((50, 3200), n=4, d=8, steps=20),
        "quick": _points((100, 400, 1600, 6400), n=10, d=20, steps=200),
        # below p = 16n a relative discrepancy of 0.2 is no longer small: its exponent there is above -½
        "paper": _points((800, 1600, 3200, 6400, 12800), n=50, d=150, steps=500),
    },
    seeds={"smoke": 8, "quick": 8, "paper": 50},
    run=run,
    agreement=1e-10,
    together=("strength",),
    at_most=20,
    memory=memory,
    cost=lambda task: float(int(task.point["p"]) * int(task.point["n"]) * int(task.point["steps"])),
    pictures=(
        Picture(
            name="kernels",
            caption="Left: the feedback's kernel H at the start and the largest change of G in a run without a ridge, "
            "spectral norms relative to λ_min(Ḡ), mean ± standard deviation. Right: how far the error of tanh networks "
            "is from e∞(t), what infinite width makes of the same e(0); dotted with a ridge.",
            data=_drawn,
            draw=kernels_by_width,
        ),
    ),
    claims=CLAIMS,
)
