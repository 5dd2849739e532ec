"""The documentation site: built once, without a warning; then its links, names, tutorials and tables are looked at."""

import ast
import inspect
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import falign
import outside_layer
import outside_rule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMES = Path(__file__).with_name("public_names.txt")

pytestmark = [
    pytest.mark.xdist_group("docs"),
    pytest.mark.skipif(not (DOCS / "conf.py").exists(), reason="the docs are not beside the tests"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; every tutorial has then been executed."""
    for package in ("sphinx", "myst_nb", "furo", "sphinx_copybutton", "jupytext", "ipykernel"):
        pytest.importorskip(package, reason='pip install "falign[docs]"')
    folder = tmp_path_factory.mktemp("site")
    words = [*["-m", "sphinx", "--builder", "html", "--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir"]]
    words += [str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    source = str(Path(falign.__file__).parents[1])
    clean = {name: value for name, value in os.environ.items() if name != "FALIGN_TYPECHECK"}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([source, *filter(None, [clean.get("PYTHONPATH")])])}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
    return folder / "html"


class Page(HTMLParser):
    """The links, anchors and fetched addresses of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        elif tag in ("link", "script", "img", "iframe", "source", "object", "embed"):
            self.fetched += [named[name] for name in ("href", "src", "data", "srcset") if name in named]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_links_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: no anchor {link}")
    assert broken == []
    assert len(pages) > 50


def test_nothing_is_fetched_from_elsewhere(site, pages):
    elsewhere = re.compile(r"(?:https?:)?//")
    assert {link for page in pages.values() for link in page.fetched if elsewhere.match(link)} == set()
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert len(styles) > 3
    assert [
        found for text in styles for found in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//\S+)", text)
    ] == []


def test_every_public_name_has_a_place_in_the_reference(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode()
    there = {line.split(" ")[0] for line in inventory.splitlines()}
    public = [
        f"{module}.{name}" for line in NAMES.read_text().splitlines() for module, _, names in [line.partition(": ")]
        for name in names.split()
    ]  # fmt: skip
    assert len(public) > 400
    assert sorted(set(public) - there) == []


def test_every_rule_is_in_the_matrix(site):
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        from matrix import COLUMNS, table
    finally:
        sys.path.pop(0)
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in table(DOCS).splitlines()[2:]]
    assert [re.match(r"\[`(\w+)`\]", row[0])[1] for row in rows] == list(falign.ALL_RULES)
    assert {len(row) for row in rows} == {len(COLUMNS)}
    always = [COLUMNS.index(name) for name in ("matrices", "memory of them", "passes", "weight transport", "source")]
    assert all(row[column] for row in rows for column in always)
    assert "weight transport" in (site / "rules.html").read_text()


def test_every_tutorial_shows_what_it_printed(site):
    names = sorted(path.stem for path in (DOCS / "tutorials").glob("*.py"))
    assert len(names) == 7
    for name in names:
        text = (site / "tutorials" / f"{name}.html").read_text(encoding="utf-8")
        assert text.count("cell_output") >= 2, name
    assert "fa with B = W: backpropagation" in (site / "tutorials" / "from_scratch.html").read_text(encoding="utf-8")


def test_the_rule_and_the_layer_of_the_pages_are_those_that_the_suites_take():
    rule = (DOCS / "tutorials" / "write_a_rule.py").read_text(encoding="utf-8")
    assert inspect.getsource(outside_rule.MixedFeedback) in rule
    page = (DOCS / "write_a_layer_kind.md").read_text(encoding="utf-8")
    shown = {
        ast.dump(node)
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        for node in ast.parse(block).body
    }
    ours = ast.parse(inspect.getsource(outside_layer)).body[1:]  # without its docstring
    assert [ast.unparse(node) for node in ours if ast.dump(node) not in shown] == []


def test_the_long_description_needs_no_file_beside_it():
    tomllib = pytest.importorskip("tomllib")
    readme = pytest.importorskip("hatch_fancy_pypi_readme._config")
    build = pytest.importorskip("hatch_fancy_pypi_readme._builder").build_text
    markdown = pytest.importorskip("readme_renderer.markdown")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config = readme.load_and_validate_config(settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"])
    text = build(config.fragments, config.substitutions, falign.__version__)
    page = markdown.render(text)
    assert page is not None
    assert "Train PyTorch networks" in page
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert [link for link in links if not link.startswith(("http://", "https://", "#"))] == []
