"""The report as files: what was measured is on the page and in the JSON, and nothing is lost or made up."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from samples import CLAIMS, alignment, claim, empty, paper_results, row_of_a_run

from falign.lab._files import WriteError
from falign.lab.experiment import Check, Claim, Evidence, Experiment, Missing, Paper, Picture, Task
from falign.lab.experiment._results import PaperResults, Results
from falign.lab.report import style, write_report

pytestmark = pytest.mark.xdist_group("report")  # what is made once for the module is made in one process

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """A page's elements: what text each claim, table and element with an id holds."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.values: dict[str, list[float]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.feed(html)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(self.elements[-1])
        if tag == "data":
            self.values.setdefault(self._claim(), []).append(float(dict(attrs)["value"] or ""))
        if tag == "tr":
            self.tables.setdefault(self._claim(), []).append([])
        if tag in ("td", "th"):
            self.tables[self._claim()][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, attributes in self.open:
            if name := attributes.get("id"):
                self.texts[name] = self.texts.get(name, "") + data
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.tables[self._claim()][-1][-1] += data

    def _claim(self) -> str:
        claims = [attributes["id"] for tag, attributes in self.open if tag == "article"]
        return str(claims[-1]) if claims else ""


def written(folder: Path, results: PaperResults) -> tuple[str, dict]:
    """The page and the numbers of a paper."""
    name = results.paper.name
    index, (html,) = write_report(folder, [results])
    numbers = html.with_suffix(".json")
    assert (index, html) == (folder / "report.html", folder / "report" / f"{name}.html")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {"report.html", f"report/{name}.html", f"report/{name}.json"}, "nothing half-written"

    def forbid(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return html.read_text("utf-8"), json.loads(numbers.read_text("utf-8"), parse_constant=forbid)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict, str]:
    html, numbers = written(tmp_path_factory.mktemp("report"), paper_results())
    return Page(html), numbers, html


def paper_of(*results: Results, **words: str) -> PaperResults:
    paper = Paper(
        **{"name": "sample", "title": "T", "authors": "A", "venue": "V", "address": "", **words},
        experiments=tuple(each.experiment for each in results),
    )
    return PaperResults(paper=paper, results=results)


def results_of(*, claims: tuple = (), pictures: tuple = (), table: pl.DataFrame | None = None) -> Results:
    experiment = Experiment(
        name="sample.x",
        title="X",
        source="S",
        revision=1,
        grid={"quick": ({"p": 1},)},
        seeds={"quick": 1},
        run=lambda tasks, setting: [],
        claims=claims,
        pictures=pictures,
    )
    done = pl.DataFrame({"p": [1, 1], "seed": [0, 0], "y": [0.5, 1.5]}) if table is None else table
    runs = pl.DataFrame([{"key": "k", "p": 1, "seed": 0, "status": "done", "message": None, "seconds": 2.0}])
    return Results(experiment=experiment, preset="quick", table=done, runs=runs, provenance=({"threads": 2},))


def test_every_verdict_is_the_claims_own(sample: tuple[Page, dict, str]) -> None:
    page, numbers, _ = sample
    table = alignment(3).table
    first = numbers["experiments"][0]
    assert [each["name"] for each in first["claims"]] == [each.name for each in CLAIMS]
    for told, truth in zip(first["claims"], CLAIMS, strict=True):
        if truth.name == "very-wide":
            assert (told["verdict"], told["checks"]) == ("not run", [])
            assert told["message"] == "no run of relu with λ = 3 at p = 12800"
        else:
            evidence = truth.read(table)
            assert told["verdict"] == ("holds" if evidence.holds else "fails")
            assert [check["measured"] for check in told["checks"]] == [check.measured for check in evidence.checks]
        anchor = f"sample.figure2.{truth.name}"
        (shown,) = (attributes for _, attributes in page.elements if attributes.get("id") == anchor)
        assert shown["data-verdict"] == told["verdict"]
        assert "hidden" not in shown, "a failing claim is seen"
    assert {each["verdict"] for each in first["claims"]} == {"holds", "fails", "not run"}


def test_a_smoke_test_is_called_one(tmp_path: Path) -> None:
    note = "Preset smoke has the sizes of a smoke test: its verdicts mean little."
    html, numbers = written(tmp_path, paper_of(replace(results_of(), preset="smoke")))
    assert html.count(note) == 1
    assert numbers["presets"] == {"smoke": ["X"]}
    html, _ = written(tmp_path, paper_of(results_of()))
    assert note not in html


def test_page_and_json_have_the_same_numbers(sample: tuple[Page, dict, str]) -> None:
    page, numbers, _ = sample
    found = 0
    for experiment in numbers["experiments"]:
        for told in experiment["claims"]:
            anchor = f"{experiment['anchor']}.{told['name']}"
            assert page.values.get(anchor, []) == [check["measured"] for check in told["checks"]]
            for text in ("statement", "reference", "method", "tolerance_reason", "note"):
                assert told[text] in page.texts[anchor]
            rows = page.tables.get(anchor, [])[1:]
            assert [row[1] for row in rows] == [check["label"] for check in told["checks"]]
            assert [row[0] for row in rows] == ["✓holds" if check["holds"] else "✗fails" for check in told["checks"]]
            found += len(rows)
    assert found > 10
    summary = {row[0]: row[-11:] for row in page.tables[""]}
    for title, tally in [
        ("all", numbers["summary"]),
        *((each["title"], each["summary"]) for each in numbers["experiments"]),
    ]:
        counts = [*tally["stated"].values(), *tally["derived"].values(), *tally["runs"].values()]
        assert [0 if cell == "·" else int(cell) for cell in summary[title][:10]] == counts
        for verdict, number in tally["claims"].items():
            assert number == tally["stated"][verdict] + tally["derived"][verdict]


def judged(name: str, *, holds: bool = True, origin: str = "paper", **words: str) -> Claim:
    check = Check(label="y", measured=1.0, low=0.0 if holds else 2.0)
    told = claim(name, name.upper(), lambda _: Evidence(checks=(check,)), **words)
    return replace(told, origin=origin)  # pyright: ignore


@pytest.mark.parametrize("origins", [("paper", "theory", "beyond"), ("paper",), ("theory",), ("beyond",)])
def test_claims_stand_with_those_of_the_same_origin(origins: tuple[Any, ...], tmp_path: Path) -> None:
    html, numbers = written(tmp_path, paper_of(results_of(claims=tuple(judged(each, origin=each) for each in origins))))
    page, first = Page(html), numbers["experiments"][0]
    assert {each["name"]: each["origin"] for each in first["claims"]} == {name: name for name in origins}
    for section in ("paper", "theory", "beyond"):
        text = page.texts.get(f"sample.{section}", "")
        assert [name for name in ("paper", "theory", "beyond") if name.upper() in text] == [section] * (
            section in origins
        )
    assert numbers["summary"]["stated"]["holds"] == origins.count("paper")
    assert numbers["summary"]["derived"]["holds"] == len(origins) - origins.count("paper")
    folded = [attributes for tag, attributes in page.elements if tag == "details" and attributes.get("id")]
    assert [("open" in each) for each in folded] == [origins == ("beyond",)] * ("beyond" in origins)


def test_only_what_the_paper_itself_claims_can_fail_in_red(tmp_path: Path) -> None:
    derived = (judged("theory", holds=False, origin="theory"), judged("beyond", holds=False, origin="beyond"))
    html, _ = written(tmp_path / "a", paper_of(results_of(claims=(judged("own"), *derived))))
    classes = [(attributes.get("class") or "").split() for _, attributes in Page(html).elements]
    assert not any("fails" in each or "failing" in each for each in classes)
    assert html.count("does not hold</span>") == 4, "in the table and at the claim"
    html, _ = written(tmp_path / "b", paper_of(results_of(claims=(judged("own", holds=False), *derived))))
    page = Page(html)
    assert "OWN" in page.texts["failing"] or "OWN" in html[html.index('class="failing"') :][:600]
    assert [each for each in ("THEORY", "BEYOND") if each in html[html.index('class="failing"') :][:600]] == []


@pytest.mark.parametrize(
    ("claims", "sentence"),
    [
        ([judged("a"), judged("b")], "All 2 claims of the paper at preset quick hold."),
        ([judged("a")], "The claim of the paper at preset quick holds."),
        (
            [judged("a"), judged("b", holds=False), judged("c", origin="theory")],
            "Of 2 claims of the paper at preset quick 1 holds, 1 does not. "
            "The statement that follows from its theory holds.",
        ),
        (
            [judged("a", holds=False), judged("b", holds=False)],
            "Of 2 claims of the paper at preset quick 0 hold, 2 do not.",
        ),
        ([judged("a", origin="beyond"), judged("b", origin="beyond")], "All 2 probes of ours hold."),
    ],
)
def test_what_came_out_is_a_sentence(claims: list[Claim], sentence: str, tmp_path: Path) -> None:
    html, numbers = written(tmp_path, paper_of(results_of(claims=tuple(claims))))
    assert numbers["result"] == sentence
    assert f'<p class="result">{sentence}</p>' in html
    assert f'<p class="result">{sentence}</p>' in (tmp_path / "report.html").read_text()


def test_the_papers_own_words_stand_beside_ours(sample: tuple[Page, dict, str]) -> None:
    page, numbers, html = sample
    (first, *others) = numbers["experiments"][0]["claims"]
    assert first["quotation"].startswith("alignment between β(t) and b")
    assert f"“{first['quotation']}”" in page.texts["sample.figure2.n-over-p"]
    assert html.count("<blockquote>") == 1
    assert {each["quotation"] for each in others} == {""}


def test_headlines_are_figures_on_top(sample: tuple[Page, dict, str]) -> None:
    _, numbers, html = sample
    ((figure),) = numbers["figures"]
    check = numbers["experiments"][0]["claims"][0]["checks"][0]
    assert figure["headline"] == "cosine of narrow networks"
    assert {name: figure[name] for name in check} == check
    top = html[: html.index("<main>")]
    assert f'value="{check["measured"]}"' in top
    assert "cosine of narrow networks" in top


def test_a_page_leaves_those_of_other_papers_alone(tmp_path: Path) -> None:
    other = paper_of(results_of(claims=(judged("a"),)))
    pages = [write_report(tmp_path, [paper_results(2)])[1][0]]
    before = pages[0].stat().st_mtime_ns
    renamed = replace(other.paper, name="other", experiments=(replace(other.results[0].experiment, name="other.x"),))
    results = replace(other.results[0], experiment=renamed.experiments[0])
    index, written_now = write_report(tmp_path, [PaperResults(paper=renamed, results=(results,))])
    assert written_now == [tmp_path / "report" / "other.html"]
    assert pages[0].stat().st_mtime_ns == before
    links = [each.get("href") for tag, each in Page(index.read_text()).elements if tag == "a"]
    assert {"report/sample.html", "report/other.html"} <= set(links)
    pages[0].with_suffix(".json").write_text('{"format": 1}')
    write_report(tmp_path, [PaperResults(paper=renamed, results=(results,))])
    assert "falign report sample" in index.read_text(), "what cannot be read is named, and how to mend it"


def test_each_experiment_says_its_preset(tmp_path: Path) -> None:
    first = results_of(claims=(judged("a"),), pictures=(LINE,))
    second = replace(empty(), preset="smoke")
    html, numbers = written(tmp_path, paper_of(first, second))
    assert numbers["presets"] == {"quick": ["X"]}, "of the other nothing is done"
    done = replace(first, experiment=replace(first.experiment, name="sample.y", title="Y"), preset="smoke")
    html, numbers = written(tmp_path, paper_of(first, done))
    assert numbers["presets"] == {"quick": ["X"], "smoke": ["Y"]}
    assert [each["preset"] for each in numbers["experiments"]] == ["quick", "smoke"]
    page = Page(html)
    for name, preset in (("x", "quick"), ("y", "smoke")):
        assert f"Preset {preset}, 1 run." in page.texts[f"sample.{name}.figure.line"]
    assert "Presets are mixed" in html
    assert "at presets quick and smoke" in numbers["result"]


def test_a_claim_is_judged_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def read(table: pl.DataFrame) -> Evidence:
        calls.append(table.height)
        return Evidence(checks=(Check(label="y", measured=1.0),))

    results = results_of(claims=(claim("once", "Once.", read),))
    assert [verdict.verdict for verdict in results.verdicts] == ["holds"]  # as the terminal shows it
    written(tmp_path, paper_of(results))
    assert calls == [2]


def test_runs_that_did_not_end_are_counted_and_told(sample: tuple[Page, dict, str]) -> None:
    page, numbers, _ = sample
    first = numbers["experiments"][0]
    assert first["summary"]["runs"] == {"done": 144, "diverged": 3, "failed": 1, "missing": 2}
    assert [run["seed"] for run in first["unfinished"]] == [0, 1, 2, 3]
    assert first["unfinished"][3] == {
        "status": "failed",
        "point": {"activation": "relu", "ridge": 30.0, "p": 400},
        "seed": 3,
        "message": "MemoryError: <1 GiB & less>",
    }
    text = page.texts["sample.figure2"]
    assert "3 diverged" in text
    assert "1 failed" in text
    assert "2 missing" in text
    assert "MemoryError: <1 GiB & less>" in text
    assert "activation = relu, ridge = 30.0, p = 400" in text


def test_what_is_not_run_says_so(sample: tuple[Page, dict, str]) -> None:
    page, numbers, _ = sample
    second = numbers["experiments"][1]
    assert second["summary"]["runs"] == {"done": 0, "diverged": 0, "failed": 0, "missing": 4}
    assert second["claims"][0]["verdict"] == "not run"
    assert second["figures"][0] == {
        "name": "digits",
        "caption": "Alignment against the epoch.",
        "status": "not run",
        "reason": "no run is done",
        "data": None,
    }
    assert "falign reproduce sample.figure3 --preset quick" in page.texts["sample.figure3"]


def test_figures_data_are_what_was_drawn(sample: tuple[Page, dict, str]) -> None:
    _, numbers, _ = sample
    results = alignment(3)
    for told, picture in zip(numbers["experiments"][0]["figures"], results.experiment.pictures, strict=True):
        assert told["status"] == "drawn"
        assert told["data"] == picture.data(results.table).to_dict(as_series=False)


def test_nothing_is_loaded_from_outside(sample: tuple[Page, dict, str]) -> None:
    page, _, html = sample
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'<]*", html))
    assert {address.removeprefix("https:") for address in addresses} == {"//arxiv.org/abs/2106.06044"}
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "data", "action", "poster"):
            assert name not in attributes, f"<{tag} {name}>"
        if address := attributes.get("href"):
            assert address.startswith(("#", "data:")) or tag == "a"
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    assert "@import" not in html


def test_ids_are_unique_and_links_lead_somewhere(sample: tuple[Page, dict, str]) -> None:
    page, _, html = sample
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        address = attributes.get("href") or ""
        if address.startswith("#"):
            assert address[1:] in ids, f"<{tag} href={address}>"
    assert set(re.findall(r"url\(#([\w-]+)\)", html)) <= set(ids)
    labelled = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labelled <= set(ids)


def test_headings_are_in_order_and_figures_are_named(sample: tuple[Page, dict, str]) -> None:
    page, _, _ = sample
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 2
    assert all(each["role"] == "img" and each["aria-label"] for each in drawings)


def test_hard_characters_survive(tmp_path: Path) -> None:
    hard = "</script><script>alert(1)</script> <b>&amp; \"double\" 'single' {{ 7 * 7 }} {% raw %} λ ∠ 𝒩"
    told = claim(
        "hard",
        hard,
        lambda _: Evidence(checks=(Check(label=hard, measured=1.0),), note=hard),
        hard,
        method=hard,
        tolerance_reason=hard,
    )
    picture = Picture(
        name="hard", caption=hard, data=lambda table: table.with_columns(text=pl.lit(hard)), draw=one_line
    )
    result = results_of(claims=(told,), pictures=(picture,))
    html, numbers = written(
        tmp_path, paper_of(result, title=hard, authors=hard, venue=hard, address="javascript:alert(1)")
    )
    page = Page(html)
    assert page.texts["sample.x.hard"].count(hard) == 6
    assert page.tables["sample.x.hard"][1][1] == hard
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not any((each.get("href") or "").startswith("javascript") for _, each in page.elements)
    assert numbers["experiments"][0]["claims"][0]["statement"] == hard
    assert numbers["experiments"][0]["figures"][0]["data"]["text"] == [hard] * 2


def one_line(data: pl.DataFrame) -> object:
    figure, (panel,) = style.panels(1, width=3)
    panel.plot(data["y"])
    return figure


LINE = Picture(name="line", caption="A line.", data=lambda table: table, draw=one_line)  # pyright: ignore


def broken(_: object) -> object:
    raise ValueError("no column <y> & more")


@pytest.mark.parametrize("where", ["data", "draw"])
def test_a_picture_that_breaks_takes_nothing_with_it(tmp_path: Path, where: str) -> None:
    parts = {"data": lambda table: table, "draw": one_line}
    bad = Picture(name="bad", caption="Bad.", **{**parts, where: broken})  # pyright: ignore
    good = Picture(name="good", caption="Good.", **parts)  # pyright: ignore
    html, numbers = written(tmp_path, paper_of(results_of(pictures=(bad, good), claims=CLAIMS[-1:])))
    first, second = numbers["experiments"][0]["figures"]
    line = broken.__code__.co_firstlineno + 1
    assert (first["status"], first["reason"]) == ("failed", f"ValueError: no column <y> & more (test_report.py:{line})")
    assert second["status"] == "drawn"
    page = Page(html)
    assert "no column <y> & more" in page.texts["sample.x.figure.bad"]
    assert "cannot be drawn" in page.texts["sample.x.figure.bad"]
    assert "hold" in page.texts["sample.x.hard-characters"]


@pytest.mark.parametrize("reason", ["empty", "missing"])
def test_a_picture_without_runs_is_not_run(tmp_path: Path, reason: str) -> None:
    def lacking(table: pl.DataFrame) -> pl.DataFrame:
        if reason == "missing":
            raise Missing("no runs at p = 10⁹")
        return table.clear()

    picture = Picture(name="none", caption="None.", data=lacking, draw=broken)  # pyright: ignore
    html, numbers = written(tmp_path, paper_of(results_of(pictures=(picture,))))
    told = numbers["experiments"][0]["figures"][0]
    assert told["status"] == "not run"
    assert told["reason"] == ("no runs at p = 10⁹" if reason == "missing" else "the runs that it shows are not done")
    assert told["reason"] in Page(html).texts["sample.x.figure.none"]


def test_a_claim_that_breaks_is_not_run_and_says_how(tmp_path: Path) -> None:
    html, numbers = written(tmp_path, paper_of(results_of(claims=(claim("bad", "Bad.", broken), CLAIMS[-1]))))
    bad, good = numbers["experiments"][0]["claims"]
    line = broken.__code__.co_firstlineno + 1
    reason = f"the claim cannot be read: ValueError: no column <y> & more (test_report.py:{line})"
    assert (bad["verdict"], bad["message"]) == ("not run", reason)
    assert good["verdict"] == "holds"
    assert bad["message"] in Page(html).texts["sample.x.bad"]


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    checks = (
        Check(label="nan", measured=math.nan, low=0.0),
        Check(label="inf", measured=math.inf, low=0.0),
        Check(label="any", measured=-math.inf),
        Check(label="lower", measured=1.0, high=2.0),
    )
    picture = Picture(
        name="odd", caption="Odd.", data=lambda _: pl.DataFrame({"y": [1.0, math.nan, math.inf, None]}), draw=one_line
    )
    told = claim("odd", "Odd.", lambda _: Evidence(checks=checks))
    html, numbers = written(tmp_path, paper_of(results_of(claims=(told,), pictures=(picture,))))
    experiment = numbers["experiments"][0]
    ends = [(each["measured"], each["low"], each["high"], each["holds"]) for each in experiment["claims"][0]["checks"]]
    assert ends == [
        ("NaN", 0.0, None, False),
        ("Infinity", 0.0, None, True),
        ("-Infinity", None, None, True),
        (1.0, None, 2.0, True),
    ]
    assert experiment["claims"][0]["verdict"] == "fails"
    assert experiment["figures"][0]["data"] == {"y": [1.0, "NaN", "Infinity", None]}
    rows = Page(html).tables["sample.x.odd"][1:]
    assert [row[2] for row in rows] == ["not a number", "∞", "−∞", "1"]
    assert [row[3] for row in rows] == ["≥ 0", "≥ 0", "any number", "≤ 2"]


def test_provenance_lists_distinct_values(tmp_path: Path) -> None:
    first, second = results_of(), empty()
    other = Results(
        experiment=second.experiment,
        preset="quick",
        table=second.table,
        runs=second.runs,
        provenance=({"threads": 2, "git": {"commit": "abc", "changed": False}}, {"threads": 4}),
    )
    html, numbers = written(tmp_path, paper_of(first, other))
    assert numbers["experiments"][1]["provenance"][1] == {"threads": 4}
    text = Page(html).texts["sample"]
    assert "git changedno" in text.replace("\n", "")
    assert text.count("threads") == 1


def test_nothing_at_all(tmp_path: Path) -> None:
    index, pages = write_report(tmp_path / "new" / "folder", [])
    assert pages == []
    assert "No paper was asked for" in index.read_text()


def test_same_results_same_files_but_for_the_time(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture = Picture(name="line", caption="Line.", data=lambda table: table, draw=one_line)  # pyright: ignore
        html, _ = written(tmp_path / name, paper_of(results_of(claims=CLAIMS[-1:], pictures=(picture,))))
        made.append(re.sub(r"<p class=\"when\">.*?</p>", "", html, flags=re.DOTALL))
    assert made[0] == made[1]


def test_a_folder_that_cannot_be_written_leaves_the_old_page(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(WriteError, match=r"report\.html"):
        write_report(tmp_path, ())
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot make the folder"):
        write_report(tmp_path / "file", ())


def test_messages_of_a_run_without_one(tmp_path: Path) -> None:
    result = results_of()
    task = Task("sample.x", 1, {"p": 2}, 7)
    runs = pl.DataFrame([row_of_a_run(task, "failed", None), row_of_a_run(task, "diverged", "at step 3")])
    changed = Results(experiment=result.experiment, preset="quick", table=result.table, runs=runs, provenance=())
    _, numbers = written(tmp_path, paper_of(changed))
    told = numbers["experiments"][0]["unfinished"]
    assert [(run["seed"], run["message"]) for run in told] == [(7, ""), (7, "at step 3")]


def test_many_runs_that_did_not_end_do_not_fill_the_page(tmp_path: Path) -> None:
    result = results_of()
    rows = [row_of_a_run(Task("sample.x", 1, {"p": 2}, seed), "failed", f"at {seed}") for seed in range(1500)]
    changed = Results(
        experiment=result.experiment, preset="quick", table=result.table, runs=pl.DataFrame(rows), provenance=()
    )
    html, numbers = written(tmp_path, paper_of(changed))
    told = numbers["experiments"][0]
    assert (len(told["unfinished"]), told["untold"], told["summary"]["runs"]["failed"]) == (1000, 500, 1500)
    text = Page(html).texts["sample.x"]
    assert "1500 runs that diverged, failed or lack their data" in text
    assert "and 1400 more" in text
    assert "at 99" in text
    assert "at 100" not in text


def test_data_of_a_picture_that_are_too_many_are_left_out(tmp_path: Path) -> None:
    data = pl.DataFrame({"y": [0.0] * 600_000})
    picture = Picture(name="large", caption="Large.", data=lambda _: data, draw=lambda _: one_line(data.head(2)))  # pyright: ignore
    html, numbers = written(tmp_path, paper_of(results_of(pictures=(picture,))))
    told = numbers["experiments"][0]["figures"][0]
    assert (told["status"], told["data"]) == ("drawn", None)
    assert told["reason"] == "its data have 600000 rows, which are too many for this file"
    assert "PNG" in html
    assert ">CSV<" not in html
