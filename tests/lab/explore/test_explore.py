"""The page of ``falign explore`` in a real browser, served by the command itself."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from training_runs import begin

from falign.lab import _ending
from falign.lab.config import TrainConfig

pytest.importorskip("nicegui", reason='NiceGUI is not installed: pip install "falign[explore]"')
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install falign[test]")
from falign.lab.explore import _curves  # noqa: E402  # beside what the page needs

pytestmark = pytest.mark.xdist_group("explore")

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 20_000


class Served:
    """The command at work, and its address."""

    def __init__(self, runs: Path, folder: Path) -> None:
        words = [sys.executable, "-m", "falign", "explore", "--runs", str(runs), "--store", str(folder / "results")]
        env = {name: value for name, value in os.environ.items() if name != "FALIGN_TYPECHECK"}
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=env
        )
        guard = threading.Timer(60, self.process.kill)
        guard.start()
        self.said = self.process.stdout.readline()
        guard.cancel()
        self.address = self.said.split()[-1]
        parts = urlsplit(self.address)
        self.host, self.port, self.path = parts.hostname, parts.port, parts.path

    def get(self, path: str, **headers: str) -> int:
        with closing(HTTPConnection(self.host, self.port, timeout=20)) as connection:
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore") / "runs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_ending, "draw", lambda *_: None)
        begin(TrainConfig("digits", model="mlp:64-16-10", epochs=2), folder / "first")
    return folder


@pytest.fixture(scope="module")
def served(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(runs, tmp_path_factory.mktemp("served"))
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Any]:
    """Open the page; afterwards nothing must have failed, and nobody else must have been asked for anything."""
    contexts, wrong, asked = [], [], set()

    def opened(*, viewport: dict[str, int] = WIDE, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.add(urlsplit(request.url)))
        page.on("websocket", lambda socket: asked.add(urlsplit(socket.url)))
        page.goto(served.address)
        page.get_by_role("tab", name="Runs").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
    assert {each.netloc for each in asked if each.scheme != "data"} == {f"127.0.0.1:{served.port}"}
    assert all(each.path.startswith(served.path) for each in asked if each.scheme != "data")


def line(page: Any) -> str:
    """The first curve of the part that is seen."""
    return page.locator("figure:visible svg path[stroke-width='2']").first.get_attribute("d")


def test_it_listens_to_those_who_have_the_token_and_to_nobody_else(served: Served) -> None:
    token = served.path.strip("/")
    assert served.host == "127.0.0.1"
    assert len(token) >= 32
    assert served.get(served.path) == 200
    polling = "/_nicegui_ws/socket.io/?EIO=4&transport=polling"
    for path in ("/", "/favicon.ico", polling, f"/{token[:-1]}/", f"//{token}/"):
        assert served.get(path) == 403, path
    assert served.get(served.path, Host="elsewhere.example") == 403
    assert served.get(served.path, Origin="http://elsewhere.example") == 403
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    assert served.get(path, **upgrade, **{"Sec-WebSocket-Version": "13"}) == 403
    with socket.socket() as elsewhere:
        assert elsewhere.connect_ex(("127.0.0.2", served.port)) != 0  # another address of this machine


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_slider_is_moved_by_the_keyboard_and_the_curve_follows(scheme: str, visit: Any) -> None:
    page = visit(scheme=scheme)
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role')") == "tab":
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_role("slider", name="ridge λ").wait_for()
    expected = [_curves.two_layer(strength=strength, width=100).sentence for strength in (10, 11, 12)]
    said = page.locator(".said:visible")
    sync_api.expect(said).to_have_text(expected[0])
    page.locator("figure:visible svg path[stroke-width='2']").first.wait_for()
    before = line(page)
    for _ in range(4):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "ridge λ":
            break
    page.keyboard.press("ArrowRight")
    sync_api.expect(said).to_have_text(expected[1])
    sync_api.expect(page.locator(".name b").first).to_have_text("11")
    moved = "before => document.querySelector(\"figure svg path[stroke-width='2']\").getAttribute('d') !== before"
    page.wait_for_function(moved, arg=before)
    page.keyboard.press("ArrowRight")  # from where it is now
    sync_api.expect(said).to_have_text(expected[2])


def test_every_slider_moves_its_simulator(visit: Any) -> None:
    page = visit(viewport=PHONE)
    page.get_by_role("tab", name="Two layers").click()
    width = page.get_by_role("slider", name="width p")
    width.focus()
    page.keyboard.press("End")
    expected = _curves.two_layer(strength=10, width=10**6).sentence
    sync_api.expect(page.locator(".said:visible")).to_have_text(expected)
    page.get_by_role("tab", name="Deep linear").click()
    for name, key, values in (
        ("invariant K", "Home", {"target": 0.5, "invariant": -1.5}),
        ("largest component λ", "End", {"target": 3, "invariant": -1.5}),
    ):
        page.get_by_role("slider", name=name).focus()
        page.keyboard.press(key)
        expected = _curves.deep_linear(**values, start="anti-aligned").sentence
        sync_api.expect(page.locator(".said:visible")).to_have_text(expected)
    page.get_by_role("button", name="θ₁ = 0").click()
    expected = _curves.deep_linear(target=3, invariant=-1.5, start="θ₁ = 0").sentence
    sync_api.expect(page.locator(".said:visible")).to_have_text(expected)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


def test_a_run_that_comes_is_seen_without_a_reload(visit: Any, runs: Path) -> None:
    page = visit()
    page.get_by_role("button", name="first").wait_for()
    assert page.locator("figure:visible").count() == 3
    row = page.get_by_role("row").filter(has=page.get_by_role("button", name="first"))
    assert re.search(r"digits · mlp:64-16-10 · fa.*done.*2 of 2.*\d\d\.\d\d", row.inner_text().replace("\n", " "))
    shutil.copytree(runs / "first", runs / "<i>another")
    other = page.get_by_role("button", name="<i>another")
    other.wait_for()
    other.focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("h2").nth(1)).to_have_text("<i>another")


def test_the_simulators_show_what_the_theory_says() -> None:
    """A ridge aligns; a wide network without one does not; anti-aligned starts learn the smallest component first."""
    wide = _curves.two_layer(strength=100, width=1000).panels[0].curves
    assert wide[0].points[-1][1] > 0.8
    assert wide[1].points[-1][1] < 0.2
    assert "anti-regularises" in _curves.deep_linear(target=0.3, invariant=-0.5, start="anti-aligned").sentence
    for start in ("θ₁ = 0", "aligned"):
        assert "it regularises" in _curves.deep_linear(target=0.3, invariant=-0.5, start=start).sentence
    assert _curves.deep_linear(target=1, invariant=1.5, start="aligned").panels[0].curves[0].points[0] == (0.0, 0.0)


def test_ctrl_c_ends_it_at_once_also_with_a_page_open(visit: Any, served: Served) -> None:
    visit().close()
    with socket.create_connection((served.host, served.port)):  # and somebody who holds on
        served.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code = served.process.wait(20)
    assert (code, served.process.stderr.read()) == (130, "falign: interrupted\n")
    assert time.monotonic() - began < 10
    assert not any(Path(served.process.args[-1]).parent.iterdir()), "it leaves nothing where it was started"
