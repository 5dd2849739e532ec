"""Downloads are killed, refused the disk or lose their folder: no half file is ever under its name."""

import errno
import hashlib
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kills import Child, Ended, Fault, Nursery, Verdicts, sample, sentence

if sys.platform != "linux":
    pytest.skip("what befalls the processes is of Linux", allow_module_level=True)
pytestmark = pytest.mark.xdist_group("kills")
EVERY = pytest.param(None, marks=pytest.mark.slow, id="every")
"""All the moments, and not a sample of so many."""
CONTENT = random.Random(0).randbytes(3 << 20)
NAME = "made.bin"


class _Handler(BaseHTTPRequestHandler):
    """Serves the content in pieces, and slowly."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        try:
            for start in range(0, len(CONTENT), 1 << 16):
                self.wfile.write(CONTENT[start : start + (1 << 16)])
                time.sleep(0.002)
        except OSError:
            pass  # who asked has died

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def fetch(nursery: Nursery, address: str, folder: Path, fault: Fault | None = None) -> Child:
    words = ["fetch", address, hashlib.sha256(CONTENT).hexdigest(), folder / NAME]
    return nursery.start(words, watched=folder, fault=fault)


@pytest.fixture(scope="module")
def download(nursery: Nursery, address: str, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("reference") / "data"
    ended = fetch(nursery, address, folder).wait()
    assert (ended.code, ended.err) == (0, ""), ended
    assert (folder / NAME).read_bytes() == CONTENT
    return ended


def half(folder: Path) -> list[str]:
    """What is wrong with the file under its name."""
    path = folder / NAME
    return ["half a file is under its name"] if path.exists() and path.read_bytes() != CONTENT else []


def fetches_again(nursery: Nursery, address: str, folder: Path, *, strays: int = 1) -> list[str]:
    """What is wrong after one more try."""
    ended = fetch(nursery, address, folder).wait()
    if ended.code:
        return [f"again: exit code {ended.code}: {ended.says}"]
    left = [path.name for path in folder.iterdir() if path.name != NAME and not path.name.endswith("lock")]
    return [*half(folder), *([f"{len(left)} are left: {left[:3]}"] if len(left) > strays else [])]


@pytest.mark.parametrize("count", [1, EVERY])
@pytest.mark.parametrize("kind", ["kill", "torn", "error", "full", "gone"])
def test_a_download_killed_at_a_file_operation(
    count: int | None, kind: str, nursery: Nursery, address: str, download: Ended, tmp_path: Path, verdicts: Verdicts
) -> None:
    moments = [n for n, each in enumerate(download.operations, 1) if each.writes or kind == "error"]
    for at in sample(moments, count, seed=len(kind)):
        fault = {
            "kill": Fault(kind="signal", number=signal.SIGKILL, at=at),
            "torn": Fault(kind="torn", size=1_000_000, at=at),
            "error": Fault(kind="error", number=(errno.EIO, errno.ENOSPC, errno.EACCES)[at % 3], at=at),
            "full": Fault(kind="full", size=(0, 1_000_000)[at % 2], at=at),
            "gone": Fault(kind="gone", at=at),
        }[kind]
        folder = tmp_path / str(at)
        ended = fetch(nursery, address, folder, fault).wait()
        wrong = half(folder)
        if ended.code > 0:
            wrong += sentence(ended, str(folder))
        elif ended.code == 0 and kind != "gone" and not (folder / NAME).exists():
            wrong.append("fetched, but it is not there")
        again = fetches_again(nursery, address, folder)
        verdicts.add(fault, [f"{download.operations[at - 1]}: {each}" for each in wrong + again])


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_download_killed_at_a_random_moment_over_and_over(
    count: int, nursery: Nursery, address: str, download: Ended, tmp_path: Path, verdicts: Verdicts
) -> None:
    """In one folder, in which what the killed ones left does not pile up."""
    moments = random.Random(count)
    for case in range(count):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[case % 4]
        child = fetch(nursery, address, tmp_path)
        child.ends(at := moments.uniform(0.2, 0.95) * download.seconds)
        child.send(number)
        child.wait()
        verdicts.add(f"{number.name} after {at:.2f} s", half(tmp_path))
        if (tmp_path / NAME).exists():
            (tmp_path / NAME).unlink()
    verdicts.add("after all", fetches_again(nursery, address, tmp_path, strays=2))


@pytest.mark.parametrize("processes", [2, 8])
def test_several_downloads_of_one_file(
    processes: int, nursery: Nursery, address: str, tmp_path: Path, verdicts: Verdicts
) -> None:
    ended = [child.wait() for child in [fetch(nursery, address, tmp_path) for _ in range(processes)]]
    wrong = [f"exit code {one.code}: {one.says}" for one in ended if one.code]
    verdicts.add(f"{processes} processes", wrong + fetches_again(nursery, address, tmp_path, strays=0))
