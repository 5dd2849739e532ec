"""The report: every figure and every claim beside what was measured, a page a paper and the same numbers in JSON."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from falign.lab._files import WriteError, atomic_write

if TYPE_CHECKING:
    from falign.lab.experiment._results import PaperResults
    from falign.lab.report._content import Training

__all__ = ["write_report"]


def write_report(
    out: Path, papers: "Sequence[PaperResults]", training: "Training | None" = None
) -> tuple[Path, list[Path]]:
    """Write ``report/PAPER.html`` and ``report/PAPER.json`` of each paper, then ``report.html``, the index of all.

    Each file is written whole or not at all, and no page of another paper is touched: the index has all whose pages
    are there. A claim that cannot be read or a picture that cannot be drawn is shown as such, with the reason; neither
    keeps the rest from being written.

    Args:
        out: The folder; made if it is not there.
        papers: What is there of each paper.
        training: Trained rules: ``demo.html`` shows them, and below them the last of the papers.

    Returns:
        The path of the index, and those of the papers' pages.

    Raises:
        WriteError: A file cannot be written; what was there before is still there.
    """
    # not before it is needed: who imports an experiment, which names colours of the style, imports this package
    from falign.lab.report._content import compose
    from falign.lab.report._document import document
    from falign.lab.report._page import index, page

    folder, pages = out / "report", []
    _make_folder(folder)
    for results in papers:
        report = compose(results)
        pages.append(folder / f"{results.paper.name}.html")
        atomic_write(pages[-1], _encoded(page(report, index="../report.html")))
        numbers = json.dumps(document(report), allow_nan=False, ensure_ascii=False, indent=1)
        atomic_write(pages[-1].with_suffix(".json"), _encoded(numbers))
        if training is not None:
            together = replace(report, training=training)
            atomic_write(out / "demo.html", _encoded(page(together, index="report.html")))
    atomic_write(out / "report.html", _encoded(index(folder)))
    return out / "report.html", pages


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make the folder {folder}: {error.strerror or error}") from None


def _encoded(text: str) -> bytes:
    r"""UTF-8; what it cannot hold, such as bytes of file names, is written out as ``\udcfc``, as JSON itself does."""
    return text.encode(errors="backslashreplace")
