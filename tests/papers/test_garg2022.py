"""Garg and Vempala 2022 at its smallest size: claims are judged as they should be, and inputs are what they claim."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from falign.lab.data import DataError, load
from falign.lab.experiment import Experiment, Setting
from falign.lab.experiment._axes import call_run
from falign.lab.experiment._results import Results, judge
from falign.papers.garg2022 import GARG2022
from falign.papers.garg2022._shared import groups, largest_in_groups, matrix
from falign.papers.garg2022.alignment import ALIGNMENT
from falign.papers.garg2022.convergence import CONVERGENCE
from falign.papers.garg2022.networks import NETWORKS, _problem
from falign.papers.garg2022.ranks import RANKS

pytestmark = pytest.mark.xdist_group("garg2022")  # all tests of one process share its runs

CLAIMS = {claim.name: (experiment, claim) for experiment in GARG2022.experiments for claim in experiment.claims}


@pytest.fixture(scope="module")
def results(smoke: Callable[[str], Mapping[str, Results]]) -> Mapping[str, Results]:
    return smoke("garg2022")


def test_claims_that_hold_already_at_the_smallest_size(results: Mapping[str, Results]) -> None:
    verdicts = {name: judge(claim, results[experiment.name]).verdict for name, (experiment, claim) in CLAIMS.items()}
    sure = (
        "fa-reaches-the-optimum",
        "feedback-error-falls",
        "alignment-never-falls",
        "alignment-facilitates-convergence",
        "closed-form",
        "same-function-from-every-start",
        "separation",
        "law-of-the-ratio",
        "far-in-every-draw",
        "one-pass-of-a-range-finder",
    )
    assert {name: verdicts[name] for name in sure} == dict.fromkeys(sure, "holds")


def test_names_of_claims_are_their_own() -> None:
    assert len(CLAIMS) == sum(len(experiment.claims) for experiment in GARG2022.experiments)


_FA, _STEP = pl.col("method") == "fa", pl.col("step").cast(pl.Float64)
_FINE = pl.when(pl.col("fine") > 0).then(1 / pl.col("fine")).otherwise(0.0)
CONTRADICTED: list[tuple[str, dict[str, pl.Expr]]] = [
    ("fa-reaches-the-optimum", {"error": pl.lit(1e-3)}),
    ("fa-reaches-it-from-random-starts", {"error": pl.lit(0.1)}),
    ("fa-star-reaches-the-optimum", {"error": pl.lit(0.1)}),
    ("gd-reaches-the-optimum", {"error": pl.lit(0.1)}),
    ("slower-than-gradient-descent", {"error": (pl.col("step") < pl.when(_FA).then(1).otherwise(50)).cast(pl.Float64)}),
    ("steps-follow-the-flow", {"error": _FINE.sqrt()}),
    ("matrices-come-closer", {"cosine": 0.5 - _STEP / 1e3}),
    ("feedback-error-falls", {"lyapunov": 1 + _STEP}),
    ("alignment-never-falls", {"alignment": -1e-6 * _STEP}),
    ("alignment-facilitates-convergence", {"lyapunov": pl.lit(100.0)}),
    ("gram-drift", {"gram_drift": pl.col("rate").sqrt()}),
    ("neither-error-nor-cosine-is-monotone", {"error": -_STEP, "cosine": _STEP}),
    ("gd-is-optimal-at-every-rank", {"error": pl.col("best") * 1.1}),
    ("above-the-optimum", {"error": pl.col("best") * pl.when(_FA).then(0.9).otherwise(1.0)}),
    ("closed-form", {"distance": pl.lit(1e-6)}),
    ("same-function-from-every-start", {"distance": (pl.col("scale") > 0) * 1e-6}),
    ("separation", {"ratio": pl.lit(1.0)}),
    ("law-of-the-ratio", {"ratio": pl.col("ratio") * 2}),
    ("worse-with-r", {"ratio": pl.lit(3.0)}),
    ("trained-errors", {"fa": pl.col("ratio") * 1.1}),
    ("trained-errors", {"gd": pl.col("gd") * 1.1}),
    ("far-in-every-draw", {"estimate": pl.col("ratio") * 2}),
    ("almost-orthogonal", {"overlap": pl.lit(0.5)}),
    ("almost-orthogonal", {"ratio": pl.lit(1.5)}),
    ("overlap-vanishes", {"overlap": pl.col("m").cast(pl.Float64) ** -0.5}),
    ("trained-representations", {"ratio": pl.col("ratio") + (pl.col("found") == "trained") * 0.1}),
    ("networks-reach-the-optimum", {"error": pl.lit(0.1)}),
    ("networks-end-above-the-optimum", {"error": pl.col("best")}),
    ("backpropagation-reaches-the-best", {"error": pl.col("stationary")}),
    ("one-pass-of-a-range-finder", {"trained": pl.col("ratio") * 1.1}),
    ("oversampling-bounds-the-ratio", {"ratio": pl.lit(10.0)}),
    ("what-oversampling-buys", {"ratio": 1.5 + pl.col("seed") / 100}),
    ("what-power-buys", {"ratio": 1.5 + pl.col("power") / 10}),
]


@pytest.mark.parametrize(("claim", "columns"), CONTRADICTED)
def test_a_claim_fails_on_numbers_that_contradict_it(claim: str, columns: dict[str, pl.Expr], verdict_with) -> None:
    assert verdict_with("garg2022", claim, columns) == "fails"


def test_every_claim_is_contradicted() -> None:
    assert {claim for claim, _ in CONTRADICTED} == set(CLAIMS)


@pytest.mark.parametrize(
    ("claim", "columns"),
    [
        ("fa-reaches-it-from-random-starts", {"error": pl.lit(0.009)}),
        ("fa-star-reaches-the-optimum", {"error": pl.lit(0.009)}),
        (
            "slower-than-gradient-descent",
            {"error": (pl.col("step") < pl.when(_FA).then(50).otherwise(1)).cast(pl.Float64)},
        ),
        ("steps-follow-the-flow", {"error": _FINE * (1 + pl.col("seed"))}),
        ("matrices-come-closer", {"cosine": _STEP / 1e3, "alignment": _STEP}),
        ("gram-drift", {"gram_drift": pl.col("rate") * (1 + pl.col("seed"))}),
        ("neither-error-nor-cosine-is-monotone", {"error": _STEP, "cosine": -_STEP}),
        ("above-the-optimum", {"error": pl.col("best") * pl.when(_FA).then(1.5).otherwise(1.0)}),
        ("worse-with-r", {"ratio": pl.col("r").cast(pl.Float64).sqrt()}),
        ("almost-orthogonal", {"ratio": pl.lit(1.02), "overlap": pl.lit(0.02)}),
        ("overlap-vanishes", {"overlap": (1.0 + pl.col("seed")) / pl.col("m")}),
        ("networks-reach-the-optimum", {"error": pl.lit(0.009)}),
        ("networks-end-above-the-optimum", {"error": pl.col("stationary") * 1.01}),
        ("backpropagation-reaches-the-best", {"error": pl.col("best") * 1.01}),
        ("what-oversampling-buys", {"ratio": 1 + 1 / (1.0 + pl.col("oversampling"))}),
        ("what-power-buys", {"ratio": 1 + 1 / (1.0 + pl.col("power"))}),
    ],
)
def test_a_claim_holds_on_numbers_that_support_it(claim: str, columns: dict[str, pl.Expr], verdict_with) -> None:
    assert verdict_with("garg2022", claim, columns) == "holds"


def test_quick_needs_no_download() -> None:
    points = [point for experiment in GARG2022.experiments for point in experiment.grid["quick"]]
    sets = {str(point.get("data", point.get("inputs", ""))) for point in points}
    assert sets == {"power law", "gaussian", "flat", "flat tail", "isotropic", "fresh", "digits", ""}


@pytest.mark.parametrize(
    "experiment", [CONVERGENCE, ALIGNMENT, RANKS, NETWORKS], ids=lambda experiment: experiment.name
)
def test_on_real_images(experiment: Experiment, data_folder: Path) -> None:
    task = next(task for task in experiment.tasks("paper") if "fashion-mnist" in task.point.values())
    (outcome,) = call_run(experiment.run, [replace(task, point={**task.point, "steps": 40})], Setting(data=data_folder))
    assert outcome.diverged is None
    errors = outcome.records["error"]
    assert errors[-1] < 0.7
    assert errors[-1] < errors[0] or outcome.records["step"] == [40]


@pytest.mark.filterwarnings("ignore:rate .* is beyond")
def test_a_run_with_too_large_a_rate_is_recorded_as_diverged() -> None:
    task = ALIGNMENT.tasks("smoke")[0]
    (outcome,) = call_run(ALIGNMENT.run, [replace(task, point={**task.point, "rate": 50.0, "steps": 40})], Setting())
    assert outcome.diverged is not None
    assert "lower the rate" in outcome.diverged
    errors = outcome.records["error"]
    assert 0 < len(errors) < 41
    assert all(isinstance(error, float) for error in errors)


@pytest.mark.filterwarnings("ignore:rate .* is beyond")
def test_a_network_with_too_large_a_rate_is_recorded_as_diverged() -> None:
    task = NETWORKS.tasks("smoke")[0]
    (outcome,) = call_run(NETWORKS.run, [replace(task, point={**task.point, "rate": 50.0, "steps": 40})], Setting())
    assert outcome.diverged is not None
    assert len(outcome.records["error"]) == len(outcome.records["step"]) < 30


@pytest.mark.parametrize(
    ("data", "n", "m", "rank"), [("power law", 9, 7, 4), ("gaussian", 6, 8, 0), ("digits", 9, 64, 3)]
)
def test_matrices_have_largest_singular_value_1_and_their_rank(data: str, n: int, m: int, rank: int) -> None:
    Y = matrix(data, n, m, Setting(), rank=rank).numpy()
    values = np.linalg.svd(Y, compute_uv=False)
    assert Y.shape == (n, m)
    assert values[0] == pytest.approx(1)
    assert int((values > 1e-10).sum()) == (rank or min(n, m))
    if data == "power law":
        assert values[:rank] == pytest.approx(np.arange(1, rank + 1) ** -0.5)


def test_images_are_rows() -> None:
    images = load("digits", progress=False).train_images[:5].double().reshape(5, 64)
    Y = matrix("digits", 5, 64, Setting())
    assert torch.allclose(Y * torch.linalg.matrix_norm(images, 2), images, atol=1e-12)
    with pytest.raises(DataError, match="expected \\(5, 32\\): change n and m"):
        matrix("digits", 5, 32, Setting())


@pytest.mark.parametrize("inputs", ["isotropic", "digits"])
def test_fixed_inputs_are_isotropic_and_only_their_best_linear_map_counts(inputs: str) -> None:
    given = _problem(3, inputs, Setting(), n=10, m=12, rank=4, points=80)
    x, y = given.batch()
    assert torch.allclose(x.mT @ x / 80, torch.eye(12, dtype=torch.float64), atol=1e-12)
    fitted = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T
    assert given.Y.numpy() == pytest.approx(fitted, abs=1e-12)
    assert float(torch.linalg.matrix_norm(given.Y, 2)) == pytest.approx(1)
    other = torch.randn(10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = (x @ other.mT - y).mT @ x / 80
    assert torch.allclose(gradient, other - given.Y, atol=1e-12)


def test_fresh_inputs_are_new_in_every_batch_and_the_same_for_a_seed() -> None:
    once, again = (_problem(1, "fresh", Setting(), n=5, m=6, rank=4, points=50) for _ in range(2))
    first, second = once.batch()[0], once.batch()[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, again.batch()[0])
    x, y = once.batch()
    assert torch.allclose(y, x @ once.Y.mT)


def test_the_hidden_layer_is_wide_enough_where_it_is_said_to_be() -> None:
    for point in NETWORKS.grid["smoke"]:
        sizes = {name: point[name] for name in ("n", "m", "rank", "points")}
        given = _problem(0, point["inputs"], Setting(), **sizes)  # pyright: ignore[reportArgumentType]  # of the grid
        assert int(torch.linalg.matrix_rank(given.Y)) == point["rank"]


def test_markov_promises_what_the_separation_is_judged_by() -> None:
    """c uniform on the sphere of r + 1 dimensions: the ratio is 1/√(c² + ε²(1 - c²)), whatever δ is."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(20000, 21))
    c = normal[:, -1] / np.linalg.norm(normal, axis=1)
    for delta in (0.5, 0.1):
        ratio = 1 / np.sqrt(c**2 + 1e-6 * (1 - c**2))
        assert (ratio >= (1 / (delta * 21) + 1e-6) ** -0.5).mean() >= 1 - delta


def test_groups_are_named_by_their_values() -> None:
    table = pl.DataFrame({"data": ["b", "a", "a"], "r": [2, 1, 1], "x": [3.0, 1.0, 2.0]})
    assert [label for label, _ in groups(table, ["data", "r"])] == ["a, r = 1", "b, r = 2"]
    assert [check.measured for check in largest_in_groups(table, pl.col("x"), ["data"], 2.5).checks] == [2.0, 3.0]
    assert not largest_in_groups(table, pl.col("x"), ["data"], 2.5).holds
