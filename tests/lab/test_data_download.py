import errno
import gzip
import hashlib
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from falign.lab.data import DataError, Dataset, _download
from falign.lab.data._download import PublishedFile, fetch
from falign.lab.data._loading import load_source
from falign.lab.data._registry import Source

CONTENT = bytes(range(256)) * 4000
NAME = "made.bin"


class Mirrors(ThreadingHTTPServer):
    """Serves ``/<mirror>/<file>`` from a table of (status, body, announced length), or has a function do it."""

    daemon_threads = True
    block_on_close = False  # some never end

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.table = {}
        self.asked = []

    def put(self, mirror, body, *, name=NAME, status=200, announced=None):
        announced = 0 if callable(body) else len(body) if announced is None else announced
        self.table[f"/{mirror}/{name}"] = (status, body, announced)
        return self.address(mirror)

    def address(self, mirror):
        return f"http://127.0.0.1:{self.server_port}/{mirror}/"


class Handler(BaseHTTPRequestHandler):
    server: Mirrors

    def do_GET(self):
        self.server.asked.append(self.path)
        status, body, announced = self.server.table.get(self.path, (404, b"", 0))
        if callable(body):
            with suppress(OSError):  # whoever asked has gone
                body(self)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Mirrors() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(*addresses, content=CONTENT, name=NAME):
    digest = hashlib.sha256(content).hexdigest()
    return PublishedFile(name=name, unpacked="made", sha256=digest, mirrors=addresses, size=len(content))


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False])
def test_download(mirrors, tmp_path, progress, terminal, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")  # rich takes it for a terminal then
    file = published(mirrors.put("a", CONTENT))
    path = fetch(file, tmp_path / "cache", progress=progress)
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    out, err = capsys.readouterr()
    assert out == ""
    assert (NAME in err) == (progress and terminal)
    assert err == "" or terminal
    fetch(file, tmp_path / "cache", progress=progress)
    assert mirrors.asked == [f"/a/{NAME}"]


BAD = {
    "missing": {"body": b"no such page", "status": 404},
    "failing": {"body": b"", "status": 503},
    "altered": {"body": CONTENT[:-1] + b"?"},
    "too long": {"body": CONTENT + b"?"},
    "too short": {"body": CONTENT[:-1]},
    "interrupted": {"body": CONTENT[:1000], "announced": len(CONTENT)},
    "a page": {"body": b"<html>log in first</html>"},
}


@pytest.mark.parametrize("bad", list(BAD))
def test_the_next_mirror_is_asked(mirrors, tmp_path, bad):
    file = published(mirrors.put("a", **BAD[bad]), mirrors.put("b", CONTENT))
    assert fetch(file, tmp_path, progress=False).read_bytes() == CONTENT
    assert mirrors.asked == [f"/a/{NAME}", f"/b/{NAME}"]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("bad", list(BAD))
def test_nothing_is_left_of_a_refused_download(mirrors, tmp_path, bad):
    file = published(mirrors.put("a", **BAD[bad]), mirrors.address("b"))
    with pytest.raises(DataError, match=f"^{NAME} could not be downloaded to ") as refusal:
        fetch(file, tmp_path, progress=True)
    assert list(tmp_path.iterdir()) == []
    for mirror in ("a", "b"):
        assert mirrors.address(mirror) + NAME in str(refusal.value)
    assert f"{mirrors.address('b')}{NAME}: HTTP status 404" in str(refusal.value)
    if bad in {"altered", "too long", "too short", "a page"}:
        assert re.search(rf"what it served has SHA-256 \w+, expected {file.sha256}", str(refusal.value))


def test_no_network(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    with pytest.raises(DataError, match=rf"downloaded to \S+ \({address}{NAME}: ConnectionError\), expected"):
        fetch(published(address), tmp_path, progress=False)


def head(handler, **headers):
    handler.send_response(302 if "Location" in headers else 200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def endless(handler):
    head(handler)
    while True:
        handler.wfile.write(bytes(1 << 16))


def endless_chunks(handler):
    handler.protocol_version = "HTTP/1.1"
    head(handler, Transfer_Encoding="chunked")
    while True:
        handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def announcing(length):
    def serve(handler):
        head(handler, Content_Length=length)
        handler.wfile.write(CONTENT)

    return serve


def redirecting(address):
    return lambda handler: head(handler, Location=address or handler.path, Content_Length="0")


def encoded(content):
    def serve(handler):
        head(handler, Content_Encoding="gzip", Content_Length=str(len(content)))
        handler.wfile.write(content)

    return serve


def dripping(handler):
    head(handler, Content_Length=str(len(CONTENT)))
    for at in range(len(CONTENT)):
        handler.wfile.write(CONTENT[at : at + 1])
        time.sleep(0.05)


def silent(handler):
    time.sleep(3)


def header_flood(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X: " + b"y" * 1000 + b"\r\n")


HOSTILE = {
    "endless": (endless, r"it sends more than 1,127,424 bytes"),
    "endless chunks": (endless_chunks, r"it sends more than 1,127,424 bytes"),
    "announces too much": (announcing(str(10**15)), r"it announces 1,000,000,000,000,000 bytes, expected at most"),
    "no number": (announcing("many"), r""),
    "a file": (redirecting("file:///etc/passwd"), r"InvalidSchema"),
    "in a circle": (redirecting(""), r"HTTP status 302"),
    "to nowhere": (redirecting("http://[::bad/"), r""),
    "bomb": (encoded(gzip.compress(bytes(1 << 28))), r"it sends more than 1,127,424 bytes"),
    "not gzip": (encoded(CONTENT), r"ContentDecodingError"),
    "drips": (dripping, r"it sent less than 64 KiB in 0.4 s"),
    "silent": (silent, r"ReadTimeout|it sent less"),
    "not http": (lambda handler: handler.wfile.write(b"\x00\xff" * 5000), r"ConnectionError"),
    "headers": (header_flood, r"ConnectionError"),
    "hangs up": (lambda handler: None, r"ConnectionError"),
}


@pytest.mark.parametrize("hostile", list(HOSTILE))
def test_a_hostile_mirror_costs_little_and_the_next_is_asked(mirrors, tmp_path, monkeypatch, hostile):
    monkeypatch.setattr(_download, "_STALLED", 0.4)
    monkeypatch.setattr(_download, "_TIMEOUT", 0.3)
    serve, words = HOSTILE[hostile]
    bad, good = mirrors.put("a", serve), mirrors.put("b", CONTENT)
    begun = time.monotonic()
    with pytest.raises(DataError, match=rf"^{NAME} could not be downloaded to .*{words}.*, expected one mirror"):
        fetch(published(bad), tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
    assert fetch(published(bad, good), tmp_path / "cache", progress=False).read_bytes() == CONTENT
    assert time.monotonic() - begun < 10


def test_what_a_server_packs_for_the_way_is_unpacked(mirrors, tmp_path):
    address = mirrors.put("a", encoded(gzip.compress(CONTENT)))
    assert fetch(published(address), tmp_path, progress=False).read_bytes() == CONTENT


def test_a_redirection_to_another_mirror_is_followed(mirrors, tmp_path):
    address = mirrors.put("a", redirecting(mirrors.put("b", CONTENT) + NAME))
    assert fetch(published(address), tmp_path, progress=False).read_bytes() == CONTENT


def test_partial_downloads_of_killed_processes_are_removed(mirrors, tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    (tmp_path / ".partial-killed" / NAME).write_bytes(CONTENT[:10])
    fetch(published(mirrors.put("a", CONTENT)), tmp_path, progress=False)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def slowly(pause):
    def serve(handler):
        head(handler, Content_Length=str(len(CONTENT)))
        for at in range(0, len(CONTENT), 1 << 16):
            handler.wfile.write(CONTENT[at : at + (1 << 16)])
            time.sleep(pause)

    return serve


def started(file, folder):
    """A process that downloads; its exit code is 0 if it went well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the server's thread, which the child does not need
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = int(fetch(file, folder, progress=False).read_bytes() != CONTENT)
        finally:
            os._exit(code)
    return pid


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks beside a thread")


@LINUX
@pytest.mark.parametrize("count", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_kills_leave_nothing_half(mirrors, tmp_path, count):
    file = published(mirrors.put("a", slowly(0.002)))
    draw = random.Random(0)
    for _ in range(count):
        pid = started(file, tmp_path)
        time.sleep(draw.uniform(0, 0.12))
        os.kill(pid, draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        os.waitpid(pid, 0)
        if (target := tmp_path / NAME).exists():
            assert target.read_bytes() == CONTENT
            target.unlink()
    assert fetch(file, tmp_path, progress=False).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@LINUX
def test_several_processes_download_once(mirrors, tmp_path):
    file = published(mirrors.put("a", slowly(0.002)))
    pids = [started(file, tmp_path) for _ in range(6)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert mirrors.asked == [f"/a/{NAME}"]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@LINUX
def test_whoever_waits_says_so(mirrors, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("falign.lab.data._download._PATIENCE", 0.0)
    pid = started(file := published(mirrors.put("a", slowly(0.03))), tmp_path)
    while not list(tmp_path.glob(".partial-*")):
        time.sleep(0.001)
    fetch(file, tmp_path, progress=False)
    assert os.waitpid(pid, 0)[1] == 0
    assert capsys.readouterr().err == f"waiting for another process that writes to {tmp_path}\n"


@LINUX
def test_a_full_disk_is_named_and_no_other_mirror_is_asked(mirrors, tmp_path):
    import resource

    file = published(mirrors.put("a", CONTENT), mirrors.put("b", CONTENT))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a disk on which there is no more room
    try:
        with pytest.raises(
            DataError, match=rf"^{NAME} cannot be put into {tmp_path} \({os.strerror(errno.EFBIG)}\), exp"
        ):
            fetch(file, tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert mirrors.asked == [f"/a/{NAME}"]
    assert list(tmp_path.iterdir()) == []
    assert fetch(file, tmp_path, progress=False).read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made_is_named(mirrors, tmp_path):
    (tmp_path / "cache").write_bytes(b"a file where a folder would be")
    with pytest.raises(DataError, match=r"cannot be put into .*cache \(File exists\), expected a folder to write in"):
        fetch(published(mirrors.put("a", CONTENT)), tmp_path / "cache", progress=False)
    assert mirrors.asked == []


def test_a_damaged_file_in_the_cache_is_refused_by_name(mirrors, tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT[:10])
    with pytest.raises(DataError, match=rf"{NAME} has SHA-256 \w+, expected \w+"):
        fetch(published(mirrors.put("a", CONTENT)), tmp_path, progress=False)
    assert mirrors.asked == []


def test_a_gzip_file_is_known_by_what_it_holds(mirrors, tmp_path):
    name = "made.gz"
    packed = gzip.compress(CONTENT, 1, mtime=1)
    mirrors.put("a", packed[:-3] + b"???", name=name)
    mirrors.put("b", gzip.compress(CONTENT[:-1]), name=name)
    mirrors.put("c", packed, name=name)
    addresses = [mirrors.address(mirror) for mirror in "abc"]
    assert fetch(published(*addresses, name=name), tmp_path, progress=False).read_bytes() == packed
    with pytest.raises(DataError, match="what it served is no intact gzip file"):
        fetch(published(addresses[0], name=name), tmp_path / "other", progress=False)


def test_a_data_set_is_downloaded_to_the_cache_and_only_if_allowed(mirrors, tmp_path):
    given, cache = tmp_path / "given", tmp_path / "cache"
    given.mkdir()
    names = ("one.bin", "two.bin")
    for name in names:
        mirrors.put("a", CONTENT, name=name)
    files = tuple(published(mirrors.address("a"), name=name) for name in names)
    seen = []

    def read(name, paths, *, keep, progress):
        seen.append((name, paths))
        one, label = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.tensor([0])
        return Dataset(
            name=name,
            train_images=one,
            train_labels=label,
            test_images=one,
            test_labels=label,
            classes=("a",),
        )

    source = Source(name="made", files=files, read=read)
    with pytest.raises(DataError, match=r"made is not in .*given/made and .*cache/made, expected one.bin, two"):
        load_source(source, given=given, cache=cache, download=False, progress=False)
    assert mirrors.asked == []
    (given / "one.bin").write_bytes(CONTENT)
    load_source(source, given=given, cache=cache, download=True, progress=False)
    assert [path.name for path in given.iterdir()] == ["one.bin"]
    load_source(source, given=None, cache=cache, download=False, progress=False)
    assert seen == [("made", [cache / "made" / name for name in names])] * 2
    assert mirrors.asked == ["/a/one.bin", "/a/two.bin"]
