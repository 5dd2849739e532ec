"""A command in processes that are killed, stopped or refused the disk at a chosen file operation.

Importing torch takes seconds, so one process imports everything once and is forked for each case (:class:`Nursery`).
In the fork an audit hook counts the operations on the files of one folder and brings about a :class:`Fault` before
the one with a given number; what comes after an operation is what comes before the next.
"""

import atexit
import errno
import gc
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if sys.platform != "win32":
    import fcntl
    import resource

PATIENCE = 60.0
"""Seconds after which a process counts as hanging."""
_PRELOADED = (
    *("falign.cli", "falign.papers", "falign.lab._train", "falign.lab._pictures", "falign.lab._compare"),
    *("falign.lab.report", "falign.lab.experiment._reproduce", "falign.lab.experiment._reproduce"),
    *("falign.lab.data._download", "torch._dynamo", "sklearn.datasets", "sklearn.model_selection"),
    *("polars._utils.parquet", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
    *("requests", "rich._emoji_codes", "PIL.PngImagePlugin"),
)
"""What the command imports when it is needed."""
_PATHS = {
    **dict.fromkeys(("open", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime"), 0),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 1),
    **dict.fromkeys(("fcntl.flock", "fcntl.lockf"), 0),
}
"""{audit event: which of its arguments is the path}."""
_DIRECTORIES = {"os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.rename": 3}
"""{audit event: which of its arguments is the open folder that the path is relative to}."""

Kind = Literal["none", "signal", "torn", "error", "full", "gone", "emptied"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        kind: signal: one is sent to the process. torn: killed when ``size`` bytes of the file that is opened here
            are written. error: the operation fails with ``number``. full: from here on nothing can be made, and of
            files only ``size`` bytes can be written. gone: the folder is deleted. emptied: and made again.
        at: The number of the operation, from 1.
        number: The signal, or the errno.
        size: Bytes.
    """

    kind: Kind = "none"
    at: int = 0
    number: int = 0
    size: int = 0

    def __str__(self) -> str:
        which = signal.Signals(self.number).name if self.kind == "signal" else ""
        which = errno.errorcode[self.number] if self.kind == "error" else which
        size = f"({self.size} B)" if self.size else ""
        return " ".join(filter(None, (self.kind, which, f"at operation {self.at}", size)))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation on a file of the folder: its audit event, its path in the folder, whether it changes anything."""

    event: str
    path: str
    writes: bool


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code; minus the signal that ended it.
        out: What it said on standard output.
        err: And on standard error.
        operations: On the files of the folder that was watched.
        seconds: From its fork.
    """

    code: int
    out: str
    err: str
    operations: tuple[Operation, ...]
    seconds: float

    @property
    def says(self) -> str:
        """What went wrong, in one line."""
        return self.err.strip().replace("\n", " | ")[-600:]


class Child:
    """A process that runs the command."""

    def __init__(self, nursery: "Nursery", pid: int, folder: Path) -> None:
        self.pid = pid
        self._nursery, self._folder = nursery, folder
        self._began = time.monotonic()
        self._descriptor = os.pidfd_open(pid)

    @property
    def said(self) -> str:
        """What it has said so far on standard output."""
        return (self._folder / "out").read_text(errors="replace")

    def send(self, number: int) -> None:
        """Send a signal; nothing if it has ended."""
        signal.pidfd_send_signal(self._descriptor, number)

    def ends(self, seconds: float) -> bool:
        """Whether it ends within some time."""
        return bool(select.select([self._descriptor], [], [], seconds)[0])

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Wait for its end; one that hangs is killed, and that is an error."""
        hangs = not self.ends(patience)
        if hangs:
            self.send(signal.SIGKILL)
        seconds = time.monotonic() - self._began
        code = self._nursery.reap(self.pid)
        os.close(self._descriptor)
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        if hangs:
            raise TimeoutError(f"no end after {patience} s; it said {out!r} {err!r}")
        lines = (self._folder / "operations").read_text().splitlines()
        operations = tuple(Operation(**json.loads(line)) for line in lines)
        return Ended(code=code, out=out, err=err, operations=operations, seconds=seconds)

    def family(self) -> list[int]:
        """The processes of its session that live."""
        return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _session(pid) == self.pid]


class Nursery:
    """A process in which everything is imported, forked for each case; a context manager.

    Args:
        folder: Where the cases put what they say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __enter__(self) -> "Nursery":
        threads = (f"{library}_THREADS" for library in ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "POLARS_MAX"))
        settings = {**dict.fromkeys(threads, "1"), "NO_PROXY": "127.0.0.1", "COLUMNS": "200"}
        source = Path(__file__).parents[2] / "src"
        path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings, "PYTHONPATH": path},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def start(
        self, words: Sequence[str | Path], *, watched: Path, fault: Fault | None = None, pictures: bool = False
    ) -> Child:
        """Run ``falign WORDS`` in a process of its own session.

        Args:
            words: The command's; "fetch", address, checksum and path download a file instead.
            watched: The folder whose operations are counted.
            fault: What goes wrong.
            pictures: Whether pictures are drawn, which takes most of the time.
        """
        self._count += 1
        folder = self._folder / f"case-{self._count}"
        folder.mkdir()
        for name in ("out", "err", "operations"):
            (folder / name).touch()
        request = {
            "words": [str(word) for word in words],
            "watched": str(watched.absolute()),
            "folder": str(folder.absolute()),
            "fault": asdict(fault or Fault()),
            "pictures": pictures,
        }
        return Child(self, self._ask(request), folder)

    def run(self, words: Sequence[str | Path], **options: Any) -> Ended:
        """The same, to its end."""
        return self.start(words, **options).wait()

    def reap(self, pid: int) -> int:
        """The exit code of a process that has ended."""
        return os.waitstatus_to_exitcode(self._ask({"reap": pid}))

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass
class Verdicts:
    """How many cases of a test were tried, and what was wrong in which."""

    title: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, case: object, wrong: Iterable[str]) -> None:
        """Count a case."""
        self.tried += 1
        self.wrong += [f"{case}: {each}" for each in wrong]

    def __str__(self) -> str:
        return f"{self.title}: {self.tried} tried, {len(self.wrong)} lost or different"


def sample(moments: Iterable[int], count: int | None, seed: int = 0) -> list[int]:
    """So many of the moments, or all."""
    every = list(moments)
    return every if count is None else random.Random(seed).sample(every, min(count, len(every)))


def names(folder: Path) -> set[str]:
    """Of all files in a folder, but for locks."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found if not path.name.endswith("lock")}


def sentence(ended: Ended, *named: str) -> list[str]:
    """What is wrong with how a process says that it failed."""
    wrong = [f"a traceback: {ended.says}"] if "Traceback" in ended.out + ended.err else []
    if not any(line.startswith("falign: ") for line in ended.err.splitlines()):
        wrong.append(f"exit code {ended.code} without a sentence: {ended.says!r}")
    elif named and not any(name in ended.err for name in named):
        wrong.append(f"it does not name {named[0]}: {ended.says!r}")
    return wrong


def _session(pid: int) -> int | None:
    """The session of a process that lives."""
    try:
        state, _, _, session, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(session)


# What follows runs in the process that is forked, and in the forks.


class _Watch:
    """Counts operations on the files of a folder, and brings about the fault."""

    def __init__(self, folder: str, fault: Fault, log: int) -> None:
        self._folder, self._fault, self._log = folder, fault, log
        self._count = 0
        self._busy = False
        self._owner = os.getpid()
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._fsync = os.fsync

    def install(self) -> None:
        """From now on every operation is seen."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self._fault.kind == "torn":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and then writing fails with EFBIG
        os.fsync = self._synced
        sys.addaudithook(self._heard)

    def _synced(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._operation("fsync", os.readlink(f"/proc/self/fd/{number}"), writes=True)
        self._fsync(descriptor)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _PATHS or self._busy or os.getpid() != self._owner:
            return
        self._busy = True
        try:
            path = self._path(event, arguments)
        except (OSError, TypeError, ValueError):
            path = ""
        finally:
            self._busy = False
        if event in ("fcntl.flock", "fcntl.lockf") and arguments[1] & fcntl.LOCK_UN:
            event = "unlock"
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        self._operation(event, path, writes=writes)

    def _path(self, event: str, arguments: tuple[Any, ...]) -> str:
        given = arguments[_PATHS[event]]
        if isinstance(given, int):
            return os.readlink(f"/proc/self/fd/{given}")
        place = arguments[_DIRECTORIES[event]] if event in _DIRECTORIES else -1
        start = os.getcwd() if not isinstance(place, int) or place < 0 else os.readlink(f"/proc/self/fd/{place}")
        return os.path.normpath(os.path.join(start, os.fsdecode(given)))

    def _operation(self, event: str, path: str, *, writes: bool) -> None:
        if self._busy or not (path == self._folder or path.startswith(self._folder + os.sep)):
            return
        self._count += 1
        if self._fault.kind in ("torn", "full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)  # for files of the folder only, not for the log
        inside = os.path.relpath(path, self._folder)
        os.write(self._log, (json.dumps({"event": event, "path": inside, "writes": writes}) + "\n").encode())
        self._busy = True
        try:
            self._befall(event, path, writes=writes)
        finally:
            self._busy = False

    def _befall(self, event: str, path: str, *, writes: bool) -> None:
        kind, here = self._fault.kind, self._count == self._fault.at
        if kind == "torn" and self._count == self._fault.at + 1:
            os.kill(self._owner, signal.SIGKILL)  # the file was smaller
        if kind == "full" and self._fault.at <= self._count and writes:
            if event in ("os.mkdir", "os.rename") or (event == "open" and not self._fault.size):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if event == "open":
                resource.setrlimit(resource.RLIMIT_FSIZE, (self._fault.size, self._limits[1]))
        if not here:
            return
        if kind == "signal":
            os.kill(self._owner, self._fault.number)
        elif kind == "torn":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._fault.size, self._limits[1]))
        elif kind == "error" and event != "unlock":  # which no disk refuses
            raise OSError(self._fault.number, os.strerror(self._fault.number), path)
        elif kind in ("gone", "emptied"):
            shutil.rmtree(self._folder)
            if kind == "emptied":
                os.mkdir(self._folder)


def _serve() -> dict[str, Any] | None:
    """Fork for each request; returns the request in the fork, and None at the end."""
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            answer = os.waitpid(request["reap"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(answer, flush=True)
    return None


def _carry_out(request: dict[str, Any]) -> int:
    try:
        _prepare(request)
        from falign.cli import main
    except KeyboardInterrupt:
        return 130  # as Python ends where nothing has begun
    words = request["words"]
    return _fetch(*words[1:]) if words[0] == "fetch" else main(words)


def _prepare(request: dict[str, Any]) -> None:
    os.setsid()
    folder = Path(request["folder"])
    for number, path in enumerate((Path(os.devnull), folder / "out", folder / "err")):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore  # what a killed process has said is not lost
    log = os.open(folder / "operations", os.O_WRONLY | os.O_APPEND)
    if not request["pictures"]:
        _draw_nothing()
    _Watch(request["watched"], Fault(**request["fault"]), log).install()


def _draw_nothing() -> None:
    """Neither the pictures of a run nor the figures of the papers."""
    from falign import papers
    from falign.lab import _ending

    _ending.draw = lambda *_: None
    papers.PAPERS = {
        name: replace(paper, experiments=tuple(replace(each, pictures=()) for each in paper.experiments))
        for name, paper in papers.PAPERS.items()
    }


def _fetch(address: str, checksum: str, path: str) -> int:
    """Download a file, as the loaders of data sets do."""
    from falign.lab.data import DataError
    from falign.lab.data._download import PublishedFile, fetch

    target = Path(path)
    file = PublishedFile(name=target.name, unpacked="unpacked", sha256=checksum, mirrors=(address,))
    try:
        print(f"fetched {fetch(file, target.parent, progress=False)}")
    except DataError as error:
        print(f"falign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    from importlib import import_module

    for module in _PRELOADED:
        import_module(module)
    gc.freeze()
    case = _serve()
    if case is not None:
        try:
            code = _carry_out(case)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is of Python, and in part of this file
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking all that was imported apart again takes seconds
