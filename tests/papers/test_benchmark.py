"""The field's table: its studies, its records, and the verdicts on its figures."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from falign.lab.config import ConfigError
from falign.lab.experiment import Evidence, Missing, Setting
from falign.lab.experiment._axes import call_run
from falign.lab.experiment._results import Results
from falign.lab.experiment._selection import narrow, select
from falign.papers import PAPERS
from falign.papers.benchmark import _training
from falign.papers.benchmark._pictures import behind, best_trials, summary
from falign.papers.benchmark._training import LADDER, NETWORKS, RATES, ROWS, split_images, tune
from falign.papers.benchmark.published import _STATED, PUBLISHED, _named, published_values, values_beside
from falign.papers.benchmark.table import TABLE

pytestmark = pytest.mark.xdist_group("benchmark")

CLAIMS = {claim.name: claim for claim in TABLE.claims}
ROOT = Path(__file__).parents[2]
SHOWN = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def table(smoke: Callable[[str], Mapping[str, Results]]) -> pl.DataFrame:
    return smoke("benchmark")["benchmark.table"].table


def test_every_row_has_the_same_budget_and_one_look_at_the_test_images(table: pl.DataFrame) -> None:
    runs = table.group_by("network", "row").agg(
        trials=pl.len(),
        rates=pl.col("rate").sort_by("trial"),
        best=pl.col("best").sum(),
        tests=pl.col("test").drop_nulls().len(),
        chosen=pl.col("validation").filter("best").first() == pl.col("validation").max(),
    )
    assert set(table.filter(network="mlp")["row"]) == set(ROWS)
    assert set(table["network"]) == set(NETWORKS)
    assert set(runs["trials"]) == {2}
    assert {tuple(rates) for rates in runs["rates"]} == {LADDER[:2]}
    assert set(runs["best"]) == set(runs["tests"]) == {1}
    assert runs["chosen"].all()


def test_costs_are_counted(table: pl.DataFrame) -> None:
    found = {row["row"]: row for row in best_trials(table).filter(network="mlp").to_dicts()}
    pixels, width, classes, batch = 64, 16, 10, 64
    forward = 2 * batch * (pixels * width + width * width + width * classes)
    errors = 2 * batch * (width * width + width * classes)
    assert found["bp"]["flops"] == found["bp"]["bp_flops"] == 2 * forward + errors
    assert found["dfa"]["flops"] == 2 * forward + 2 * (2 * batch * width * classes)
    assert found["frozen"]["flops"] == forward + 2 * batch * width * classes
    assert found["fa"]["flops"] == found["bp"]["flops"]
    true = forward + errors + forward
    assert found["dfa+calibrated"]["flops"] == pytest.approx(
        found["dfa"]["flops"] + (true - found["dfa"]["flops"]) / 100
    )
    assert found["bp"]["cosine"] == pytest.approx(1)
    assert found["frozen"]["cosine"] is None
    assert all(row["step_seconds"] > 0 and row["growth"] > 0 for row in found.values())


def test_a_study_begins_with_the_ladder_and_takes_what_diverged_for_worse() -> None:
    asked: list[float] = []

    def attempt(rate: float) -> tuple[float, object] | None:
        asked.append(rate)
        return None if rate > 0.05 else (1 - abs(rate - 0.012), rate)

    trials, best, network = tune(6, 0, attempt)
    assert tuple(asked[:3]) == LADDER
    assert [trial.rate for trial in trials] == asked
    assert all(RATES[0] <= rate <= RATES[1] for rate in asked)
    assert [trial.validation is None for trial in trials] == [rate > 0.05 for rate in asked]
    assert best is not None
    assert network == trials[best].rate == min(asked, key=lambda rate: abs(rate - 0.012))
    assert tune(6, 0, attempt)[0] == trials, "the same seed searches alike"
    assert tune(2, 0, lambda rate: None)[1:] == (None, None)


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "falign\[tune\]"'):
        tune(1, 0, lambda rate: None)


def test_a_run_whose_trainings_all_leave_the_finite_numbers_has_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    def tune_far(trials: int, seed: int, attempt: Callable) -> tuple:
        kept = [_training.Trial(rate=rate, validation=attempt(rate)) for rate in (1e20, 1e25)]
        return kept, None, None

    monkeypatch.setattr("falign.papers.benchmark.table.tune", tune_far)
    (outcome,) = call_run(TABLE.run, [TABLE.tasks("smoke")[0]], Setting())
    assert "all 2 trainings left the finite numbers" in (outcome.diverged or "")
    assert outcome.records["ran_away"] == [True, True]
    assert outcome.records["validation"] == outcome.records["test"] == [None, None]


def test_validation_images_are_apart_and_the_same_for_all() -> None:
    split = split_images("digits", Setting(), images=0, enlarged=False)
    assert len(split.validation) == (len(split.train) + len(split.validation)) // 10
    parts = [{image.numpy().tobytes() for image in part.pixels} for part in (split.train, split.validation)]
    assert not parts[0] & parts[1]
    assert float(split.train.pixels.mean()) == pytest.approx(0, abs=1e-5)
    large = split_images("digits", Setting(), images=100, enlarged=True)
    assert large.train.pixels.shape == (90, 1, 16, 16)
    assert torch.equal(large.train.pixels[..., ::2, ::2], large.train.pixels[..., 1::2, 1::2])


def made(network: str, test: Mapping[str, float], **columns: float) -> pl.DataFrame:
    """A table of best trials of five seeds with these accuracies, a little apart."""
    return pl.DataFrame(
        [
            {
                "dataset": "fashion-mnist",
                "network": network,
                "row": row,
                "seed": seed,
                "best": True,
                "validation": value,
                "test": value + 1e-4 * ((7 * seed + len(row)) % 5),
                "growth": 9.0 if row == "dfa" else 1.0 + 0.01 * seed,
                "step_seconds": columns.get("seconds", 0.9),
                "bp_step_seconds": 1.0,
            }
            for row, value in test.items()
            for seed in range(5)
        ]
    )


@pytest.mark.parametrize(
    ("claim", "runs", "holds"),
    [
        ("perceptron-random-feedback", made("mlp", {"bp": 0.9, "fa": 0.895, "dfa": 0.894}), True),
        ("perceptron-random-feedback", made("mlp", {"bp": 0.9, "fa": 0.895, "dfa": 0.89}), False),
        ("perceptron-best", made("mlp", {"bp": 0.9, "kp": 0.8995, "dfa": 0.8}), True),
        ("perceptron-best", made("mlp", {"bp": 0.9, "usf": 0.91, "dfa": 0.8}), False),
        ("lenet-layerwise", made("lenet", {"bp": 0.9, "kp": 0.9, "usf": 0.897, "wm": 0.91}), True),
        ("lenet-direct", made("lenet", {"bp": 0.9, "dkp": 0.899, "probe": 0.8}), True),
        ("lenet-direct", made("lenet", {"bp": 0.9, "dkp": 0.899, "probe": 0.8}, seconds=1.0), False),
        ("lenet-norm-direct", made("lenet-norm", {"bp": 0.9, "dkp": 0.88}), False),
        ("lenet-fixed", made("lenet", {"bp": 0.9, "dfa": 0.86, "dfa+calibrated": 0.885}), True),
        ("resnet", made("resnet", {"bp": 0.9, "kp": 0.9, "usf": 0.9, "dkp": 0.88}), False),
        ("audit", made("residual", {"bp": 0.6, "dfa": 0.3, "frozen": 0.35}), True),
        ("audit", made("residual", {"bp": 0.6, "dfa": 0.4, "frozen": 0.35}), False),
        ("audit-growth", made("residual", {"bp": 0.6, "dfa": 0.4}), True),
    ],
)
def test_figures_are_judged_on_a_made_table(claim: str, runs: pl.DataFrame, holds: bool) -> None:
    scope = CLAIMS[claim].scope
    assert scope is not None
    evidence = CLAIMS[claim].read(runs.filter(scope))
    assert isinstance(evidence, Evidence)
    assert evidence.holds is holds


def test_differences_are_paired_by_seed_and_kept_by_network() -> None:
    runs = pl.concat([made("mlp", {"bp": 0.9, "fa": 0.88}), made("lenet", {"bp": 0.7, "fa": 0.6})])
    means = behind(runs).group_by("network", "row").agg(pl.col("behind").mean())
    found = {(row["network"], row["row"]): row["behind"] for row in means.to_dicts()}
    assert found["mlp", "bp"] == found["lenet", "bp"] == 0
    assert found["mlp", "fa"] == pytest.approx(2, abs=0.05)
    assert found["lenet", "fa"] == pytest.approx(10, abs=0.05)


def test_no_figure_is_read_off_one_seed(table: pl.DataFrame) -> None:
    for claim in TABLE.claims:
        with pytest.raises(Missing):
            claim.read(table.filter(claim.scope))


def test_the_summary_has_costs_over_those_of_backpropagation(table: pl.DataFrame) -> None:
    cells = summary(table).filter(network="mlp")
    assert cells.filter(row="bp")["flops"].to_list() == [1.0]
    assert cells.filter(row="bp")["behind"].to_list() == [0.0]
    assert cells.filter(row="dfa")["flops"][0] < 1
    assert cells["half"].null_count() == cells.height, "one seed has no interval"


def test_the_published_values_are_well_formed() -> None:
    values = published_values()
    assert values.columns == [
        "source", "setting", "network", "data", "rule", "value", "sd", "tolerance", "ours", "runs_here", "provenance",
    ]  # fmt: skip
    assert values.drop("sd", "tolerance", "ours", "runs_here").null_count().sum_horizontal().item() == 0
    assert values["value"].is_between(0, 100).all()
    assert values.select("source", "setting", "network", "data", "rule").is_duplicated().sum() == 0
    here = values.filter(pl.col("runs_here").is_not_null())
    assert here["tolerance"].null_count() == 0
    points = {(p["source"], p["rule"], p["start"], p["dataset"]) for p in PUBLISHED.grid["paper"]}
    named = {tuple(row) for row in _named().select("source", "rule", "start", "dataset").rows()}
    assert named <= points, "what is said to run here is a point that does"
    assert {source for source, *_ in named} == set(_STATED)


def test_values_of_other_data_are_not_compared() -> None:
    rows = [
        {"source": "dfa-stall", "dataset": dataset, "rule": "bp", "start": "default", "seed": seed, "epoch": 0,
         "accuracy": 97.0 + 0.1 * seed}
        for dataset in ("mnist", "mnist-10k")
        for seed in range(2)
    ]  # fmt: skip
    claim = next(claim for claim in PUBLISHED.claims if claim.name == "dfa-stall-mnist")
    with pytest.raises(Missing, match="none of these runs is on the data"):
        claim.read(pl.DataFrame(rows[2:]))
    assert len(claim.read(pl.DataFrame(rows)).checks) == 1
    assert values_beside(pl.DataFrame(rows))["same"].to_list() == [True, False]


def test_a_part_of_the_runs_can_be_chosen() -> None:
    whole = select(["benchmark"], PAPERS)
    part = narrow(whole, ["network=lenet,mlp", "row=dkp"], 1, "paper")
    (experiment,) = part.experiments
    tasks = experiment.tasks("paper")
    assert {task.point["network"] for task in tasks} == {"lenet", "mlp"}
    assert {task.key for task in tasks} < {task.key for task in TABLE.tasks("paper")}
    assert {task.seed for task in tasks} == {0}
    for only, words in (
        (["network"], "AXIS=VALUE"),
        (["row=x"], "row has adafa, afa, bp"),
        (["no=1"], "no has no values"),
    ):
        with pytest.raises(ConfigError, match=words):
            narrow(whole, only, None, "paper")
    with pytest.raises(ConfigError, match="expected at least 1"):
        narrow(whole, [], 0, "paper")


@pytest.mark.slow
@pytest.mark.parametrize("source", list(_STATED))
def test_published_values_come_out_here(source: str, data_folder) -> None:
    """At a tenth of the epochs: near enough to the published value of backpropagation to be the same experiment."""
    dataset = {"biotorch": "fashion-mnist", "dfa-stall": "mnist-10k"}[source]
    points = [p for p in PUBLISHED.grid["paper"] if (p["source"], p["dataset"], p["rule"]) == (source, dataset, "bp")]
    task = next(task for task in PUBLISHED.tasks("paper") if task.point == points[0])
    short = replace(task, point={**task.point, "epochs": 10})
    (outcome,) = call_run(PUBLISHED.run, [short], Setting(data=data_folder))
    assert outcome.diverged is None
    least = {"biotorch": 88.0, "dfa-stall": 93.0}[source]
    assert max(value for value in outcome.records["accuracy"] if isinstance(value, float)) > least


@pytest.mark.skipif(not SHOWN.exists(), reason="the documentation is not beside the tests")
def test_pictures_of_the_docs_are_what_the_code_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.testing.compare import compare_images

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from field import draw

    draw(pl.read_csv(ROOT / "docs" / "benchmark" / "trials.csv", infer_schema_length=None), tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in SHOWN.glob("benchmark-*.png"))
    for name in drawn:
        assert compare_images(str(SHOWN / name), str(tmp_path / name), tol=2) is None
