"""Robertson and Koyejo 2024 at its smallest size: everything runs, is drawn, and is judged as it should be."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import atanh, exp, tanh

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from falign.lab.data import DataError, Dataset, load
from falign.lab.experiment import Setting
from falign.lab.experiment._axes import call_run
from falign.lab.experiment._results import Results, judge
from falign.papers import PAPERS
from falign.papers.robertson2024._training import with_classes, with_images, with_noise
from falign.papers.robertson2024.classes import CLASSES, _correlations, _mean_with_interval
from falign.papers.robertson2024.conservation import _off_diagonal
from falign.papers.robertson2024.dominance import _predicted

pytestmark = pytest.mark.xdist_group("robertson2024")  # all tests of one process share its runs

PAPER = PAPERS["robertson2024"]
CLAIMS = [(experiment, claim) for experiment in PAPER.experiments for claim in experiment.claims]


@pytest.fixture(scope="module")
def results(smoke: Callable[[str], Mapping[str, Results]]) -> Mapping[str, Results]:
    return smoke("robertson2024")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", progress=False)


def test_claims_that_hold_already_at_the_smallest_size(results: Mapping[str, Results]) -> None:
    verdicts = {claim.name: judge(claim, results[experiment.name]).verdict for experiment, claim in CLAIMS}
    sure = (
        "dominance-suffices",
        "dominance-bounds-the-loss",
        "dominant-start-descends",
        "starts-dominate",
        "minimum-norm",
        "minimum-norm-proportional",
    )
    assert {name: verdicts[name] for name in sure} == dict.fromkeys(sure, "holds")


_SPREAD = pl.col("seed") / 1e3
_FIRST = pl.col("step") == 0


@pytest.mark.parametrize(
    ("claim", "columns"),
    [
        ("on-the-diagonal", {"outgoing_change": pl.col("incoming_change") / 2}),
        ("drift-of-first-order", {"apart": pl.col("rate").sqrt() + _SPREAD / 1e3}),
        ("drift-of-other-rules", {"apart": pl.lit(1.0)}),
        ("momentum-vanishes", {"apart": pl.lit(1.0)}),
        ("momentum-drifts-more", {"apart": pl.lit(1.0)}),
        ("broken-at-any-rate", {"apart": pl.col("rate")}),
        ("decay-aligns", {"value": pl.col("incoming")}),
        ("dominance-suffices", {"loss": pl.col("step").cast(pl.Float64), "dominance": pl.lit(0.0)}),
        ("dominance-bounds-the-loss", {"loss": pl.lit(1.0) + pl.col("step") / 10}),
        ("split-predicts-the-loss", {"descent": pl.col("descent") * 2}),
        ("dominant-start-descends", {"loss": pl.col("step").cast(pl.Float64)}),
        ("starts-dominate", {"dominance": pl.lit(-1.1)}),
        ("anti-rises-and-recovers", {"loss": pl.lit(1.0) / (1 + pl.col("step")) + _SPREAD}),
        ("aligned-for-ever", {"broken": pl.lit(0.01)}),
        (
            "alignment-helps",
            {"cosine": pl.lit(1.0) / (1e-3 + pl.col("accuracy").max().over("rule", "seed", "classes"))},
        ),
        ("alignment-dial", {"cosine": pl.lit(0.5) + _SPREAD}),
        ("difficulty-grows", {"accuracy": pl.when(pl.col("accuracy").is_not_null()).then(pl.lit(0.5) + _SPREAD)}),
        ("gap-grows", {"accuracy": pl.when(pl.col("accuracy").is_not_null()).then(pl.lit(0.5) + _SPREAD)}),
        ("alignment-falls", {"cosine": pl.lit(0.5) + _SPREAD}),
        ("interpolates", {"train_error": pl.lit(0.1)}),
        ("benign", {"test_error": pl.col("noise") + 0.1}),
        ("benign-strict", {"test_error": pl.col("noise") + _SPREAD / 100}),
        ("overfits-like-backpropagation", {"test_error": (pl.col("rule") != "bp") * 0.1 + _SPREAD / 100}),
        ("minimum-norm", {"deviation": pl.lit(1e-9)}),
        ("minimum-norm-proportional", {"deviation": pl.col("size") ** 2}),
    ],
)
def test_a_claim_fails_on_numbers_that_contradict_it(claim: str, columns: dict[str, pl.Expr], verdict_with) -> None:
    assert verdict_with("robertson2024", claim, columns) == "fails"


@pytest.mark.parametrize(
    ("claim", "columns"),
    [
        ("on-the-diagonal", {"outgoing_change": pl.col("incoming_change") * 1.02}),
        ("on-the-diagonal-adafa", {"outgoing_change": pl.col("incoming_change") * 1.02}),
        ("drift-of-first-order", {"apart": pl.col("rate") * (1 + pl.col("seed"))}),
        ("momentum-drifts-more", {"apart": pl.when(pl.col("case") == "momentum").then(9.0).otherwise(1.0)}),
        ("broken-at-any-rate", {"apart": pl.lit(1.0) + pl.col("seed")}),
        ("decay-aligns", {"value": -pl.col("incoming")}),
        ("difficulty-grows", {"accuracy": pl.when(pl.col("accuracy").is_not_null()).then(1.0 / pl.col("classes"))}),
        ("alignment-falls", {"cosine": 1.0 / pl.col("classes")}),
        ("interpolates", {"train_error": pl.lit(0.0)}),
        ("benign", {"test_error": pl.lit(0.1)}),
        ("benign-strict", {"test_error": pl.lit(0.1)}),
    ],
)
def test_a_claim_holds_on_numbers_that_support_it(claim: str, columns: dict[str, pl.Expr], verdict_with) -> None:
    assert verdict_with("robertson2024", claim, columns) == "holds"


def test_quick_needs_no_download() -> None:
    sets = {point["dataset"] for experiment in PAPER.experiments for point in experiment.grid["quick"]}
    assert sets == {"digits", "gaussian"}


def test_classes_has_the_data_sets_and_numbers_of_classes_of_the_paper() -> None:
    counts = {
        name: {int(point["classes"]) for point in CLASSES.grid["paper"] if point["dataset"] == name}
        for name in ("mnist", "fashion-mnist", "mnist-10k", "cifar100", "tiny-imagenet")
    }
    assert counts["mnist"] == counts["fashion-mnist"] == counts["mnist-10k"] == set(range(2, 11))
    assert (max(counts["cifar100"]), max(counts["tiny-imagenet"])) == (100, 200)
    assert {point["rule"] for point in CLASSES.grid["paper"]} == {"bp", "fa", "usf", "frsf", "adafa", "kp", "dfa"}


def test_a_run_with_too_large_a_rate_is_recorded_as_diverged() -> None:
    task = CLASSES.tasks("smoke")[0]
    (outcome,) = call_run(CLASSES.run, [replace(task, point={**task.point, "rate": 1e6, "steps": 20})], Setting())
    assert outcome.diverged is not None
    assert "lower the rate" in outcome.diverged


def test_classes_are_renumbered_and_nested(digits: Dataset) -> None:
    three, five = with_classes(digits, 3, seed=4), with_classes(digits, 5, seed=4)
    assert three.classes == five.classes[:3]
    for part in (three, five):
        for number, name in enumerate(part.classes):
            here = part.train_images[part.train_labels == number].flatten(1).double().sum(0)
            there = digits.train_images[digits.train_labels == digits.classes.index(name)].flatten(1).double().sum(0)
            assert torch.equal(here, there)
        assert set(part.test_labels.tolist()) == set(range(len(part.classes)))
    assert len({with_classes(digits, 3, seed=seed).classes for seed in range(8)}) > 3


def test_a_share_of_labels_is_wrong_and_all_others_right(digits: Dataset) -> None:
    noisy = with_noise(digits, 0.2, seed=1)
    changed = noisy.train_labels != digits.train_labels
    assert int(changed.sum()) == round(0.2 * len(digits.train_labels))
    assert torch.equal(noisy.test_labels, digits.test_labels)
    moves = (noisy.train_labels - digits.train_labels)[changed] % 10
    assert stats.chisquare(np.bincount(moves.numpy(), minlength=10)[1:]).pvalue > 1e-3
    assert torch.equal(with_noise(digits, 0.2, seed=1).train_labels, noisy.train_labels)
    assert not torch.equal(with_noise(digits, 0.2, seed=2).train_labels, noisy.train_labels)


def test_a_part_of_the_images(digits: Dataset) -> None:
    part = with_images(digits, 100, seed=0)
    assert len(part.train_labels) == 100
    assert len(part.test_labels) == len(digits.test_labels)
    whole = {image.numpy().tobytes() for image in digits.train_images}
    assert all(image.numpy().tobytes() in whole for image in part.train_images)


@pytest.mark.parametrize("cut", [with_classes, with_images])
def test_more_than_there_is_cannot_be_cut(cut, digits: Dataset) -> None:
    with pytest.raises(DataError, match="expected at least 100000: ask for fewer"):
        cut(digits, 100000, seed=0)


def test_correlations_over_rules_and_their_interval() -> None:
    rng = np.random.default_rng(0)
    cosine, accuracy = rng.normal(size=(4, 7)), rng.normal(size=(4, 7))
    rows = [
        {"dataset": "x", "classes": 10, "seed": seed, "cosine": cosine[seed, rule], "accuracy": accuracy[seed, rule]}
        for seed in range(4)
        for rule in range(7)
    ]
    found = _correlations(pl.DataFrame(rows)).sort("seed")
    expected = [float(np.corrcoef(cosine[seed], accuracy[seed])[0, 1]) for seed in range(4)]
    slopes = [float(np.polyfit(cosine[seed], accuracy[seed], 1)[0]) for seed in range(4)]
    assert found["correlation"].to_list() == pytest.approx(expected)
    assert found["slope"].to_list() == pytest.approx(slopes)
    z = np.arctanh(expected)
    half = stats.t.ppf(0.995, 3) * z.std(ddof=1) / 2
    assert _mean_with_interval(expected) == pytest.approx(
        (tanh(z.mean()), tanh(z.mean() - half), tanh(z.mean() + half))
    )
    assert _mean_with_interval([0.5, 0.5])[1] == pytest.approx(tanh(atanh(0.5)))


def test_rules_of_equal_accuracy_have_no_correlation() -> None:
    rows = [{"dataset": "x", "classes": 2, "seed": 0, "cosine": k / 7, "accuracy": 1.0} for k in range(7)]
    found = _correlations(pl.DataFrame(rows))
    assert found["correlation"].to_list() == [None]
    assert found["slope"].to_list() == pytest.approx([0.0])


def test_the_predicted_loss_of_an_exact_exponential() -> None:
    """With |g_L|² = L and D = 0 the flow is L(t) = exp(-t): bound and sum agree with it."""
    rate, steps = 1e-3, 400
    loss = [exp(-rate * step) for step in range(steps + 1)]
    table = pl.DataFrame(
        {
            "dataset": "x",
            "model": "m",
            "rule": "fa",
            "start": "s",
            "seed": 0,
            "rate": rate,
            "step": range(steps + 1),
            "loss": loss,
            "descent": loss,
            "dominance": 0.0,
            "output_gradient": np.sqrt(loss),
        }
    )
    found = _predicted(table)
    assert found["kappa"].unique().to_list() == [1.0]
    assert found["bound"].to_numpy() == pytest.approx(np.array(loss), rel=1e-9)
    assert found["integrated"].to_numpy() == pytest.approx(np.array(loss), abs=rate)
    assert (found["rise"].drop_nulls().to_numpy() < 0).all()
    against = _predicted(table.with_columns(dominance=pl.lit(-2.0)))
    assert against["bound"].null_count() == steps + 1


def test_the_angle_to_the_diagonal() -> None:
    point = {"dataset": "x", "case": "plain", "rule": "fa", "model": "m", "rate": 0.1, "seed": 0, "step": 5, "steps": 5}
    rest = {"apart": 2.0, "incoming": 1.0, "value": 0.0, "negative": 0.0, "residual": 0.0}
    angle = np.deg2rad(45 + 7)
    layer = {"incoming_change": float(np.sin(angle)), "outgoing_change": float(np.cos(angle))}
    (found,) = _off_diagonal(pl.DataFrame([{**point, **rest, **layer}] * 2)).to_dicts()
    assert found["degrees"] == pytest.approx(7)
    assert found["apart"] == 4.0
