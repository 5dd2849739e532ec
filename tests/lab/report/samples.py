"""A small paper for the report: feedback alignment in two-layer networks, really simulated, and read off."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from falign.lab.experiment import (
    Check,
    Claim,
    Evidence,
    Experiment,
    Interpretation,
    Missing,
    Outcome,
    Paper,
    Picture,
    Point,
    Setting,
    Task,
    grid,
)
from falign.lab.experiment._results import PaperResults, Results
from falign.lab.report import style

PROVENANCE = {
    "falign": "0.1.0",
    "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
    "git": {"commit": "5a5171f", "changed": True},
    "device": "cpu: x86_64",
    "threads": 2,
}
ACTIVATIONS = {"identity": np.asarray, "relu": lambda u: np.maximum(u, 0), "tanh": np.tanh}
SLOPES = {"identity": np.ones_like, "relu": lambda u: (u > 0).astype(float), "tanh": lambda u: 1 - np.tanh(u) ** 2}
WIDTHS, RIDGES, EVERY = (50, 100, 200, 400), (0.0, 0.3, 1.0, 3.0), 10


def simulate(tasks: list[Task]) -> list[Outcome]:
    """Full-batch feedback alignment, one run after the other: loss and cosine on the way."""
    return [_simulate(task.point, task.seed) for task in tasks]


def _simulate(point: Point, seed: int) -> Outcome:
    width, ridge, name = int(point["p"]), float(point["ridge"]), str(point["activation"])
    draw, count = np.random.default_rng(seed), 10
    rate = 0.1 if name == "tanh" else 0.05
    inputs = draw.standard_normal((count, 30)) / math.sqrt(30)
    hidden, output, feedback = draw.standard_normal((width, 30)), *draw.standard_normal((2, width))
    kernel, states = inputs @ inputs.T, hidden @ inputs.T
    target = draw.standard_normal(width) @ ACTIVATIONS[name](draw.standard_normal((width, 30)) @ inputs.T)
    target /= math.sqrt(width)
    steps, losses, cosines = [], [], []
    for step in range(401):
        values = ACTIVATIONS[name](states)
        error = target - output @ values / math.sqrt(width)
        if step % EVERY == 0:
            steps.append(step)
            losses.append(float(error @ error / 2))
            cosines.append(float(feedback @ output / np.linalg.norm(feedback) / np.linalg.norm(output)))
        states = states + rate / math.sqrt(width) * (feedback[:, None] * SLOPES[name](states) * error) @ kernel
        output = (1 - rate * ridge) * output + rate / math.sqrt(width) * values @ error
    return Outcome(records={"step": steps, "loss": losses, "cosine": cosines})


def unused(tasks: object, setting: Setting) -> list[Outcome]:
    """The tests give results, not runs."""
    raise AssertionError


@cache
def alignment(seeds: int) -> Results:
    """Figure 2 in small; three more runs diverged, one failed, two are missing."""
    experiment = Experiment(
        name="sample.figure2",
        title="Alignment against width, and the loss on the way",
        source="Song, Xu and Lafferty 2021, Figure 2",
        revision=1,
        grid={"quick": grid(activation=list(ACTIVATIONS), ridge=RIDGES, p=WIDTHS)},
        seeds={"quick": seeds},
        run=unused,
        pictures=(
            Picture(
                name="alignment",
                caption="Final cosine of the feedback weights b and the output weights β against the width p (above), "
                "and the training loss of networks of the largest width (below): mean ± one standard deviation. "
                "Without ridge (λ = 0) the alignment falls with the width; with it, it stays.",
                data=six_data,
                draw=six_panels,
            ),
            Picture(
                name="law",
                caption="Without ridge the cosine of linear networks follows n/p.",
                data=lambda table: final(table).filter(activation="identity", ridge=0.0).sort("p"),
                draw=against_the_law,
            ),
        ),
        claims=tuple(replace(each, scope=pl.col("ridge") <= max(RIDGES)) for each in CLAIMS),  # beyond, runs diverged
    )
    tasks = experiment.tasks("quick")
    outcomes = simulate(list(tasks))
    table = pl.concat(
        pl.DataFrame(
            {
                **{name: [value] * len(outcome.records["step"]) for name, value in task.point.items()},
                "seed": [task.seed] * len(outcome.records["step"]),
                **outcome.records,
            }
        )
        for task, outcome in zip(tasks, outcomes, strict=True)
    )
    rows = [row_of_a_run(task) for task in tasks]
    odd = (
        [("diverged", "loss is not finite at step 61")] * 3
        + [("failed", "MemoryError: <1 GiB & less>")]
        + [("missing", None)] * 2
    )
    rows += [
        row_of_a_run(Task("sample.figure2", 1, {"activation": "relu", "ridge": 30.0, "p": 400}, seed), status, message)
        for seed, (status, message) in enumerate(odd)
    ]
    return Results(
        experiment=experiment,
        preset="quick",
        table=table,
        runs=pl.DataFrame(rows, infer_schema_length=None),
        provenance=(PROVENANCE,),
    )


def row_of_a_run(task: Task, status: str = "done", message: str | None = None) -> dict:
    seconds = None if status == "missing" else 0.25
    return {"key": task.key, **task.point, "seed": task.seed, "status": status, "message": message, "seconds": seconds}


def final(table: pl.DataFrame) -> pl.DataFrame:
    last = table.filter(pl.col("step") == 400).group_by("activation", "ridge", "p")
    return last.agg(mean=pl.col("cosine").mean(), sd=pl.col("cosine").std()).sort("activation", "ridge", "p")


def six_data(table: pl.DataFrame) -> pl.DataFrame:
    widest = table.filter(pl.col("p") == max(WIDTHS)).group_by("activation", "ridge", "step")
    losses = widest.agg(mean=pl.col("loss").mean(), sd=pl.col("loss").log().std())
    above = final(table).with_columns(panel=pl.lit("cosine"), x=pl.col("p").cast(pl.Float64)).drop("p")
    below = losses.with_columns(panel=pl.lit("loss"), x=pl.col("step").cast(pl.Float64)).drop("step")
    return pl.concat([above, below.select(above.columns)]).sort("panel", "activation", "ridge", "x")


def six_panels(data: pl.DataFrame) -> Figure:
    names = list(ACTIVATIONS)
    figure, panels = style.panels(
        3,
        2,
        titles=["a  identity", "b  ReLU", "c  tanh", "d", "e", "f"],
        xlabels=["width p", "step"],
        ylabels=["cos ∠(b, β)", "training loss"],
        share="row",
    )
    ridges = sorted(set(data["ridge"]))
    for index, panel in enumerate(panels):
        kind = "cosine" if index < 3 else "loss"
        for ridge, colour, marker in zip(ridges, style.sequence(len(ridges)), style.MARKERS, strict=False):
            line = data.filter(panel=kind, activation=names[index % 3], ridge=ridge)
            x, mean, sd = (line[column].to_numpy() for column in ("x", "mean", "sd"))
            low, high = (mean - sd, mean + sd) if kind == "cosine" else (mean * np.exp(-sd), mean * np.exp(sd))
            style.band(
                panel, x, mean, low, high, label=f"λ = {ridge:g}", colour=colour, marker=marker if index < 3 else None
            )
        if kind == "cosine":
            style.logarithmic(panel, "x", ticks=WIDTHS)
        else:
            style.logarithmic(panel, "y")
    style.legend(figure)
    return figure


def against_the_law(data: pl.DataFrame) -> Figure:
    figure, (panel,) = style.panels(1, width=5.5, height=3.4, xlabels=["width p"], ylabels=["cos ∠(b, β)"])
    p, mean, sd = (data[column].to_numpy() for column in ("p", "mean", "sd"))
    panel.errorbar(p, mean, sd, color=style.COLOURS[0], marker="o", linestyle="none", capsize=3, label="simulated")
    style.law(panel, p, 10 / p, "n/p")
    style.logarithmic(panel, "both", ticks=None)
    panel.legend()
    return figure


def cosine_of(table: pl.DataFrame, activation: str, ridge: float, p: int) -> np.ndarray:
    found = table.filter((pl.col("step") == 400) & (pl.col("p") == p)).filter(activation=activation, ridge=ridge)
    if found.is_empty():
        raise Missing(f"no run of {activation} with λ = {ridge:g} at p = {p}")
    return found["cosine"].to_numpy()


def mean_follows_the_law(table: pl.DataFrame) -> Evidence:
    checks = []
    for p in WIDTHS:
        values = cosine_of(table, "identity", 0.0, p)
        error = 3 * float(values.std(ddof=1)) / math.sqrt(len(values))
        checks.append(Check(label=f"p = {p}", measured=float(values.mean()), low=10 / p - error, high=10 / p + error))
    return Evidence(checks=tuple(checks), note=f"{len(values)} runs a width.")


def grows_with_ridge(activation: str) -> object:
    def read(table: pl.DataFrame) -> Evidence:
        means = [cosine_of(table, activation, ridge, 400).mean() for ridge in RIDGES]
        pairs = zip(RIDGES, RIDGES[1:], np.diff(means), strict=False)
        return Evidence(
            checks=tuple(Check(label=f"λ = {a:g} → {b:g}", measured=float(rise), low=0.0) for a, b, rise in pairs)
        )

    return read


def claim(name: str, statement: str, read: object, reference: str = "Figure 2", **words: str) -> Claim:
    method = words.get("method", "Mean of the final cosine over the runs of a point.")
    reason = words.get("tolerance_reason", "Three standard errors of the mean on both sides.")
    return Claim(
        name=name,
        statement=statement,
        reference=reference,
        method=method,
        tolerance_reason=reason,
        read=read,  # pyright: ignore
        quotation=words.get("quotation", ""),
        headline=words.get("headline", ""),
    )


def exact_zero(table: pl.DataFrame) -> Evidence:
    values = cosine_of(table, "tanh", 0.0, 400)
    return Evidence(checks=(Check(label="|mean cosine|", measured=abs(float(values.mean())), high=1e-5),))


CLAIMS = (
    claim(
        "n-over-p",
        "Without regularisation the alignment of linear networks falls as n/p.",
        mean_follows_the_law,
        "Section 3 (consequence of Theorem 3.2); the sharper law is derived in the docs",
        quotation="alignment between β(t) and b is not guaranteed for over-parameterized networks",
        headline="cosine of narrow networks",
    ),
    *(
        claim(
            f"ridge-{name}",
            f"Regularisation raises the alignment of {name} networks: at fixed width it grows with λ.",
            grows_with_ridge(name),
            tolerance_reason="A rise is a positive difference; no size is stated.",
        )
        for name in ACTIVATIONS
    ),
    claim(
        "none-at-all",
        "Wide networks with tanh do not align at all.",
        exact_zero,
        "This sample's own, made to fail",
        tolerance_reason="Not at all, taken at its word: below any rounding error that matters.",
    ),
    claim(
        "very-wide",
        "At p = 12800 the alignment of ReLU networks with λ = 3 is the same as at p = 200.",
        lambda table: Evidence(
            checks=(Check(label="p = 12800", measured=float(cosine_of(table, "relu", 3.0, 12800).mean()), low=0.5),)
        ),
    ),
    claim(
        "hard-characters",
        'If a < b & c > d then "it\'s" kept: </script><b>not bold</b> {{ nor }} this.',
        lambda _: Evidence(checks=(Check(label="<i>x</i> & y", measured=1.0, low=0.5, high=1.5),), note="<u>&amp;</u>"),
    ),
)


def empty() -> Results:
    """An experiment of which nothing is done."""
    experiment = Experiment(
        name="sample.figure3",
        title="Alignment and accuracy on digits",
        source="Song, Xu and Lafferty 2021, Figure 3",
        revision=1,
        grid={"quick": grid(ridge=(0.0, 0.1))},
        seeds={"quick": 2},
        run=unused,
        pictures=(
            Picture(
                name="digits", caption="Alignment against the epoch.", data=lambda table: table, draw=against_the_law
            ),
        ),
        claims=(
            claim("accuracy", "Regularisation slightly improves the test accuracy.", exact_zero, "Figure 3, right"),
        ),
    )
    rows = [row_of_a_run(task, "missing") for task in experiment.tasks("quick")]
    runs = pl.DataFrame(rows, schema_overrides={"message": pl.String, "seconds": pl.Float64})
    return Results(experiment=experiment, preset="quick", table=pl.DataFrame(), runs=runs, provenance=())


def paper_results(seeds: int = 3) -> PaperResults:
    """The whole paper."""
    results = (alignment(seeds), empty())
    paper = Paper(
        name="sample",
        title="Convergence and Alignment of Gradient Descent with Random Backpropagation Weights",
        authors="G. Song, R. Xu, J. Lafferty",
        venue="NeurIPS 2021",
        address="https://arxiv.org/abs/2106.06044",
        experiments=tuple(each.experiment for each in results),
        interpretations=(
            Interpretation(
                "Which inputs are drawn? The paper does not say.",
                "x ~ N(0, I/d), as in Propositions 3.3 and 4.5. With N(0, I) the loss falls d times as fast.",
            ),
            Interpretation(
                "Does the ridge shrink β by (1 − λ) or by (1 − ηλ) a step?",
                "By (1 − ηλ), the plain gradient step on λ|β|²/2; the other reading contradicts S_λ ∝ 1/η.",
            ),
        ),
    )
    return PaperResults(paper=paper, results=results)
