import gzip
import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from falign.lab.data import DataError, Dataset
from falign.lab.data.download import PublishedFile, fetch
from falign.lab.data.loading import load_source
from falign.lab.data.registry import Source

CONTENT = bytes(range(256)) * 4000
NAME = "made.bin"


class Mirrors(ThreadingHTTPServer):
    """Serves ``/<mirror>/<file>`` from a table of (status, body, announced length)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.table = {}
        self.asked = []

    def put(self, mirror, body, *, name=NAME, status=200, announced=None):
        self.table[f"/{mirror}/{name}"] = (status, body, len(body) if announced is None else announced)
        return self.address(mirror)

    def address(self, mirror):
        return f"http://127.0.0.1:{self.server_port}/{mirror}/"


class Handler(BaseHTTPRequestHandler):
    server: Mirrors

    def do_GET(self):
        self.server.asked.append(self.path)
        status, body, announced = self.server.table.get(self.path, (404, b"", 0))
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
    return PublishedFile(name=name, unpacked="made", sha256=digest, mirrors=addresses)


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


def test_a_partial_download_of_another_process_is_not_used(mirrors, tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    (tmp_path / ".partial-killed" / NAME).write_bytes(CONTENT[:10])
    fetch(published(mirrors.put("a", CONTENT)), tmp_path, progress=False)
    assert (tmp_path / NAME).read_bytes() == CONTENT


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
