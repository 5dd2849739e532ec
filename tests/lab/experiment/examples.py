"""Small real experiments; functions of a module, so that worker processes can import them."""

import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl
from rich.console import Console

import falign
from falign.lab.data import DataError
from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Paper, Setting, Task, grid
from falign.lab.experiment._local import local_executor
from falign.lab.experiment._reproduce import reproduce
from falign.lab.experiment._selection import Selection
from falign.lab.experiment._store import Store


def note(kind: str, tasks: Sequence[Task]) -> None:
    """Add a line a run to the file that FALIGN_TEST_NOTES names, whole even if several processes do so."""
    path = os.environ.get("FALIGN_TEST_NOTES")
    if path:
        lines = "".join(f"{kind} {task.key} {os.getpid()}\n" for task in tasks)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, lines.encode())
        os.close(descriptor)


def notes(path: Path, kind: str) -> list[str]:
    """Keys of the runs that were noted, in order."""
    if not path.exists():
        return []
    return [line.split()[1] for line in path.read_text().splitlines() if line.split()[0] == kind]


def decay(task: Task) -> Outcome:
    """Steps of x ← (1 − rate) x from 1 + seed: the closed form is known, and it diverges beyond rate 2."""
    x, values = 1.0 + task.seed, []
    for step in range(int(task.point["steps"])):
        x *= 1.0 - float(task.point["rate"])
        if abs(x) > 1e6:
            return Outcome(records={"step": list(range(step)), "x": values}, diverged=f"|x| beyond 1e6 at step {step}")
        values.append(x)
    return Outcome(records={"step": list(range(len(values))), "x": values})


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    note("begun", tasks)
    time.sleep(float(os.environ.get("FALIGN_TEST_PAUSE", "0")) * len(tasks))
    outcomes = [decay(task) for task in tasks]
    note("computed", tasks)
    return outcomes


def stubborn(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Never ends, and goes on whatever is raised in it."""
    note("begun", tasks)
    while True:
        try:
            time.sleep(100)
        except BaseException:
            note("stubborn", tasks)


def slowly(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Takes long enough to tell how far it is, from a worker as well."""
    for share in (0.25, 0.5):
        time.sleep(0.6)
        setting.report(share)
    time.sleep(0.6)
    return run(tasks, setting)


def fails_at_three(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    note("begun", tasks)
    if any(task.seed == 3 for task in tasks):
        raise ZeroDivisionError("seed three")
    return [decay(task) for task in tasks]


def wants_data(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    note("begun", tasks)
    raise DataError("mnist is not in nowhere: put it there")


def dies_at_one(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    note("begun", tasks)
    if any(task.seed == 1 for task in tasks):
        os._exit(7)
    return [decay(task) for task in tasks]


def not_finite_at_three(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    values = {task.seed: math.nan if task.seed == 3 else 1.0 for task in tasks}
    return [Outcome(records={"x": [0.0, values[task.seed]]}) for task in tasks]


def too_few(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    return [decay(task) for task in tasks][:-1]


def read_steps(table: pl.DataFrame) -> Evidence:
    rows = table.filter(pl.col("step") == 0)
    error = (rows["x"] - (1 + rows["seed"]) * (1 - rows["rate"])).abs().max()
    return Evidence(checks=(Check(label="first step", measured=float(error), high=1e-12),))  # pyright: ignore


def read_impossible(table: pl.DataFrame) -> Evidence:
    return Evidence(checks=(Check(label="x", measured=float(table.height), high=-1.0),))


CLAIM = Claim(
    name="first-step",
    statement="The first step is as written.",
    reference="here",
    method="largest error",
    tolerance_reason="rounding",
    read=read_steps,
)
WRONG = replace(CLAIM, name="impossible", statement="A count is negative.", read=read_impossible)


def experiment(
    function: Callable = run,
    *,
    name: str = "toy.decay",
    rates: Sequence[float] = (0.1, 0.5),
    seeds: int = 5,
    steps: int = 4,
    **options,
) -> Experiment:
    """Runs at every rate with every seed, the same at all presets."""
    points = grid(rate=rates, steps=steps)
    presets = ("smoke", "quick", "paper")
    fixed = {"together": ("rate",), "claims": (CLAIM,), "revision": 1}
    return Experiment(
        name=name,
        title="geometric decay",
        source="a toy",
        grid=dict.fromkeys(presets, points),
        seeds=dict.fromkeys(presets, seeds),
        run=function,
        **{**fixed, **options},
    )


def paper(*experiments: Experiment) -> Paper:
    """A paper of these experiments."""
    return Paper(
        name="toy",
        title="Toys",
        authors="Nobody",
        venue="nowhere",
        address="https://example.org",
        experiments=experiments,
    )


def report(out: Path, papers: Sequence) -> tuple[Path, list[Path]]:
    """Stands in for the report, which is tested elsewhere."""
    index, page = out / "report.html", out / "page.html"
    page.write_text("<p>report</p>")
    index.write_text(json.dumps([result.experiment.name for each in papers for result in each.results]))
    return index, [page]


def do(selected: Experiment, out: Path, workers: int = 1, **options) -> tuple[int, str]:
    """Reproduce an experiment; the exit code and what was printed where there is no terminal."""
    printed = io.StringIO()
    code = reproduce(
        Selection(papers=(paper(selected),), experiments=(selected,)),
        "smoke",
        out=out,
        **{
            "executor": local_executor(workers, Setting()),
            "memory": 2**30,
            "write_report": report,
            "console": Console(file=printed),
            **options,
        },
    )
    return code, printed.getvalue()


def table(selected: Experiment, out: Path) -> pl.DataFrame:
    """What a store holds of an experiment."""
    return Store(folder=out).results(selected, "smoke").table


def module_path() -> str:
    """``PYTHONPATH`` for a process that imports this module, and falign from where it was imported here."""
    return os.pathsep.join([str(Path(__file__).parent), str(Path(falign.__file__).parents[1])])


@contextmanager
def started(*positional, **options) -> Iterator[subprocess.Popen]:
    """The same as :func:`start`, but killed if the test goes wrong."""
    process = start(*positional, **options)
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def start(
    out: Path, notes_path: Path, *, workers: int = 1, pause: float = 0.0, run: str = "run", **options
) -> subprocess.Popen:
    """Reproduce :func:`experiment` in a process of its own, and in a session of its own."""
    code = (
        "import sys; from pathlib import Path; import examples as e;"
        f"code, said = e.do(e.experiment(e.{run}, **{options!r}), Path({str(out)!r}), {workers});"
        "print(said); sys.exit(code)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": module_path(),
        "FALIGN_TEST_NOTES": str(notes_path),
        "FALIGN_TEST_PAUSE": str(pause),
    }
    environment.pop("FALIGN_TYPECHECK", None)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
