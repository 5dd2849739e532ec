"""``falign train`` is killed, stopped or refused the disk at any moment: nothing is lost.

Every case ends with the numbers, to the bit, of a run that nothing befell. The normal suite takes a sample of the
moments, ``make test-slow`` every one.
"""

import errno
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kills import Ended, Fault, Nursery, Verdicts, names, sample, sentence
from safetensors.torch import load_file
from training_runs import same

from falign.lab._run_folder import RunFolder

if sys.platform != "linux":
    pytest.skip("what befalls the processes is of Linux", allow_module_level=True)
pytestmark = pytest.mark.xdist_group("kills")
EVERY = pytest.param(None, marks=pytest.mark.slow, id="every")
"""All the moments, and not a sample of so many."""

TRAIN = [
    *("train", "digits", "--model", "mlp:64-16-10", "--rule", "brsf", "--optimizer", "adam"),
    *("--epochs", "3", "--batch-size", "72", "--measure-every", "7"),
]
STEPS = 20
"""Of an epoch."""


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What goes on with the run; the tables, which tell the time that they took, are compared as such."""
    return {name: tensor for name, tensor in load_file(checkpoint).items() if not name.startswith("table.")}


@dataclass(frozen=True)
class Training:
    """A training to which nothing happened."""

    folder: Path
    ended: Ended

    def moments(self, *, writes: bool = True) -> list[int]:
        """Numbers of its file operations."""
        return [n for n, each in enumerate(self.ended.operations, 1) if each.writes or not writes]

    def last(self) -> int:
        """The number of the operation that puts the last file in its place."""
        return max(n for n, each in enumerate(self.ended.operations, 1) if each.event == "os.rename")

    def differs(self, folder: Path, *, pictures: bool = False) -> list[str]:
        """What is other in a run folder."""
        wrong = []
        if not same(folder, self.folder):
            wrong.append("its tables are different")
        if folder.joinpath("status.json").exists() and RunFolder(folder).read_status()["status"] != "done":
            wrong.append(f"its status is {RunFolder(folder).read_status()['status']}")
        here, there = ([path.name for path in RunFolder(each).checkpoints()] for each in (folder, self.folder))
        if here[-1:] != there[-1:]:
            return [*wrong, f"its checkpoints are {here}"]
        ours, theirs = (_tensors(each / there[-1]) for each in (folder, self.folder))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            wrong.append("its weights are different")
        other = (names(folder) ^ names(self.folder)) - {*here[:-1], *there[:-1]}  # an interrupted one has others
        if other := sorted(name for name in other if pictures or not name.endswith(".png")):
            wrong.append(f"other files are there: {other}")
        return wrong


@pytest.fixture(scope="module")
def training(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("reference") / "run"
    ended = nursery.run([*TRAIN, "--out", folder], watched=folder)
    assert (ended.code, ended.err) == (0, ""), ended
    assert len(ended.operations) > 50
    return Training(folder, ended)


@pytest.fixture(scope="module")
def drawn(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The same, with its pictures."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    ended = nursery.run([*TRAIN, "--out", folder], watched=folder, pictures=True)
    assert (ended.code, ended.err) == (0, ""), ended
    assert len(list(folder.glob("*.png"))) >= 4
    return Training(folder, ended)


def reported(said: str) -> int:
    """The last step that a training has reported as saved: an epoch's line comes when the one before it is saved."""
    if found := re.search(r"(?:interrupted|done) after step (\d+)", said):
        return int(found[1])
    epochs = [int(number) for number in re.findall(r"^epoch +(\d+)/", said, re.MULTILINE)]
    resumed = [int(number) for number in re.findall(r"going on after step (\d+)", said)]
    return max([0, *resumed, *((number - 1) * STEPS for number in epochs)])


def goes_on(nursery: Nursery, training: Training, folder: Path, said: str, *, pictures: bool = False) -> list[str]:
    """Resume a training to which something happened, or begin it anew where nothing was saved, and compare."""
    saved = reported(said)
    ended = nursery.run(["train", "--resume", folder], watched=folder, pictures=pictures)
    if ended.code == 2:
        if saved:
            return [f"step {saved} was saved, but it does not go on: {ended.says}"]
        if wrong := sentence(ended, str(folder)):
            return wrong
        words = [*TRAIN, "--out", folder, *(["--force"] if "--force" in ended.err or RunFolder(folder).exists else [])]
        ended = nursery.run(words, watched=folder, pictures=pictures)
    elif (began := reported(ended.out.partition("\nepoch")[0])) < min(saved, 2 * STEPS):
        return [f"step {saved} was saved, but it goes on from step {began}"]
    if ended.code != 0:
        return [f"exit code {ended.code}: {ended.says}"]
    return training.differs(folder, pictures=pictures)


def befalls(
    nursery: Nursery, training: Training, folder: Path, fault: Fault, *, pictures: bool = False
) -> tuple[Ended, list[str]]:
    """A training to which something happens, and what is wrong after it has gone on."""
    ended = nursery.run([*TRAIN, "--out", folder], watched=folder, fault=fault, pictures=pictures)
    return ended, goes_on(nursery, training, folder, ended.out, pictures=pictures)


@pytest.mark.parametrize("count", [3, EVERY])
def test_a_training_killed_at_a_file_operation(
    count: int | None, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    for at in sample(training.moments(), count):
        fault = Fault(kind="signal", number=signal.SIGKILL, at=at)
        ended, wrong = befalls(nursery, training, tmp_path / str(at), fault)
        verdicts.add(fault, [*wrong, *([] if ended.code == -signal.SIGKILL else [f"exit code {ended.code}"])])


@pytest.mark.parametrize("count", [EVERY])
def test_a_training_killed_while_it_draws(
    count: int | None, nursery: Nursery, drawn: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    pictures = [n for n, each in enumerate(drawn.ended.operations, 1) if each.path.endswith(".png")]
    for at in sample(pictures[6:], count):
        fault = Fault(kind="signal", number=signal.SIGKILL, at=at)
        verdicts.add(fault, befalls(nursery, drawn, tmp_path / str(at), fault, pictures=True)[1])


@pytest.mark.parametrize("count", [1, EVERY])
def test_a_training_killed_in_the_midst_of_a_file(
    count: int | None, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    opens = [n for n, each in enumerate(training.ended.operations, 1) if each.event == "open" and each.writes]
    for at in sample(opens, count):
        fault = Fault(kind="torn", at=at, size=random.Random(at).choice((1, 50, 500, 2000)))
        ended, wrong = befalls(nursery, training, tmp_path / str(at), fault)
        verdicts.add(fault, [*wrong, *([] if ended.code < 0 else [f"exit code {ended.code}"])])


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_training_killed_at_a_random_moment(
    count: int, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    """Now and then its resumption is killed too."""
    moments = random.Random(count)
    for case in range(count):
        folder = tmp_path / str(case)
        said = ""
        for words in ([*TRAIN, "--out", folder], ["train", "--resume", folder])[: 1 + case % 2]:
            child = nursery.start(words, watched=folder)
            child.ends(moments.uniform(0, training.ended.seconds))
            child.send(signal.SIGKILL)
            ended = child.wait()
            said = max(said, ended.out, key=reported)
        verdicts.add(f"case {case}", goes_on(nursery, training, folder, said))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT], ids=lambda s: s.name)
@pytest.mark.parametrize("count", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_a_training_is_told_to_end_at_a_file_operation(
    count: int | None, number: signal.Signals, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    """Within the training it is saved and said; before and after it the process ends like any other."""
    renamed = [n for n, each in enumerate(training.ended.operations, 1) if each.event == "os.rename"]
    for at in sample(training.moments(), count, seed=number):
        fault = Fault(kind="signal", number=number, at=at)
        folder = tmp_path / str(at)
        ended, wrong = befalls(nursery, training, folder, fault)
        if "Traceback" in ended.err:
            wrong.append(f"a traceback: {ended.says}")
        if ended.code not in (0, 128 + number, -number):
            wrong.append(f"exit code {ended.code}, {ended.says!r}")
        graceful = number != signal.SIGQUIT and renamed[0] < at and "epoch 3/3" not in ended.out
        if graceful and (ended.code != 128 + number or "interrupted after step" not in ended.err):
            wrong.append(f"not saved, exit code {ended.code}, {ended.says!r}")
        verdicts.add(fault, wrong)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.parametrize("count", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_training_is_told_to_end_at_a_random_moment(
    count: int, number: signal.Signals, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    moments = random.Random(number)
    for case in range(count):
        folder = tmp_path / str(case)
        child = nursery.start([*TRAIN, "--out", folder], watched=folder)
        at = moments.uniform(0, training.ended.seconds)
        child.ends(at)
        child.send(number)
        if case % 5 == 4:  # impatient
            child.ends(moments.uniform(0, 0.02))
            child.send(number)
        ended = child.wait()
        wrong = goes_on(nursery, training, folder, ended.out + ended.err)
        if "Traceback" in ended.err:
            wrong.append(f"a traceback: {ended.says}")
        if ended.code not in (0, 128 + number, -number):
            wrong.append(f"exit code {ended.code}, {ended.says!r}")
        elif ended.code == 0 and "done after step" not in ended.out:
            wrong.append(f"exit code {ended.code}, but it says {ended.out[-200:]!r} {ended.says!r}")
        verdicts.add(f"{number.name} after {at:.2f} s", wrong)


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_is_stopped_and_continued(
    count: int, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    moments = random.Random(count)
    for case in range(count):
        folder = tmp_path / str(case)
        child = nursery.start([*TRAIN, "--out", folder], watched=folder)
        for _ in range(3):
            child.ends(moments.uniform(0, training.ended.seconds / 3))
            child.send(signal.SIGSTOP)
            time.sleep(moments.uniform(0, 0.1))
            child.send(signal.SIGCONT)
        ended = child.wait()
        verdicts.add(case, training.differs(folder) if ended.code == 0 else [f"exit code {ended.code}: {ended.says}"])


@pytest.mark.parametrize("size", [0, 1, 700])
@pytest.mark.parametrize("count", [1, EVERY])
def test_the_disk_is_full_from_an_operation_on(
    count: int | None, size: int, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    makes = [
        n for n, each in enumerate(training.ended.operations, 1) if each.event in ("open", "os.mkdir") and each.writes
    ]
    for at in sample(makes, count, seed=size):
        fault = Fault(kind="full", at=at, size=size)
        folder = tmp_path / str(at)
        ended, wrong = befalls(nursery, training, folder, fault)
        wrong += sentence(ended, str(folder))
        if ended.code not in (1, 2) or (ended.code == 2 and reported(ended.out)):
            wrong.append(f"exit code {ended.code}")
        verdicts.add(fault, wrong)


@pytest.mark.parametrize("count", [2, EVERY])
def test_an_operation_of_a_training_fails(
    count: int | None, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    """Once: it is said, or it does not matter."""
    numbers = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)
    for at in sample(training.moments(writes=False), count):
        fault = Fault(kind="error", at=at, number=numbers[at % len(numbers)])
        folder = tmp_path / str(at)
        ended, wrong = befalls(nursery, training, folder, fault)
        if ended.code:
            wrong += sentence(ended, str(folder))
        if ended.code not in (0, 1, 2):
            wrong.append(f"exit code {ended.code}: {ended.says}")
        verdicts.add(fault, wrong)


@pytest.mark.parametrize("kind", ["gone", "emptied"])
@pytest.mark.parametrize("count", [1, EVERY])
def test_the_folder_of_a_training_disappears(
    count: int | None, kind: str, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    """It is never done without its files; what is lost is said, and it can begin anew in the same place."""
    begun = next(n for n, each in enumerate(training.ended.operations, 1) if each.event == "os.rename")
    for at in sample([n for n in training.moments() if begun < n <= training.last()], count):
        fault = Fault(kind=kind, at=at)  # pyright: ignore
        folder = tmp_path / str(at)
        ended = nursery.run([*TRAIN, "--out", folder], watched=folder, fault=fault)
        wrong = []
        if ended.code == 0:
            wrong = (
                [f"done, but {each}" for each in training.differs(folder)]
                if folder.exists()
                else ["done without files"]
            )
        else:
            wrong = sentence(ended, str(folder))
            if ended.code != 1:
                wrong.append(f"exit code {ended.code}: {ended.says}")
        words = [*TRAIN, "--out", folder, "--force"]
        again = nursery.run(words, watched=folder)
        wrong += training.differs(folder) if again.code == 0 else [f"again: exit code {again.code}: {again.says}"]
        verdicts.add(fault, wrong)


@pytest.mark.parametrize(
    ("processes", "count"), [(3, 1), *(pytest.param(n, 10, marks=pytest.mark.slow) for n in (2, 8))]
)
def test_several_trainings_into_one_folder(
    count: int, processes: int, nursery: Nursery, training: Training, tmp_path: Path, verdicts: Verdicts
) -> None:
    """One of them trains, and the others are refused; so it is where they go on with a run, or replace it."""
    for case in range(count):
        folder = tmp_path / str(case)
        for words in ([*TRAIN, "--out", folder], ["train", "--resume", folder], [*TRAIN, "--out", folder, "--force"]):
            if "--resume" in words:
                shutil.rmtree(folder)
                fault = Fault(kind="signal", number=signal.SIGKILL, at=training.last() // 2)
                nursery.run([*TRAIN, "--out", folder], watched=folder, fault=fault)
            children = [nursery.start(words, watched=folder) for _ in range(processes)]
            ended = [child.wait() for child in children]
            trained = [each for each in ended if each.code == 0]
            wrong = [each for one in ended if one.code for each in sentence(one, str(folder))]
            wrong += [f"exit code {one.code}: {one.says}" for one in ended if one.code not in (0, 2)]
            if not trained:
                wrong.append("none has trained")
            mixed = [one for one in trained if "done after step" not in one.out and "has done its" not in one.out]
            wrong += [f"exit code 0: {one.out!r}" for one in mixed]
            verdicts.add(words[-1], wrong + training.differs(folder))
