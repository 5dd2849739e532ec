"""Text for rich: names, messages and paths are data, and never markup or commands to a terminal."""

import csv
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from traceback import walk_tb
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from falign.lab._streams import echo, plain, replace_unencodable

__all__ = [
    "echo",
    "explained",
    "one_line",
    "plain",
    "plain_cell",
    "print_plain",
    "print_table",
    "standard_console",
    "table_csv",
]


def plain_cell(text: object) -> Text:
    """Make a cell of a table that is shown literally: no markup, no emoji, no control characters."""
    return Text(plain(text))


def print_plain(console: Console, text: object) -> None:
    """Print a text literally; long lines are not broken, so that they can be copied."""
    console.print(plain_cell(text), soft_wrap=True)


def standard_console(*, error: bool = False) -> Console:
    """Make a console on standard output or standard error; what its encoding lacks becomes a question mark."""
    replace_unencodable(sys.stderr if error else sys.stdout)
    return Console(stderr=error)


def print_table(table: Table, console: Console) -> None:
    """Print a table so that nothing of it is cut: cells are broken between words, and a table too wide into parts.

    Every part begins with the first column. What goes to a file or a pipe is as wide as it needs, unless the variable
    ``COLUMNS`` says how wide that is.
    """
    wide = not console.is_terminal and "COLUMNS" not in os.environ
    for part in [table] if wide else _parts(table, console.width):
        if wide:
            natural = Measurement.get(console, console.options.update(width=_WIDEST), part).maximum
            console = Console(file=console.file, width=max(console.width, natural))
        console.print(part)


def table_csv(table: Table) -> str:
    """Return the cells of a table as comma-separated values, with its header."""
    content = io.StringIO()
    rows = zip(*([str(each) for each in column.cells] for column in table.columns), strict=True)
    writer = csv.writer(content, lineterminator="\n")
    writer.writerows([[str(column.header) for column in table.columns], *rows])
    return content.getvalue().rstrip("\n")


def _parts(table: Table, width: int) -> list[Table]:
    """Split a table by its columns into such as fit a width, if need be, and set the widths of the columns."""
    between = sum(table.padding[1::2]) + 1  # a divider; the edges are two, and the dividers one less than the columns
    sizes = [_sizes(column) for column in table.columns]
    groups, used = [[0]], 1 + between + sizes[0][0]
    for number, (least, _) in enumerate(sizes[1:], 1):
        if used + between + least > width and len(groups[-1]) > 1:
            groups.append([0])
            used = 1 + between + sizes[0][0]
        groups[-1].append(number)
        used += between + least
    parts = []
    for group in groups:
        part = Table(box=table.box, padding=table.padding, title=None if parts else table.title)
        part.title_style = table.title_style
        fitted = _fitted([sizes[number] for number in group], width - 1 - between * len(group))
        for place, (number, size) in enumerate(zip(group, fitted, strict=True)):
            column = replace(table.columns[number], _index=place, width=size, max_width=None, no_wrap=False)
            part.columns.append(replace(column, overflow="fold"))
        part.rows = table.rows
        parts.append(part)
    return parts


def _sizes(column: Column) -> tuple[int, int]:
    """Return how narrow a column may be, with lines broken between words, and how wide it is."""
    cells = [str(each) for each in column.cells]
    texts = [str(column.header), *cells]
    broken = [str(column.header)] if column.no_wrap else texts
    words = [*(word for text in broken for word in text.split(" ")), *(cells if column.no_wrap else ())]
    most = column.max_width or _WIDEST
    return min(most, max(map(cell_len, words))), min(most, max(map(cell_len, texts)))


def _fitted(sizes: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Return the widths of columns that share a line: the widest becomes narrower as long as that breaks no word."""
    widths = [most for _, most in sizes]
    while sum(widths) > room:
        larger = [number for number, (least, _) in enumerate(sizes) if widths[number] > least]
        if not larger:
            break
        widths[max(larger, key=widths.__getitem__)] -= 1
    return widths


_WIDEST = 10_000
"""Letters of a line of a table at most."""
_LENGTH = 300
"""Letters of an error's text that are repeated in a message."""


def one_line(error: BaseException) -> str:
    """Return kind and text of an error in one line, shortened and fit to be shown."""
    kind = type(error).__name__
    try:
        text = " ".join(plain(error).split())
    except Exception:  # errors of the user's code may fail at this, too
        text = ""
    text = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
    return f"{kind}: {text}" if text else kind


_OTHERS = ("<", str(Path(__file__).parents[1]), str(Path(walk_tb.__code__.co_filename).parent))
"""Beginnings of the files that are not the user's: of no file, falign's, Python's."""


def explained(error: BaseException, *functions: Callable[..., Any]) -> str:
    """Return kind, text and place of an error of the user's code: "KeyError: 'loss' (mine.py:31)".

    The place is the last line at work of a file of the functions, else of the user's own: polars raises an error deep
    inside of itself, and the line to look at is the one that asked for the column.

    Args:
        error: The error, caught.
        functions: The functions that were called.
    """
    own = {getattr(getattr(function, "__code__", None), "co_filename", None) for function in functions}
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)][1:]
    of_user = [frame for frame in frames if not frame[0].startswith(_OTHERS) and "site-packages" not in frame[0]]
    inside = [frame for frame in frames if frame[0] in own] or of_user
    where = f" ({plain(Path(inside[-1][0]).name)}:{inside[-1][1]})" if inside else ""
    return one_line(error) + where
