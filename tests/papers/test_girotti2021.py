"""Girotti, Mitliagkas and Gidel 2021 at its smallest size: everything runs, is drawn, and is judged as it should be."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from falign.lab.data import Dataset, load
from falign.lab.experiment import Experiment, Setting
from falign.lab.experiment._axes import call_run
from falign.lab.experiment._results import Results, judge
from falign.papers.girotti2021 import GIROTTI2021 as PAPER
from falign.papers.girotti2021._linear_networks import (
    AGAINST,
    Problem,
    converted,
    gradient_descent,
    path,
    problem,
    product,
    start,
)
from falign.papers.girotti2021._modes import crossing, in_order, orders, paced
from falign.papers.girotti2021.networks import NETWORKS
from falign.papers.girotti2021.prediction import PREDICTION
from falign.theory.deep_linear import modes

pytestmark = pytest.mark.xdist_group("girotti2021")  # all tests of one process share its runs

CLAIMS = [(experiment, claim) for experiment in PAPER.experiments for claim in experiment.claims]
ON_IMAGES = (NETWORKS, PREDICTION)


@pytest.fixture(scope="module")
def results(smoke: Callable[[str], Mapping[str, Results]]) -> Mapping[str, Results]:
    return smoke(PAPER.name)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", progress=False)


def test_claims_that_hold_already_at_the_smallest_size(results: Mapping[str, Results]) -> None:
    """All but those about networks, whose intervals are wide with two seeds, and those about predictions."""
    verdicts = {claim.name: judge(claim, results[experiment.name]).verdict for experiment, claim in CLAIMS}
    sure = [
        *(name for name in verdicts if not name.startswith(("networks", "prediction"))),
        "networks-spectral",
        "networks-rest-unstable",
    ]
    assert {name: verdicts[name] for name in sure} == dict.fromkeys(sure, "holds")


def test_every_statement_of_the_abstract_is_a_claim() -> None:
    """Rates in continuous and discrete time, both orders, and that the start alone makes the difference."""
    stated = {claim.name for _, claim in CLAIMS if claim.reference.startswith("Abstract")}
    assert stated >= {
        "guaranteed-flow",
        "guaranteed-steps",
        "regularises",
        "anti-regularises",
        "only-the-start-differs",
        "networks-regularise",
        "networks-anti-regularise",
        "networks-only-the-start-differs",
    }


_TARGET, _COMPONENT, _SEED = pl.col("target"), pl.col("component"), pl.col("seed")
_SMALL = pl.col("scheme") == "small"


@pytest.mark.parametrize(
    ("claim", "columns"),
    [
        ("regularises", {"learned": _TARGET}),
        ("anti-regularises", {"learned": 1 / _TARGET}),
        ("only-the-start-differs", {"learned": 1 / _TARGET}),
        ("neutral", {"learned": 1 / _TARGET}),
        ("gradient-in-order", {"learned": _TARGET}),
        ("no-staircase", {"begun": 0.45 * pl.col("learned")}),
        ("power-law", {"learned": 1 / _TARGET}),
        ("constant", {"learned": 1.01 * pl.col("learned")}),
        ("times-exact", {"learned": 1.01 * pl.col("learned")}),
        ("times-exact", {"learned": pl.lit(None, dtype=pl.Float64)}),
        ("turns-at-the-critical-size", {"learned": 1 / _TARGET}),
        ("simultaneous", {"learned": 1 / _TARGET}),
        ("logarithmic", {"learned": 1 / _TARGET}),
        ("gradient-parts-more", {"learned": _TARGET**-0.5}),
        ("slower-with-size", {"fitted": _TARGET}),
        ("slower-with-size", {"learned": 1 / _TARGET}),
        ("rates", {"fitted": 1.1 * pl.col("rate")}),
        ("critical-size", {"hidden": pl.lit(1.0)}),
        ("rate-vanishes", {"fitted": 1 - _TARGET}),
        ("always-learns", {"error": pl.lit(1.0)}),
        ("fixed-points", {"hidden": pl.col("start")}),
        ("limits", {"hidden": pl.col("hidden") + 0.1}),
        ("unstable-point-parts", {"hidden": -pl.col("hidden")}),
        ("guaranteed-flow", {"held": pl.lit(0.9)}),
        ("guaranteed-steps", {"held": pl.lit(0.9)}),
        ("converges-from-anywhere", {"held": pl.lit(0.9)}),
        ("steps-converge", {"learned": pl.lit(0.99)}),
        ("steps-diverge", {"learned": pl.lit(1.0), "diverged": pl.lit(-1)}),
        ("step-universal", {"settling": 1.1 * pl.col("settling")}),
        ("steps-follow-the-flow", {"learned": pl.col("flow") + pl.col("share").sqrt()}),
        ("invariant-drifts", {"drift": pl.lit(-0.1)}),
        ("invariant-drifts", {"drift": pl.col("share")}),
        ("networks-regularise", {"learned": _COMPONENT}),
        ("networks-anti-regularise", {"learned": 1 / _COMPONENT}),
        ("networks-only-the-start-differs", {"learned": 1 / _COMPONENT}),
        ("networks-spectral", {"learned": _COMPONENT}),
        ("networks-power-law", {"learned": _COMPONENT**-2}),
        ("networks-power-law", {"learned": pl.lit(None, dtype=pl.Float64)}),
        ("networks-gradient", {"learned": _COMPONENT}),
        ("networks-gradient-parts-more", {"learned": 1 / _COMPONENT}),
        ("networks-no-staircase", {"begun": pl.col("learned") / 2}),
        ("networks-rest-unstable", {"outside": pl.lit(1e-9) * (pl.col("time") / 10).exp()}),
        ("chart-regularises", {"slope": pl.lit(1.0)}),
        ("chart-anti-regularises", {"slope": pl.lit(-1.0)}),
        ("prediction-linear", {"predicted": 2 * pl.col("trained")}),
        ("prediction-modes", {"predicted": pl.col("trained") + 0.1}),
        ("prediction-relu", {"predicted": 2 * pl.col("trained")}),
        ("prediction-relu-passed", {"predicted": pl.col("trained") / 2}),
    ],
)
def test_a_claim_fails_on_numbers_that_contradict_it(claim: str, columns: dict[str, pl.Expr], verdict_with) -> None:
    assert verdict_with("girotti2021", claim, columns) == "fails"


@pytest.mark.parametrize(
    ("claim", "columns"),
    [
        ("steps-diverge", {"learned": pl.lit(1.0), "diverged": pl.lit(7)}),
        ("steps-diverge", {"learned": pl.lit(0.5), "diverged": pl.lit(-1)}),
        ("networks-regularise", {"learned": 1 / _COMPONENT}),
        ("networks-anti-regularise", {"learned": _COMPONENT}),
        (
            "networks-only-the-start-differs",
            {"learned": pl.when(_SMALL).then(1 / _COMPONENT).otherwise(_COMPONENT)},
        ),
        (
            "networks-power-law",
            {
                "learned": pl.when(pl.col("rule") == "bp")
                .then(1 / _COMPONENT)
                .otherwise(_COMPONENT ** (-1 + 1 / (2 ** pl.col("depth") - 1)))
            },
        ),
        (
            "networks-no-staircase",
            {"begun": pl.col("learned") * pl.when(pl.col("rule") == "bp").then(0.9).otherwise(0.3)},
        ),
        (
            "networks-gradient-parts-more",
            {"learned": pl.when(pl.col("rule") == "bp").then(1 / _COMPONENT).otherwise(_COMPONENT**-0.5)},
        ),
        ("prediction-linear", {"predicted": pl.col("trained")}),
        ("prediction-modes", {"predicted": pl.col("trained")}),
        ("prediction-relu", {"predicted": pl.col("trained")}),
        ("prediction-relu-passed", {"trained": pl.lit(1.0), "predicted": pl.lit(1.5)}),
    ],
)
def test_a_claim_holds_on_numbers_that_support_it(claim: str, columns: dict[str, pl.Expr], verdict_with) -> None:
    assert verdict_with("girotti2021", claim, columns) == "holds"


def test_quick_needs_no_download() -> None:
    sets = {point["dataset"] for experiment in ON_IMAGES for point in experiment.grid["quick"]}
    assert sets == {"digits", "teacher"}


@pytest.mark.parametrize("experiment", ON_IMAGES, ids=lambda experiment: experiment.name)
def test_on_real_images(experiment: Experiment, data_folder: Path) -> None:
    task = next(task for task in experiment.tasks("paper") if "fashion-mnist" in task.point.values())
    point = {**task.point, "steps": 40, "hidden": 40}
    (outcome,) = call_run(experiment.run, [replace(task, point=point)], Setting(data=data_folder))
    assert outcome.diverged is None
    learned = outcome.records["share" if "share" in outcome.records else "trained"]
    assert learned[0] != learned[-1]


@pytest.mark.parametrize("experiment", ON_IMAGES, ids=lambda experiment: experiment.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_with_too_large_a_rate_is_recorded_as_diverged(experiment: Experiment) -> None:
    task = next(task for task in experiment.tasks("smoke") if task.point["rule"] == "fa")
    (outcome,) = call_run(experiment.run, [replace(task, point={**task.point, "rate": 1e3, "steps": 120})], Setting())
    assert outcome.diverged is not None
    assert "lower the rate" in outcome.diverged


def test_when_a_share_crosses_its_level() -> None:
    times = np.linspace(0, 5, 501)
    assert crossing(times, 1 - np.exp(-times)) == pytest.approx(np.log(10), abs=1e-4)
    assert crossing(times, 1 - np.exp(-times), 0.9) == pytest.approx(-np.log(0.9), abs=1e-4)
    assert crossing(times, 3 - 2 * times) == pytest.approx(0.95)  # from above
    assert crossing(times, np.full(501, 1.05)) == 0.0
    assert crossing(times, np.full(501, 0.5)) is None


def test_the_share_of_pairs_in_order_is_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    sizes, times = rng.permutation(9) + 1.0, rng.permutation(9) + 1.0
    counted = [times[a] < times[b] if sizes[a] > sizes[b] else times[b] < times[a] for a in range(9) for b in range(a)]
    assert in_order(sizes.tolist(), times.tolist()) == pytest.approx(np.mean(counted))
    assert in_order([3.0, 2.0, 1.0], [1.0, 2.0, None]) == 1.0
    assert in_order([3.0, 2.0, 1.0], [None, None, 1.0]) == pytest.approx(0.5 / 3)
    table = pl.DataFrame(
        {"kind": ["a", "a", "b", "b"], "target": [1.0, 2.0, 1.0, 2.0], "learned": [1.0, 2.0, 2.0, 1.0]}
    )
    assert orders(table, by=["kind"])["in_order"].to_list() == [0.0, 1.0]


_SIZES = {"points": 60, "inputs": 12}


@pytest.mark.parametrize("task", ["map", "pixels", "classes"])
def test_problems_are_white_and_diagonal(task: str, digits: Dataset) -> None:
    learned = problem(None if task == "map" else digits, task, seed=3, **_SIZES)
    X, Y = learned.X.numpy(), learned.Y.numpy()
    assert pytest.approx(np.eye(12), abs=1e-12) == X.T @ X / 60
    assert learned.λ[0] == pytest.approx(1.0)
    assert learned.U.numpy() @ np.diag(learned.λ) @ learned.V.numpy().T == pytest.approx(Y.T @ X / 60, abs=1e-12)
    assert len(learned.λ) == {"map": 6, "pixels": 12, "classes": 9}[task]
    assert learned.shares(learned.U @ learned.λ.diag() @ learned.V.mT).numpy() == pytest.approx(1.0)
    if task == "map":
        assert learned.λ.numpy() == pytest.approx(np.array([6, 4, 3, 2, 1.5, 1]) / 6)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("depth", [2, 3])
def test_a_spectral_start_is_diagonal_along_the_feedback_path(rule: str, depth: int, digits: Dataset) -> None:
    learned = problem(digits, "pixels", seed=0, **_SIZES)
    W, B = start(learned, rule=rule, depth=depth, hidden=80, scheme="anti-aligned", basis="spectral", seed=0)
    for part in B:
        assert (part @ part.mT).numpy() == pytest.approx(np.eye(len(part)), abs=1e-12)
    directions = path(B, direct=rule == "dfa") @ learned.U
    assert (directions.mT @ W[0] @ learned.V).numpy() == pytest.approx(-AGAINST * np.eye(12), abs=1e-10)
    assert all(not part.any() for part in W[1:])


@pytest.mark.parametrize("rule", ["fa", "dfa", "bp"])
def test_networks_take_the_steps_of_their_rule(rule: str, digits: Dataset) -> None:
    learned: Problem = problem(digits, "classes", seed=0, **_SIZES)
    weights, feedback = start(learned, rule=rule, depth=3, hidden=80, scheme="small", basis="random", seed=1)
    W, B = [part.numpy() for part in weights], [part.numpy() for part in feedback]
    X, Y = learned.X.numpy(), learned.Y.numpy()
    trained = [
        product(model).numpy()
        for model in gradient_descent(converted(weights, feedback, rule), learned.X, learned.Y, 0.5, [slice(None)] * 5)
    ]
    for step in range(6):
        assert trained[step] == pytest.approx(W[2] @ W[1] @ W[0], abs=1e-12)
        h1 = X @ W[0].T
        h2 = h1 @ W[1].T
        top = (h2 @ W[2].T - Y) / len(X)
        middle = top @ (W[2] if rule == "bp" else B[1])
        bottom = top @ B[0] if rule == "dfa" else middle @ (W[1] if rule == "bp" else B[0])
        W = [W[0] - 0.5 * bottom.T @ X, W[1] - 0.5 * middle.T @ h1, W[2] - 0.5 * top.T @ h2]


@pytest.mark.parametrize("rule", ["fa", "dfa", "bp"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_pace_is_a_symmetry(rule, depth: int) -> None:
    random = torch.Generator().manual_seed(depth)
    weights, feedback = (torch.randn(count, 7, generator=random).double() for count in (depth, depth - 1))
    begun = modes([0.5, 1.0, 2.0, 0.1, 3.0, 0.7, 1.5], list(weights), feedback=list(feedback), rule=rule)
    pace = torch.linspace(0.2, 5.0, 7).double()
    quick = paced(begun, pace)
    assert quick.decay_rate.numpy() == pytest.approx((pace * begun.decay_rate).numpy())
    scale = (pace ** (1 / (2 * depth - 2))).numpy()
    assert quick.velocity.numpy() == pytest.approx((begun.velocity * pace).numpy() * scale)
