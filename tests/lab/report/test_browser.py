"""The page in a real browser: nothing is asked for, nothing fails, everything is seen and works."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image
from samples import alignment, paper_results

from falign.lab.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install falign[test]")

pytestmark = pytest.mark.xdist_group("report")  # what is made once for the module is made in one process

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    _, (html,) = write_report(tmp_path_factory.mktemp("report"), [paper_results()])
    return html.as_uri()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Open the page with a viewport and a scheme; afterwards nothing must have been said, failed or asked for."""
    contexts, said = [], []

    def opened(*, viewport: dict[str, int] = WIDE, scheme: str = "light", **options: object) -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("requestfailed", lambda request: said.append(f"failed: {request.url[:100]}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url),
        )
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def background(page: Any) -> str:
    return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")


def kept(page: Any) -> list[str]:
    return page.eval_on_selector_all("article.claim:not([hidden])", "all => all.map(each => each.dataset.verdict)")


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_seen(visit: Any, viewport: dict[str, int], scheme: str) -> None:
    page = visit(viewport=viewport, scheme=scheme)
    figures = page.query_selector_all("figure svg")
    assert len(figures) == 2
    for figure in figures:
        box = figure.bounding_box()
        assert figure.is_visible()
        assert box["width"] > 200
        assert box["height"] > 150
    lines = page.eval_on_selector_all(
        "figure svg path[style*='stroke: var']", "all => all.map(each => getComputedStyle(each).stroke)"
    )
    assert len(lines) > 50
    assert "none" not in lines, "every colour of a figure is defined"
    assert all(each.is_visible() for each in page.query_selector_all("article.claim, .badge, section.failing"))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


@pytest.mark.parametrize("kind", ["all", "holds", "fails", "not run"])
def test_filter_by_verdict(visit: Any, kind: str) -> None:
    page = visit()
    everything = kept(page)
    page.click(f"#filter button[data-kind='{kind}']")
    assert kept(page) == [each for each in everything if kind in ("all", each)]
    assert page.get_attribute(f"#filter button[data-kind='{kind}']", "aria-pressed") == "true"
    assert page.is_visible("#sample\\.figure3") == (kind in ("all", "not run"))
    page.click("#filter button[data-kind='all']")
    assert kept(page) == everything


def test_search(visit: Any) -> None:
    page = visit()
    page.fill("#words", "RELU networks")
    assert kept(page) == ["holds", "not run"]
    assert page.inner_text("#found") == "2 of 8 claims"
    page.fill("#words", "no such words")
    assert kept(page) == []
    assert not page.is_visible("section.origin")
    assert page.inner_text("#found") == "No claim matches."
    page.fill("#words", "n-over-p")
    assert page.eval_on_selector_all("article.claim:not([hidden])", "all => all.map(each => each.dataset.name)") == [
        "n-over-p"
    ]
    page.fill("#words", "")
    assert len(kept(page)) == 8
    assert page.inner_text("#found") == ""


def test_links_lead_to_their_sections(visit: Any) -> None:
    page = visit()
    for link in page.query_selector_all("section.summary a, section.failing a"):
        target = link.get_attribute("href")
        link.click()
        box = page.query_selector(f"[id='{target[1:]}']").bounding_box()
        bottom = page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY")
        assert -1 <= box["y"] < 150 or bottom <= 1, target


def test_a_link_to_a_hidden_claim_shows_it(visit: Any) -> None:
    page = visit()
    page.click("#filter button[data-kind='holds']")
    assert not page.is_visible("article.claim.fails")
    page.click("section.failing a")
    assert page.is_visible("article.claim.fails")
    assert len(kept(page)) == 8


def test_dark_follows_the_system_and_the_button(visit: Any) -> None:
    light, dark = visit(), visit(scheme="dark")
    by_system = background(dark)
    assert by_system != background(light)
    ink = "getComputedStyle(document.querySelector('figure svg text')).color"
    assert light.evaluate(ink) != dark.evaluate(ink), "figures follow"
    light.click("#theme")
    assert background(light) == by_system
    light.reload()
    assert background(light) == by_system, "it is remembered"
    light.click("#theme")
    assert background(light) != by_system


def test_pictures_and_data_can_be_taken(visit: Any) -> None:
    page = visit(scheme="dark")
    results = alignment(3)
    for picture in results.experiment.pictures:
        name = f"sample.figure2.{picture.name}"
        link = page.query_selector(f"a[download='{name}.csv']")
        content = base64.b64decode(link.get_attribute("href").partition(",")[2])
        assert pl.read_csv(content).equals(picture.data(results.table), null_equal=True)
        assert saved(page, link, f"{name}.csv") == content
        drawn = saved(page, page.query_selector(f"button[data-name='{name}.png']"), f"{name}.png")
        with Image.open(io.BytesIO(drawn)) as image:
            assert image.format == "PNG"
            assert image.width >= 800
            pixels = image.convert("RGB")
            assert pixels.getpixel((0, 0)) == (255, 255, 255)
            colours = {colour for _, colour in pixels.getcolors(1 << 24)}
            assert (0x1C, 0x1F, 0x23) in colours, "the ink of a light page, whatever the page is"


def saved(page: Any, link: Any, name: str) -> bytes:
    with page.expect_download() as waiting:
        link.click()
    assert waiting.value.suggested_filename == name
    return Path(waiting.value.path()).read_bytes()


def test_runs_that_diverged_are_folded(visit: Any) -> None:
    page = visit()
    assert not page.is_visible("details.unfinished table")
    page.click("details.unfinished summary")
    assert "loss is not finite at step 61" in page.inner_text("details.unfinished table")


def test_without_script_everything_is_there(visit: Any) -> None:
    page = visit(java_script_enabled=False)
    assert page.locator("article.claim:visible").count() == 8
    assert not page.is_visible("#filter")


def test_print_is_light_and_whole(visit: Any) -> None:
    page = visit(scheme="dark")
    screen = background(page)
    page.emulate_media(media="print")
    assert background(page) != screen
    assert not page.is_visible("#filter")
