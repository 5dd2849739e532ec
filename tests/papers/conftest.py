"""The runs of a paper at its smallest size, made once a process."""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import polars as pl
import pytest
from rich.console import Console

from falign.lab.experiment import Setting
from falign.lab.experiment._local import local_executor
from falign.lab.experiment._reproduce import reproduce
from falign.lab.experiment._results import Results, judge
from falign.lab.experiment._selection import select
from falign.lab.experiment._store import Store
from falign.papers import PAPERS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a paper's runs go unchecked: checking annotations took five times as long as the runs."""
    for item in items:
        if "smoke" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.unchecked)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Mapping[str, Results]]:
    """Name of a paper -> experiment -> its results at the preset ``smoke``; tests of one paper share an xdist group."""

    @cache
    def results(name: str) -> Mapping[str, Results]:
        out, console = tmp_path_factory.mktemp(name), Console(file=io.StringIO())
        jobs = select([name], PAPERS)
        code = reproduce(jobs, "smoke", out=out, executor=local_executor(1, Setting()), memory=2**31, console=console)
        assert code == 0, console.file.getvalue()  # pyright: ignore
        assert (out / "report" / f"{name}.html").stat().st_size > 10_000
        store = Store(folder=out)
        return {experiment.name: store.results(experiment, "smoke") for experiment in PAPERS[name].experiments}

    return results


@pytest.fixture(scope="session")
def verdict_with(smoke: Callable[[str], Mapping[str, Results]]) -> Callable[[str, str, Mapping[str, pl.Expr]], str]:
    """(Paper, claim, columns) -> the claim's verdict if these columns of its smoke runs were as given."""

    def verdict(paper: str, claim: str, columns: Mapping[str, pl.Expr]) -> str:
        cases = [(each, found) for each in PAPERS[paper].experiments for found in each.claims if found.name == claim]
        ((experiment, found),) = cases
        there = smoke(paper)[experiment.name]
        return judge(found, replace(there, table=there.table.with_columns(**columns))).verdict

    return verdict
