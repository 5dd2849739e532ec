"""``falign reproduce`` and ``falign report`` are killed, stopped or refused the disk: nothing is lost.

The normal suite takes a sample of the moments, ``make test-slow`` every one.
"""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from kills import Ended, Fault, Nursery, Verdicts, names, sample, sentence

from falign.lab.experiment import Experiment
from falign.lab.experiment._results import Results
from falign.lab.experiment._store import Store
from falign.papers import PAPERS

if sys.platform != "linux":
    pytest.skip("what befalls the processes is of Linux", allow_module_level=True)
pytestmark = pytest.mark.xdist_group("kills")
EVERY = pytest.param(None, marks=pytest.mark.slow, id="every")
"""All the moments, and not a sample of so many."""


def many(count: int) -> object:
    return pytest.param(count, marks=pytest.mark.slow)


# Reproducing

EXPERIMENTS: tuple[Experiment, ...] = tuple(
    next(each for each in PAPERS["girotti2021"].experiments if each.name == f"girotti2021.{name}")
    for name in ("chart", "anti-regularisation")
)
WORDS = ["reproduce", *(each.name for each in EXPERIMENTS), "--preset", "smoke"]


def read(folder: Path) -> list[Results]:
    """What a store holds; that it has to say something of it is an error."""
    said: list[str] = []
    found = [Store(folder=folder, repairs=False, log=said.append).results(each, "smoke") for each in EXPERIMENTS]
    assert not said, said
    return found


def kept(folder: Path) -> dict[str, tuple[int, int]]:
    """{a run that is there: what would be other if it were written again}."""
    store = Store(folder=folder, repairs=False, log=lambda _: None)
    files = {}
    for tasks in (each.tasks("smoke") for each in EXPERIMENTS):
        there = store.get_all(tasks)
        files |= {task.key: store.path(task).stat() for task in tasks if task.key in there}
    return {key: (found.st_ino, found.st_mtime_ns) for key, found in files.items()}


FILES = ("report/girotti2021.html", "report/girotti2021.json", "report.html")
"""The page, its numbers, and the index of all pages."""


def whole(folder: Path) -> list[str]:
    """What is wrong with the page, its numbers and the index."""
    wrong = []
    for path in (folder / name for name in FILES):
        if not path.exists():
            wrong.append(f"{path.name} is not there")
        elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
            wrong.append(f"{path.name} is cut off")
        elif path.suffix == ".json":
            json.loads(path.read_text())
    return wrong


def difference(one: Results, other: Results) -> float:
    """The largest difference of two numbers, relative to the largest of their column in their run."""
    if one.table.schema != other.table.schema or one.table.height != other.table.height:
        return math.inf
    axes = [name for name in one.runs.columns if name not in ("key", "status", "message", "seconds")]
    pairs = (each.table.partition_by(axes, maintain_order=True) for each in (one, other))
    return max(_largest(ours, theirs) for ours, theirs in zip(*pairs, strict=True))


def _largest(one: pl.DataFrame, other: pl.DataFrame) -> float:
    found = 0.0
    for ours, theirs in zip(one.iter_columns(), other.iter_columns(), strict=True):
        if ours.equals(theirs, null_equal=True):
            continue
        if not ours.dtype.is_float() or not ours.is_null().equals(theirs.is_null()):
            return math.inf
        scale = max(float(ours.abs().max()), 1e-6)  # pyright: ignore  # below, all is what rounding left
        found = max(found, float((ours - theirs).abs().max()) / scale)  # pyright: ignore
    return found


def strays(folder: Path) -> list[str]:
    return [f"{name} is left" for name in sorted(names(folder)) if ".partial-" in name or "corrupt" in name]


@dataclass(frozen=True)
class Reproduction:
    """A store to which nothing happened."""

    folder: Path
    ended: Ended

    def moments(self, *, writes: bool = True) -> list[int]:
        """Numbers of its file operations."""
        return [n for n, each in enumerate(self.ended.operations, 1) if each.writes or not writes]

    def last(self) -> int:
        """The number of the operation that puts the last file in its place."""
        return max(n for n, each in enumerate(self.ended.operations, 1) if each.event == "os.rename")

    def differs(self, folder: Path) -> list[str]:
        """What is other in a store."""
        wrong = [*whole(folder), *strays(folder)]
        for one, other in zip(read(folder), read(self.folder), strict=True):
            if one.count("done") != one.runs.height:
                wrong.append(f"{one.experiment.name}: {one.count('done')} of {one.runs.height} runs are done")
            elif (far := difference(one, other)) > getattr(one.experiment, "agreement", 0.0):
                wrong.append(f"{one.experiment.name}: numbers that differ by {far:.2g} of the largest")
        return wrong


@pytest.fixture(scope="module")
def reproduction(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    folder = tmp_path_factory.mktemp("reference") / "results"
    ended = nursery.run([*WORDS, "--out", folder], watched=folder)
    assert (ended.code, ended.err) == (0, ""), ended
    assert len(ended.operations) > 100
    return Reproduction(folder, ended)


def told(said: str) -> int:
    """How many runs were said to be there."""
    found = re.findall(r"^(\S+): (\d+) of \d+ runs there", said, re.MULTILINE)
    return sum({name: int(number) for name, number in found}.values())


def goes_on(nursery: Nursery, reproduction: Reproduction, folder: Path, said: str = "") -> list[str]:
    """Reproduce once more after something has happened, and compare."""
    before = kept(folder) if folder.exists() else {}
    for path in folder.rglob(".*.partial-*"):
        os.utime(path, (0, 0))  # as if it were long ago: what is young in the root may be of a page in the writing
    if len(before) < told(said):
        return [f"{told(said)} runs were said to be there, but {len(before)} are"]
    ended = nursery.run([*WORDS, "--out", folder], watched=folder)
    if ended.code != 0:
        return [f"again: exit code {ended.code}: {ended.says}"]
    after = kept(folder)
    again = [key for key, found in before.items() if after.get(key) != found]
    return [*([f"{len(again)} runs were computed again"] if again else []), *reproduction.differs(folder)]


def befalls(nursery: Nursery, reproduction: Reproduction, folder: Path, fault: Fault) -> tuple[Ended, list[str]]:
    ended = nursery.run([*WORDS, "--out", folder], watched=folder, fault=fault)
    return ended, goes_on(nursery, reproduction, folder, ended.out)


@pytest.mark.parametrize("count", [1, EVERY])
def test_a_reproduction_killed_at_a_file_operation(
    count: int | None, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    for at in sample(reproduction.moments(), count):
        fault = Fault(kind="signal", number=signal.SIGKILL, at=at)
        ended, wrong = befalls(nursery, reproduction, tmp_path / str(at), fault)
        verdicts.add(fault, [*wrong, *([] if ended.code == -signal.SIGKILL else [f"exit code {ended.code}"])])


@pytest.mark.parametrize("count", [1, EVERY])
def test_a_reproduction_killed_in_the_midst_of_a_file(
    count: int | None, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    opens = [n for n, each in enumerate(reproduction.ended.operations, 1) if ".partial-" in each.path]
    for at in sample([n for n in opens if reproduction.ended.operations[n - 1].event == "open"], count):
        fault = Fault(kind="torn", at=at, size=random.Random(at).choice((1, 50, 500, 2000)))
        ended, wrong = befalls(nursery, reproduction, tmp_path / str(at), fault)
        verdicts.add(fault, [*wrong, *([] if ended.code < 0 else [f"exit code {ended.code}"])])


@pytest.mark.parametrize(
    ("number", "count"),
    [
        *((number, 1) for number in (signal.SIGKILL, signal.SIGTERM)),
        *(
            pytest.param(number, 30, marks=pytest.mark.slow)
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
        ),
    ],
)
def test_a_reproduction_is_told_to_end_at_a_random_moment(
    count: int, number: signal.Signals, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    moments = random.Random(number)
    for case in range(count):
        folder = tmp_path / str(case)
        child = nursery.start([*WORDS, "--out", folder], watched=folder)
        child.ends(at := moments.uniform(0, reproduction.ended.seconds))
        child.send(number)
        ended = child.wait()
        wrong = goes_on(nursery, reproduction, folder, ended.out)
        if "Traceback" in ended.err:
            wrong.append(f"a traceback: {ended.says}")
        if ended.code not in (0, 130, 128 + number, -number):
            wrong.append(f"exit code {ended.code}: {ended.says}")
        if ended.code == 0 and "the page is" not in ended.out:
            wrong.append("exit code 0, but it has not come to its end")
        verdicts.add(f"{number.name} after {at:.2f} s", wrong)


@pytest.mark.parametrize("count", [1, many(10)])
def test_a_reproduction_is_stopped_and_continued(
    count: int, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    moments = random.Random(count)
    for case in range(count):
        folder = tmp_path / str(case)
        child = nursery.start([*WORDS, "--out", folder], watched=folder)
        for _ in range(3):
            child.ends(moments.uniform(0, reproduction.ended.seconds / 3))
            child.send(signal.SIGSTOP)
            time.sleep(moments.uniform(0, 0.1))
            child.send(signal.SIGCONT)
        ended = child.wait()
        wrong = reproduction.differs(folder) if ended.code == 0 else [f"exit code {ended.code}: {ended.says}"]
        verdicts.add(case, wrong)


@pytest.mark.parametrize(
    ("size", "count"), [(700, 1), *((pytest.param(n, 25, marks=pytest.mark.slow)) for n in (0, 1, 700))]
)
def test_the_disk_of_a_reproduction_is_full_from_an_operation_on(
    count: int, size: int, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    makes = [n for n, each in enumerate(reproduction.ended.operations, 1) if ".partial-" in each.path]
    for at in sample([n for n in makes if reproduction.ended.operations[n - 1].event == "open"], count, seed=size):
        fault = Fault(kind="full", at=at, size=size)
        folder = tmp_path / str(at)
        ended, wrong = befalls(nursery, reproduction, folder, fault)
        wrong += sentence(ended, str(folder))
        if ended.code not in (1, 2):
            wrong.append(f"exit code {ended.code}: {ended.says}")
        verdicts.add(fault, wrong)


@pytest.mark.parametrize("count", [1, EVERY])
def test_an_operation_of_a_reproduction_fails(
    count: int | None, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    numbers = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)
    for at in sample(reproduction.moments(writes=False), count):
        fault = Fault(kind="error", at=at, number=numbers[at % len(numbers)])
        folder = tmp_path / str(at)
        ended, wrong = befalls(nursery, reproduction, folder, fault)
        if ended.code:
            wrong += sentence(ended, str(folder))
        if ended.code not in (0, 1, 2):
            wrong.append(f"exit code {ended.code}: {ended.says}")
        verdicts.add(fault, [f"{reproduction.ended.operations[at - 1]}: {each}" for each in wrong])


@pytest.mark.parametrize("kind", ["gone", "emptied"])
@pytest.mark.parametrize("count", [1, EVERY])
def test_the_folder_of_a_reproduction_disappears(
    count: int | None, kind: str, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    """It never says that runs are there which are not, and it can be called again."""
    moments = [n for n in reproduction.moments() if n <= reproduction.last()]
    for at in sample(moments, count, seed=len(kind)):
        fault = Fault(kind=kind, at=at)  # pyright: ignore
        folder = tmp_path / str(at)
        ended = nursery.run([*WORDS, "--out", folder], watched=folder, fault=fault)
        if ended.code == 0:
            wrong = ["done, but there is no folder"]
            if folder.exists():
                wrong = [f"done, but {each}" for each in reproduction.differs(folder)]
        else:
            wrong = sentence(ended, str(folder))
            if ended.code not in (1, 2):
                wrong.append(f"exit code {ended.code}: {ended.says}")
        if folder.exists() and (folder / "falign.json").exists():
            wrong += [f"after it: {each}" for each in goes_on(nursery, reproduction, folder)]
        verdicts.add(fault, [f"{reproduction.ended.operations[at - 1].path}: {each}" for each in wrong])


def written(ended: Ended) -> list[str]:
    """The runs that a process has put into the store."""
    renamed = (each.path for each in ended.operations if each.event == "os.rename")
    return [path for path in renamed if path.endswith(".parquet") and path.startswith("girotti2021.")]


@pytest.mark.parametrize(
    ("processes", "count"), [(3, 1), *(pytest.param(n, 6, marks=pytest.mark.slow) for n in (2, 8))]
)
def test_several_reproductions_in_one_store(
    count: int, processes: int, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    """All end well, and every run is computed once; in every second case one of them is killed."""
    moments = random.Random(processes)
    for case in range(count):
        folder = tmp_path / str(case)
        children = [nursery.start([*WORDS, "--out", folder], watched=folder) for _ in range(processes)]
        if case % 2:
            children[0].ends(moments.uniform(0, reproduction.ended.seconds))
            children[0].send(signal.SIGKILL)
        ended = [child.wait(120) for child in children]
        wrong = [f"exit code {one.code}: {one.says}" for one in ended[case % 2 :] if one.code]
        twice = [path for path, times in Counter(path for one in ended for path in written(one)).items() if times > 1]
        if twice and not case % 2:
            wrong.append(f"computed more than once: {twice}")
        verdicts.add(case, wrong + reproduction.differs(folder))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_workers_end_with_the_process_that_started_them(
    number: signal.Signals, nursery: Nursery, reproduction: Reproduction, tmp_path: Path, verdicts: Verdicts
) -> None:
    moments = random.Random(number)
    for case in range(5):
        folder = tmp_path / str(case)
        child = nursery.start([*WORDS, "--workers", "2", "--out", folder], watched=folder)
        until(lambda child=child: len(child.family()) > 2)
        child.ends(moments.uniform(0, 8))
        child.send(number)
        said = child.wait(180).out
        wrong = [] if until(lambda child=child: not child.family()) else [f"{len(child.family())} are left"]
        verdicts.add(f"{number.name} {case}", wrong + goes_on(nursery, reproduction, folder, said))


def until(condition, seconds: float = 20.0) -> bool:
    """Wait for a condition; whether it came about."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met


# The page


@pytest.fixture(scope="module")
def half_a_store(nursery: Nursery, reproduction: Reproduction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose page was written when not all runs were there."""
    folder = tmp_path_factory.mktemp("reference") / "results"
    first = EXPERIMENTS[0].name
    ended = nursery.run(["reproduce", first, "--preset", "smoke", "--out", folder], watched=folder)
    assert ended.code == 0, ended
    second = EXPERIMENTS[1].name
    shutil.copytree(reproduction.folder / second, folder / second)
    return folder


@pytest.fixture(scope="module")
def page(nursery: Nursery, half_a_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    """The page written anew."""
    folder = tmp_path_factory.mktemp("reference") / "results"
    shutil.copytree(half_a_store, folder)
    ended = nursery.run([*REPORT, "--out", folder], watched=folder)
    assert (ended.code, ended.err) == (0, ""), ended
    return Reproduction(folder, ended)


REPORT = ["report", "girotti2021", "--preset", "smoke"]


def said_in(folder: Path) -> tuple[str, ...]:
    """What page, numbers and index say, but for when they were written."""
    written = re.compile(r"<time.*?</time>|\"written\": \"[^\"]*\"")
    return tuple(written.sub("", (folder / name).read_text()) for name in FILES)


def is_one_of(folder: Path, *others: Path) -> list[str]:
    """What is wrong, if page, numbers and index are not each those of one of the other folders."""
    if wrong := whole(folder):
        return wrong
    came, expected = said_in(folder), [said_in(each) for each in others]
    wrong = zip(FILES, came, zip(*expected, strict=True), strict=True)
    return [f"{name} is another one" for name, one, known in wrong if one not in known]


@pytest.mark.parametrize("count", [1, EVERY])
@pytest.mark.parametrize("kind", ["kill", "torn", "error", "full"])
def test_a_page_killed_at_a_file_operation(
    count: int | None,
    kind: str,
    nursery: Nursery,
    page: Reproduction,
    half_a_store: Path,
    tmp_path: Path,
    verdicts: Verdicts,
) -> None:
    """There is always a page, the old one or the new one."""
    for at in sample(page.moments(writes=kind != "error"), count, seed=len(kind)):
        fault = {
            "kill": Fault(kind="signal", number=signal.SIGKILL, at=at),
            "torn": Fault(kind="torn", size=3000, at=at),
            "error": Fault(kind="error", number=(errno.EIO, errno.ENOSPC, errno.EACCES)[at % 3], at=at),
            "full": Fault(kind="full", size=(0, 700)[at % 2], at=at),
        }[kind]
        folder = tmp_path / str(at)
        shutil.copytree(half_a_store, folder)
        ended = nursery.run([*REPORT, "--out", folder], watched=folder, fault=fault)
        wrong = is_one_of(folder, half_a_store, page.folder)
        if ended.code > 0:
            wrong += sentence(ended, str(folder))
        verdicts.add(fault, wrong + writes_again(nursery, page, folder))


@pytest.mark.parametrize("count", [1, many(50)])
def test_a_page_killed_at_a_random_moment(
    count: int, nursery: Nursery, page: Reproduction, half_a_store: Path, tmp_path: Path, verdicts: Verdicts
) -> None:
    moments = random.Random(count)
    for case in range(count):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[case % 4]
        folder = tmp_path / str(case)
        shutil.copytree(half_a_store, folder)
        child = nursery.start([*REPORT, "--out", folder], watched=folder)
        child.ends(at := moments.uniform(0, page.ended.seconds))
        child.send(number)
        ended = child.wait()
        wrong = is_one_of(folder, half_a_store, page.folder)
        if "Traceback" in ended.err:
            wrong.append(f"a traceback: {ended.says}")
        verdicts.add(f"{number.name} after {at:.2f} s", wrong + writes_again(nursery, page, folder))


def writes_again(nursery: Nursery, page: Reproduction, folder: Path) -> list[str]:
    """What is wrong after the page was written once more."""
    ended = nursery.run([*REPORT, "--out", folder], watched=folder)
    if ended.code:
        return [f"again: exit code {ended.code}: {ended.says}"]
    return is_one_of(folder, page.folder)
