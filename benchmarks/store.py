"""A store of many runs: seconds and memory of `falign status`, the table of results, and `falign report`.

    python benchmarks/store.py [--runs 100000] [--folder FOLDER]

The store is written through its own writer, without waiting for the disk. Each command then runs in a process of its
own: cold, without an index, and warm, with the one that the command before has left. "imports" are PyTorch, polars,
Matplotlib and the papers; "command" is the rest; "processor" adds up both cores; peak memory is of the whole process.
"""

import argparse
import gc
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Paper, Picture, Setting, Task, grid

START = time.perf_counter() - time.process_time()
"""About when this process began: what was imported so far has kept it busy."""
STEPS, RATES, WIDTHS = 20, 20, 10
COMMANDS = ("status", "table", "report")
COLD = "cold"


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Noisy decay: four numbers at twenty steps."""
    return [decay(task) for task in tasks]


def decay(task: Task) -> Outcome:
    """One run."""
    noise = np.random.default_rng([task.seed, int(task.point["width"])]).standard_normal((4, STEPS)) / 100
    steps = np.arange(STEPS)
    curves = np.exp(-float(task.point["rate"]) * steps) + noise
    names = ("loss", "accuracy", "angle", "norm")
    return Outcome(records={"step": steps.tolist(), **dict(zip(names, curves.tolist(), strict=True))})


def begins_at_one(table: pl.DataFrame) -> Evidence:
    """The mean of the first step."""
    mean = float(table.filter(pl.col("step") == 0)["loss"].mean())  # pyright: ignore
    return Evidence(checks=(Check(label="loss", measured=mean, low=0.99, high=1.01),))


def falls(table: pl.DataFrame) -> Evidence:
    """How the mean falls at each rate."""
    means = table.group_by("rate", "step").agg(pl.col("loss").mean()).sort("rate", "step")
    last = means.filter(pl.col("step") == STEPS - 1)
    checks = [
        Check(label=f"rate {rate}", measured=loss, high=math.exp(-rate * (STEPS - 1)) + 0.01)
        for rate, loss in last.select("rate", "loss").rows()
    ]
    return Evidence(checks=tuple(checks))


def curves(table: pl.DataFrame) -> pl.DataFrame:
    """Mean curves."""
    return table.group_by("rate", "step").agg(pl.col("loss", "angle").mean()).sort("rate", "step")


def draw(data: pl.DataFrame):
    """Mean curves, one line a rate."""
    from falign.lab.report import style

    figure, (panel,) = style.panels(1, xlabels=["step"], ylabels=["loss"])
    for (rate,), line in data.group_by("rate", maintain_order=True):
        panel.plot(line["step"], line["loss"], label=f"{rate}")
    return figure


def claim(name: str, read, scope: pl.Expr | None = None) -> Claim:
    """A claim of the paper below."""
    return Claim(
        name=name, statement=name, reference="here", method="mean", tolerance_reason="noise", read=read, scope=scope
    )


def paper(runs: int) -> Paper:
    """A paper of one experiment with so many runs."""
    seeds = max(1, runs // (RATES * WIDTHS))
    points = grid(rate=[round(0.05 * (1 + i), 2) for i in range(RATES)], width=[2**i for i in range(WIDTHS)], rule="fa")
    experiment = Experiment(
        name="load.decay",
        title="Decay",
        source="benchmarks/store.py",
        revision=1,
        grid={"smoke": points[:1], "quick": points[:20], "paper": points},
        seeds={"smoke": 1, "quick": 1, "paper": seeds},
        run=run,
        together=("rate",),
        claims=(
            claim("begins", begins_at_one),
            claim("falls", falls),
            claim("wide", begins_at_one, pl.col("width") > 2 ** (WIDTHS // 2)),
        ),
        pictures=tuple(Picture(name=name, caption="Decay.", data=curves, draw=draw) for name in ("one", "two")),
    )
    about = {"title": "Load", "authors": "Nobody", "venue": "nowhere", "address": ""}
    return Paper(name="load", experiments=(experiment,), **about)


def put(folder: Path, runs: int, part: int, parts: int) -> None:
    """Write a part of the runs by the store's own writer."""
    from falign.lab._provenance import block_provenance
    from falign.lab.experiment._run_file import StoredRun, records_frame
    from falign.lab.experiment._store import Store

    os.fsync = lambda descriptor: None
    store, origin = Store(folder=folder), block_provenance("cpu")
    for task in paper(runs).experiments[0].tasks("paper")[part::parts]:
        provenance = {**origin, "started": "2026-01-01T00:00:00+00:00"}
        store.put(StoredRun.of(task, "done", seconds=0.01, provenance=provenance), records_frame(task, decay(task)))


def command(name: str, folder: Path, runs: int) -> None:
    """Do a command in this process, and print what it took."""
    from falign import papers
    from falign.cli import main
    from falign.lab.experiment._store import Store

    papers.PAPERS = {"load": paper(runs)}
    imported = time.perf_counter()
    if name == "table":
        gc.freeze()  # as the commands do
        experiment = papers.PAPERS["load"].experiments[0]
        results = Store(folder=folder, repairs=False).results(experiment, "paper")
        assert results.table.height == results.runs.height * STEPS
        assert results.count("done") == len(experiment.tasks("paper"))
    else:
        assert main([name, "--out", str(folder)]) == 0
    used = resource.getrusage(resource.RUSAGE_SELF)
    took = {"command": time.perf_counter() - imported, "imports": imported - START}
    print(json.dumps({**took, "processor": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024}))


def measured(name: str, folder: Path, runs: int) -> dict[str, float]:
    """What a command takes in a process of its own."""
    words = [sys.executable, __file__, "--runs", str(runs), "--folder", str(folder), "--command", name]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def benchmark(folder: Path, runs: int) -> None:
    """Build the store unless it is there, and print the table."""
    from falign.lab.experiment._store import Store

    Store(folder=folder).open(create=True)
    there = Store(folder=folder).counts(paper(runs).experiments)["paper"]
    if there < len(paper(runs).experiments[0].tasks("paper")):
        start, parts = time.perf_counter(), os.cpu_count() or 1
        with ProcessPoolExecutor(parts) as pool:
            list(pool.map(put, [folder] * parts, [runs] * parts, range(parts), [parts] * parts))
        print(f"written in {time.perf_counter() - start:.0f} s")
        time.sleep(3)  # so that no file has just changed
    print(f"| {runs} runs | index | command | imports | processor | peak memory |\n|---|---|---|---|---|---|")
    for name in COMMANDS:
        shutil.rmtree(folder / ".index", ignore_errors=True)
        for kind in (COLD, "warm"):
            took = measured(name, folder, runs)
            times = " | ".join(f"{took[part]:.1f} s" for part in ("command", "imports", "processor"))
            print(f"| {name} | {kind} | {times} | {took['peak']:.0f} MiB |", flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="a store that is kept; without it a folder that is deleted")
    parser.add_argument("--command", choices=COMMANDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command:
        command(arguments.command, arguments.folder, arguments.runs)
    elif arguments.folder:
        benchmark(arguments.folder, arguments.runs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            benchmark(Path(folder) / "store", arguments.runs)


if __name__ == "__main__":
    _main()
