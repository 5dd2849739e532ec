"""Song, Xu and Lafferty 2021 at its smallest size: everything runs, is drawn, and is judged as it should be."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from falign.lab.experiment import Experiment, Setting
from falign.lab.experiment._axes import call_memory, call_run
from falign.lab.experiment._results import Results, judge
from falign.papers import PAPERS
from falign.papers.song2021.figure2 import FIGURE2
from falign.papers.song2021.figure2 import _run as run_figure2
from falign.papers.song2021.figure3 import FIGURE3
from falign.papers.song2021.widths import WIDTHS

pytestmark = pytest.mark.xdist_group("song2021")  # all tests of one process share its runs

PAPER = PAPERS["song2021"]
CLAIMS = [(experiment, claim) for experiment in PAPER.experiments for claim in experiment.claims]


@pytest.fixture(scope="module")
def results(smoke: Callable[[str], Mapping[str, Results]]) -> Mapping[str, Results]:
    return smoke("song2021")


def test_claims_that_hold_already_at_the_smallest_size(results: Mapping[str, Results]) -> None:
    verdicts = {claim.name: judge(claim, results[experiment.name]).verdict for experiment, claim in CLAIMS}
    sure = (
        "n-over-p",
        "time-sqrt-p",
        "feedback-kernel-vanishes",
        "kernels-stay",
        "infinite-width",
        "empirical-rate",
        "theorem-3-2",
        "theorem-4-2",
        "theorem-4-3",
        "theorem-4-6-constant",
        "other-schedules-align",
        "proposition-3-3",
    )
    assert {name: verdicts[name] for name in sure} == dict.fromkeys(sure, "holds")


@pytest.mark.parametrize(
    ("claim", "column", "worse"),
    [
        ("alignment-vanishes", "cosine", pl.when(pl.col("strength") == 0).then(0.5 + pl.col("seed") / 1e4)),
        ("alignment-grows", "cosine", pl.lit(1.0) / (1 + pl.col("strength"))),
        ("loss-of-order-lambda", "loss", pl.col("strength") * 1000),
        ("n-over-p", "b_dot_beta", pl.max("b_dot_beta").over("p", "strength", "seed")),
        ("theorem-3-2", "held", pl.col("held") * 0),
        ("feedback-kernel-vanishes", "H_norm", pl.col("H_norm") * pl.col("p").sqrt()),
        ("kernels-stay", "G_change", pl.col("G_change") * pl.col("p")),
        ("infinite-width", "discrepancy", pl.col("discrepancy") * pl.col("p").sqrt()),
        ("empirical-rate", "contraction", pl.lit(1.0)),
        ("theorem-4-6-constant", "mean_cosine", pl.col("mean_cosine") * 100 / pl.col("p")),
        ("other-schedules-align", "mean_cosine", pl.col("mean_cosine") / 100),
        ("proposition-3-3", "smallest", pl.col("smallest") / 100),
        ("dropout-fails-wide", "cosine", pl.col("p") / 1000 + pl.col("seed") / 1e5),
        ("images-align", "error_cosine", pl.lit(0.5) + pl.col("seed") / 1e4),
    ],
)
def test_a_claim_fails_on_numbers_that_contradict_it(claim: str, column: str, worse: pl.Expr, verdict_with) -> None:
    assert verdict_with("song2021", claim, {column: pl.coalesce(worse, column)}) == "fails"


def test_figure_2_has_the_sizes_of_the_paper() -> None:
    tasks = FIGURE2.tasks("paper")
    assert {task.point["p"] for task in tasks} == {100 * 2**k for k in range(1, 8)}
    assert {(task.point["n"], task.point["d"]) for task in tasks} == {(50, 150)}
    assert {(task.point["activation"], task.point["rate"]) for task in tasks} == {
        ("identity", 1e-4),
        ("relu", 1e-3),
        ("tanh", 1e-2),
    }
    assert FIGURE2.seeds["paper"] == 50


def test_figure_3_has_the_sizes_of_the_paper() -> None:
    point = next(point for point in FIGURE3.grid["paper"] if point["dataset"] == "mnist")
    assert (point["p"], point["batch"], point["rate"], point["epochs"]) == (1000, 600, 0.01, 300)
    assert {point["strength"] for point in FIGURE3.grid["paper"]} == {0.0, 0.1, 0.3}
    assert FIGURE3.seeds["paper"] == 10


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_a_run_does_not_depend_on_its_block(activation: str) -> None:
    block = [
        task for task in FIGURE2.tasks("smoke") if task.point["activation"] == activation and task.point["p"] == 80
    ]
    alone = call_run(run_figure2, [block[-1]], Setting())[0].records
    together = call_run(run_figure2, block, Setting())[-1].records
    assert alone["step"] == together["step"]
    assert alone["cosine"] == pytest.approx(together["cosine"], abs=1e-5)


@pytest.mark.parametrize("experiment", [FIGURE2, WIDTHS], ids=lambda experiment: experiment.name)
def test_memory_grows_with_the_block(experiment: Experiment) -> None:
    tasks = experiment.tasks("paper")
    assert experiment.memory is not None
    one, two = ([*tasks[:1], *more] for more in ([], [replace(tasks[0], seed=1)]))
    assert 0 < call_memory(experiment.memory, one) < call_memory(experiment.memory, two)


def test_a_run_with_too_large_a_rate_is_recorded_as_diverged() -> None:
    task = next(task for task in FIGURE2.tasks("smoke") if task.point["activation"] == "relu")
    outcome = call_run(run_figure2, [replace(task, point={**task.point, "rate": 1.0, "steps": 400})], Setting())[0]
    assert outcome.diverged is not None
    assert "lower the rate" in outcome.diverged
    assert all(value is not None and abs(value) < float("inf") for value in outcome.records["loss"])  # pyright: ignore


@pytest.mark.parametrize("name", ["mnist-10k", "fashion-mnist"])
def test_figure_3_on_real_images(name: str) -> None:
    folder = os.environ.get("FALIGN_DATA")
    if not folder:
        pytest.skip(f"{name} is not in the repository: set FALIGN_DATA to a folder that holds it")
    base = next(task for task in FIGURE3.tasks("paper") if task.point["dataset"] == name)
    points = [{**base.point, "p": 40, "epochs": 2, "strength": strength} for strength in (0.0, 0.3)]
    tasks = [replace(base, point=point) for point in points]
    for outcome in call_run(FIGURE3.run, tasks, Setting(data=Path(folder))):
        assert outcome.diverged is None
        assert outcome.records["step"] == [0, 1, 2]
        assert outcome.records["loss"][-1] < outcome.records["loss"][0]  # pyright: ignore
