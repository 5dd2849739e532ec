"""Runs that say nothing, what is read of them, and files of them as anyone could have written them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from safetensors.torch import load, save

from falign.lab import _files
from falign.lab._ending import TrainingOutcome
from falign.lab._train import resume, train
from falign.lab.config import TrainConfig


def quiet() -> Console:
    """A console whose words are kept, and not shown."""
    return Console(file=io.StringIO(), width=200)


def begin(options: TrainConfig, folder: Path, console: Console | None = None) -> TrainingOutcome:
    return train(options, folder, console=console or quiet())


def go_on(folder: Path, console: Console | None = None, **options) -> TrainingOutcome:
    return resume(folder, console=console or quiet(), **options)


def numbers(folder: Path) -> dict[str, pl.DataFrame]:
    """{file name: table} of everything that was measured, apart from the time it took."""
    return {path.name: pl.read_parquet(path).drop("seconds", strict=False) for path in folder.glob("*.parquet")}


def same(one: Path, other: Path) -> bool:
    """Whether two runs measured the same, in everything."""
    here, there = numbers(one), numbers(other)
    return here.keys() == there.keys() and all(here[name].equals(there[name]) for name in here)


def sealed_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file and seal it again."""
    content = _files.from_json(path.read_bytes())
    change(content)
    path.write_bytes(_files.sealed(json.dumps({"checksum": _files.BLANK, **content}).encode()))


def sealed_table(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Change a table and seal it again, as of the same run."""
    metadata = pl.read_parquet_metadata(path)
    content = io.BytesIO()
    change(pl.read_parquet(path)).write_parquet(content, metadata={"checksum": _files.BLANK, "run": metadata["run"]})
    path.write_bytes(_files.sealed(content.getvalue()))


def checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON and the tensors of a checkpoint."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["falign"]), load(content)


def sealed_checkpoint(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change a checkpoint and seal it again."""
    state, tensors = checkpoint(path)
    change(state, tensors)
    path.write_bytes(_files.sealed(save(tensors, {"checksum": _files.BLANK, "falign": json.dumps(state)})))
