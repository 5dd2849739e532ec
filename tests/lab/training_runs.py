"""Runs that say nothing, and what is read of them."""

import io
from pathlib import Path

import polars as pl
from rich.console import Console

from falign.lab.config import TrainConfig
from falign.lab.ending import Outcome
from falign.lab.train import resume, train


def quiet() -> Console:
    """A console whose words are kept, and not shown."""
    return Console(file=io.StringIO(), width=200)


def begin(options: TrainConfig, folder: Path, console: Console | None = None) -> Outcome:
    return train(options, folder, console=console or quiet())


def go_on(folder: Path, console: Console | None = None, **options) -> Outcome:
    return resume(folder, console=console or quiet(), **options)


def numbers(folder: Path) -> dict[str, pl.DataFrame]:
    """{file name: table} of everything that was measured, apart from the time it took."""
    return {path.name: pl.read_parquet(path).drop("seconds", strict=False) for path in folder.glob("*.parquet")}


def same(one: Path, other: Path) -> bool:
    """Whether two runs measured the same, in everything."""
    here, there = numbers(one), numbers(other)
    return here.keys() == there.keys() and all(here[name].equals(there[name]) for name in here)
