"""What holds of the experiments of every paper, and of their runs at the smallest size."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import polars as pl
import pytest

from falign.lab.experiment import PRESETS, Claim, Experiment, LazyExperiments, Setting, Task
from falign.lab.experiment._axes import call_run
from falign.lab.experiment._execution import compute
from falign.lab.experiment._results import Results, judge
from falign.lab.report._figures import RenderedFigure, render
from falign.papers import PAPERS
from forks import run_each

RUN_ONE = """
import sys
from importlib import import_module
module, _, value = {where!r}.partition(":")
run = getattr(import_module(module), value).run
import falign.lab.experiment._execution, falign.lab.experiment._local
papers = sorted(name for name in sys.modules if name.startswith("falign.papers."))
print("matplotlib" in sys.modules, *papers)
"""
"""Imports what a worker does to compute an experiment."""

Smoke = Callable[[str], Mapping[str, Results]]


def _grouped(paper: str, *values: object, name: str):
    """A case that runs in the process of its paper's other tests."""
    return pytest.param(paper, *values, id=name, marks=pytest.mark.xdist_group(paper))


EXPERIMENTS = [
    _grouped(paper.name, experiment, name=experiment.name)
    for paper in PAPERS.values()
    for experiment in paper.experiments
]
CLAIMS = [
    _grouped(paper.name, experiment, claim, name=f"{paper.name}.{claim.name}")
    for paper in PAPERS.values()
    for experiment in paper.experiments
    for claim in experiment.claims
]
ON_IMAGES = [
    _grouped(paper.name, experiment, axis, name=experiment.name)
    for paper in PAPERS.values()
    for experiment in paper.experiments
    for axis in ("dataset", "data", "inputs")
    if any(point.get(axis) == "mnist" for point in experiment.grid["paper"])
]


@pytest.mark.parametrize(("paper", "experiment"), EXPERIMENTS)
def test_presets_change_sizes_and_repetitions_only(paper: str, experiment: Experiment) -> None:
    assert experiment.name.startswith(f"{paper}.")
    assert set(experiment.grid) == set(experiment.seeds) == set(PRESETS)
    axes = {preset: {tuple(sorted(point)) for point in experiment.grid[preset]} for preset in PRESETS}
    assert axes["smoke"] == axes["quick"] == axes["paper"]
    for preset in PRESETS:
        keys = [task.key for task in experiment.tasks(preset)]
        assert len(set(keys)) == len(keys)


def test_the_registry_names_papers_and_experiments_as_they_name_themselves() -> None:
    for name, paper in PAPERS.items():
        assert paper.name == name
        assert paper.names == tuple(experiment.name for experiment in paper.experiments)


def test_a_worker_imports_neither_matplotlib_nor_other_experiments(tmp_path: Path) -> None:
    names = ["song2021.figure2", "girotti2021.networks", "garg2022.ranks", "robertson2024.conservation"]
    papers = [PAPERS[name.partition(".")[0]] for name in names]
    places = [dict(cast(LazyExperiments, paper.experiments).where) for paper in papers]
    scripts = [RUN_ONE.format(where=where[name]) for name, where in zip(names, places, strict=True)]
    for name, paper, where, done in zip(names, papers, places, run_each(scripts, tmp_path), strict=True):
        assert isinstance(paper.experiments, LazyExperiments)
        assert done.returncode == 0, done.stderr
        module = where[name].partition(":")[0]  # some hold two experiments that are run alike
        others = {place.partition(":")[0] for place in where.values()} - {module}
        drawing, *modules = done.stdout.split()
        assert drawing == "False"
        assert module in modules
        assert others.isdisjoint(modules)
        assert not any(module.split(".")[2] in {*PAPERS} - {paper.name} for module in modules)


@pytest.mark.parametrize(("paper", "experiment"), EXPERIMENTS)
def test_all_runs_are_done_and_all_pictures_drawn(paper: str, experiment: Experiment, smoke: Smoke) -> None:
    found = smoke(paper)[experiment.name]
    assert found.count("done") == len(experiment.tasks("smoke"))
    for picture in experiment.pictures:
        assert isinstance(render(picture, found.table, "x"), RenderedFigure)


@pytest.mark.parametrize(("paper", "experiment", "claim"), CLAIMS)
def test_every_claim_can_be_read(paper: str, experiment: Experiment, claim: Claim, smoke: Smoke) -> None:
    verdict = judge(claim, smoke(paper)[experiment.name])
    assert "cannot be read" not in (verdict.message or "")
    assert verdict.verdict != "not run" or verdict.message


@pytest.mark.parametrize("status", ["missing", "failed", "diverged"])
@pytest.mark.parametrize(("paper", "experiment", "claim"), CLAIMS)
def test_no_claim_is_judged_on_a_part_of_its_runs(
    paper: str, status: str, experiment: Experiment, claim: Claim, smoke: Smoke
) -> None:
    there = smoke(paper)[experiment.name]
    scope = pl.lit(True) if claim.scope is None else claim.scope
    key = there.runs.filter(scope)["key"][-1]
    runs = there.runs.with_columns(status=pl.when(pl.col("key") == key).then(pl.lit(status)).otherwise("status"))
    verdict = judge(claim, replace(there, runs=runs))
    assert verdict.verdict == "not run"
    assert f"1 {status}" in (verdict.message or "")


@pytest.mark.parametrize(("paper", "experiment"), EXPERIMENTS)
def test_a_run_is_the_same_alone_and_in_its_block(paper: str, experiment: Experiment, smoke: Smoke) -> None:
    task = experiment.tasks("smoke")[-1]
    (alone,) = call_run(experiment.run, [task], Setting())
    table = smoke(paper)[experiment.name].table
    axes = [pl.col(axis) == value for axis, value in task.point.items()]
    together = table.filter(*axes, pl.col("seed") == task.seed)
    for name, values in alone.records.items():
        if name in experiment.timed:
            continue
        for here, there in zip(values, together[name].to_list(), strict=True):
            assert there == (pytest.approx(here, rel=1e-4, abs=1e-12) if isinstance(here, float) else here)


@pytest.mark.parametrize(("paper", "experiment", "axis"), ON_IMAGES)
def test_a_data_set_that_is_absent_is_said_to_be_and_never_replaced(
    paper: str, experiment: Experiment, axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    point = next(point for point in experiment.grid["paper"] if point.get(axis) == "mnist")
    task = Task(experiment.name, experiment.revision, {**point, axis: "mnist-10k"}, 0)
    result = compute(experiment.run, [task], Setting(data=tmp_path))
    assert result.run_results is None
    assert result.data_missing
    assert "mnist-10k" in (result.error or "")
