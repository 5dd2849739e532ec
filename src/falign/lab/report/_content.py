"""The content of a report: of each paper its claims, judged, and its experiments with figures and runs."""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

import polars as pl

import falign
from falign.lab.experiment import Check, Paper
from falign.lab.experiment._results import PaperResults, Results, Verdict
from falign.lab.experiment._validation import RESERVED, Origin
from falign.lab.report._figures import Drawing, MissingFigure, RenderedFigure, render

_PACKAGES = ("torch", "numpy", "polars", "matplotlib")
_SECTIONS: dict[Origin, str] = {
    "paper": "The paper's claims",
    "theory": "What follows from the theory",
    "beyond": "Our own probes",
}
"""Titles of the page's sections, by where their claims come from."""
_TOLD = 1000
"""So many runs of an experiment that diverged or failed are told one by one; the others are counted."""


@dataclass(frozen=True)
class ClaimCounts:
    """Numbers of claims, by verdict."""

    holds: int = 0
    fails: int = 0
    not_run: int = 0

    @property
    def total(self) -> int:
        """All claims."""
        return self.holds + self.fails + self.not_run

    def __add__(self, other: "ClaimCounts") -> "ClaimCounts":
        return ClaimCounts(self.holds + other.holds, self.fails + other.fails, self.not_run + other.not_run)


@dataclass(frozen=True)
class RunTotals:
    """Numbers of runs, by status, and the seconds that they took, added up."""

    done: int = 0
    diverged: int = 0
    failed: int = 0
    missing: int = 0
    seconds: float = 0.0

    def __add__(self, other: "RunTotals") -> "RunTotals":
        return RunTotals(
            self.done + other.done,
            self.diverged + other.diverged,
            self.failed + other.failed,
            self.missing + other.missing,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Claims and runs of an experiment or a paper.

    Args:
        stated: Claims that the paper makes itself.
        theory: Claims that follow from its theory.
        beyond: Claims that go beyond it.
        runs: Runs.
    """

    stated: ClaimCounts = ClaimCounts()
    theory: ClaimCounts = ClaimCounts()
    beyond: ClaimCounts = ClaimCounts()
    runs: RunTotals = RunTotals()

    @property
    def derived(self) -> ClaimCounts:
        """Claims that the paper does not make."""
        return self.theory + self.beyond

    @property
    def claims(self) -> ClaimCounts:
        """All claims."""
        return self.stated + self.derived

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            stated=self.stated + other.stated,
            theory=self.theory + other.theory,
            beyond=self.beyond + other.beyond,
            runs=self.runs + other.runs,
        )


def count_verdicts(verdicts: Iterable[Verdict]) -> ClaimCounts:
    """Claims by verdict."""
    told = [verdict.verdict for verdict in verdicts]
    return ClaimCounts(told.count("holds"), told.count("fails"), told.count("not run"))


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A run that diverged or failed: where in the grid, and what it said."""

    status: str
    point: dict[str, Any]
    seed: int
    message: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperimentPart:
    """An experiment on the page.

    Args:
        anchor: Its id on the page.
        results: What is there of it.
        verdicts: Its claims, judged.
        figures: Its pictures, drawn.
    """

    anchor: str
    results: Results
    verdicts: tuple[Verdict, ...]
    figures: tuple[RenderedFigure | MissingFigure, ...]

    @cached_property
    def counts(self) -> Counts:
        """Its claims and runs, counted."""
        return Counts(
            stated=count_verdicts(self.of("paper")),
            theory=count_verdicts(self.of("theory")),
            beyond=count_verdicts(self.of("beyond")),
            runs=RunTotals(
                **{status: self.results.count(status) for status in ("done", "diverged", "failed")},
                missing=self.results.count("missing") + self.results.count("no data"),
                seconds=float(self.results.runs["seconds"].sum() or 0.0),
            ),
        )

    @property
    def untold(self) -> int:
        """Number of runs that diverged or failed beyond those of ``unfinished``."""
        return self._unfinished.height - len(self.unfinished)

    @property
    def _unfinished(self) -> pl.DataFrame:
        return self.results.runs.filter(pl.col("status").is_in(["diverged", "failed", "no data"]))

    @cached_property
    def unfinished(self) -> tuple[Unfinished, ...]:
        """The first runs that diverged or failed; of their points the axes along which the runs differ."""
        runs = self.results.runs
        axes = [name for name in runs.columns if name not in RESERVED and runs[name].n_unique() > 1]
        return tuple(
            Unfinished(
                status=row["status"],
                point={name: row[name] for name in axes if row[name] is not None},
                seed=row["seed"],
                message=row["message"] or "",
            )
            for row in self._unfinished.head(_TOLD).iter_rows(named=True)
        )

    def of(self, origin: Origin) -> list[Verdict]:
        """Its claims that come from somewhere, judged."""
        return [each for each in self.verdicts if each.claim.origin == origin]

    def anchor_of(self, verdict: Verdict) -> str:
        """The id of a claim on the page."""
        return f"{self.anchor}.{verdict.claim.name}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Claims of an experiment within a section of the page.

    Args:
        part: The experiment.
        verdicts: Those of its claims that belong into the section.
        first: Whether the experiment was in no section before: then its figures stand here.
    """

    part: ExperimentPart
    verdicts: list[Verdict]
    first: bool
    origin: Origin

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return self.part.anchor if self.first else f"{self.part.anchor}:{self.origin}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """Claims of a paper that come from the same place, with their experiments."""

    origin: Origin
    title: str
    blocks: tuple[Block, ...]

    @property
    def judged(self) -> list[tuple[ExperimentPart, Verdict]]:
        """Its claims, with their experiments."""
        return [(block.part, verdict) for block in self.blocks for verdict in block.verdicts]

    @property
    def counts(self) -> ClaimCounts:
        """Its claims by verdict."""
        return count_verdicts(verdict for _, verdict in self.judged)


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """A number that stands on top of the page: that of the first check of a claim that has a headline."""

    anchor: str
    headline: str
    check: Check
    stated: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class PaperPart:
    """A paper on the page."""

    paper: Paper
    experiments: tuple[ExperimentPart, ...]

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return self.paper.name

    @cached_property
    def counts(self) -> Counts:
        """Its claims and runs, counted."""
        return sum((part.counts for part in self.experiments), Counts())

    @cached_property
    def presets(self) -> dict[str, list[str]]:
        """{preset: titles of the experiments that are shown at it}, of those of which runs are there, if any are."""
        there = [part for part in self.experiments if part.counts.runs.done] or self.experiments
        found: dict[str, list[str]] = {}
        for part in there:
            found.setdefault(part.results.preset, []).append(part.results.experiment.title)
        return found

    @cached_property
    def sections(self) -> list[Section]:
        """The page's sections, those that are empty left out.

        An experiment without claims, whose figures are all that it has, is a probe of ours.
        """
        seen: set[str] = set()
        made = []
        for origin, title in _SECTIONS.items():
            blocks = []
            for part in self.experiments:
                verdicts, new = part.of(origin), part.anchor not in seen
                if verdicts or (origin == "beyond" and new):
                    blocks.append(Block(part=part, verdicts=verdicts, first=new, origin=origin))
                    seen.add(part.anchor)
            if blocks:
                made.append(Section(origin=origin, title=title, blocks=tuple(blocks)))
        return made

    @property
    def failing(self) -> list[tuple[str, Verdict]]:
        """The paper's own claims that fail, with their ids on the page."""
        return [
            (part.anchor_of(verdict), verdict)
            for part in self.experiments
            for verdict in part.of("paper")
            if verdict.verdict == "fails"
        ]

    @cached_property
    def figures(self) -> list[KeyFigure]:
        """The numbers on top of the page."""
        return [
            KeyFigure(
                anchor=part.anchor_of(verdict),
                headline=verdict.claim.headline,
                check=verdict.evidence.checks[0],
                stated=verdict.claim.origin == "paper",
            )
            for part in self.experiments
            for verdict in part.verdicts
            if verdict.claim.headline and verdict.evidence is not None
        ]

    @property
    def result(self) -> str:
        """A sentence or two on what came out."""
        presets = list(self.presets)
        sizes = f"preset {presets[0]}" if len(presets) == 1 else f"presets {' and '.join(presets)}"
        said = _told(self.counts.stated, "claim of the paper", "claims of the paper", f" at {sizes}")
        if self.counts.theory.total:
            said += " " + _told(
                self.counts.theory, "statement that follows", "statements that follow", " from its theory"
            )
        if not self.counts.stated.total and self.counts.beyond.total:
            said += " " + _told(self.counts.beyond, "probe of ours", "probes of ours", "")
        return said.strip()

    @cached_property
    def provenance(self) -> dict[str, list[str]]:
        """{what: its distinct values over all runs}; nested settings are named by their path."""
        values: dict[str, list[str]] = {}
        for part in self.experiments:
            for setting in part.results.provenance:
                for name, value in _flat(setting):
                    if value not in values.setdefault(name, []):
                        values[name].append(value)
        return values


def _told(counts: ClaimCounts, one: str, more: str, where: str) -> str:
    """A sentence on how many claims hold; empty if there are none."""
    if counts.total == 1:
        verb = {"holds": "holds", "fails": "does not hold", "not_run": "is not run yet"}
        return f"The {one}{where} {next(verb[name] for name, count in vars(counts).items() if count)}."
    if not counts.total:
        return ""
    if counts.not_run == counts.total:
        return f"None of {counts.total} {more}{where} is run yet."
    if counts.holds == counts.total:
        return f"All {counts.total} {more}{where} hold."
    rest = [f"{counts.fails} {'does' if counts.fails == 1 else 'do'} not"] if counts.fails else []
    rest += [f"{counts.not_run} {'is' if counts.not_run == 1 else 'are'} not run"] if counts.not_run else []
    return f"Of {counts.total} {more}{where} {counts.holds} hold{'s' * (counts.holds == 1)}, {', '.join(rest)}."


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """Trained rules that stand above a paper.

    Args:
        title: Heading.
        result: What came out, in a sentence.
        columns: Heads of the table; the first is of texts.
        rows: The table, one row a rule.
        drawing: The runs beside each other.
        caption: What the drawing shows.
    """

    title: str
    result: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    drawing: Drawing
    caption: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that a page and its JSON file say.

    Args:
        when: When it was written, in UTC.
        versions: Of the packages that it was written with.
        part: The paper.
        training: Trained rules, which then come first.
    """

    when: datetime
    versions: dict[str, str]
    part: PaperPart
    training: Training | None = None


def compose(results: PaperResults, training: Training | None = None) -> Report:
    """Judge all claims of a paper and draw all its pictures.

    Args:
        results: What is there of the paper.
        training: Trained rules that stand above it.

    Returns:
        What its page says.
    """
    return Report(
        when=datetime.now(UTC).replace(microsecond=0),
        versions={
            "falign": falign.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        part=PaperPart(paper=results.paper, experiments=tuple(map(_experiment, results.results))),
        training=training,
    )


def _experiment(results: Results) -> ExperimentPart:
    name = results.experiment.name
    return ExperimentPart(
        anchor=name,
        results=results,
        verdicts=results.verdicts,
        figures=tuple(
            render(picture, results.table, f"{name}.{picture.name}".replace(".", "-"))
            for picture in results.experiment.pictures
        ),
    )


def _flat(setting: dict[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for name, value in setting.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name} ")
        elif isinstance(value, (list, tuple)):
            yield f"{path}{name}", " ".join(map(str, value))
        elif value is not None:
            yield f"{path}{name}", ("yes" if value else "no") if isinstance(value, bool) else str(value)
