"""The ways in which a result shows itself, as text, as a table of a notebook and as a picture, of the same cells.

A result that is a ``Shown`` says once what its table holds, as texts. Text and HTML are two layouts of these, so that
neither can say what the other does not, and the picture marks what has no number by the same words.

Needs nothing but Python's standard library until something is drawn or made a data frame.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from falign._style import axes_for, nothing_to_draw, plain

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
else:  # for annotations only
    Axes = Any

# Tables: cells, and their two layouts.


class Loud(str):
    """A cell that must not be overlooked; bold in a notebook."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Content of what a result says: a sentence, a table, and notes below it.

    Attributes:
        head: The sentence.
        table: Lines of cells, the titles first; none where there is nothing to list.
        left: Columns that are flush left; the others are numbers.
        notes: Lines below the table.
    """

    head: str = ""
    table: Sequence[Sequence[str]] = ()
    left: Collection[int] = (0,)
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Lay it out for the terminal."""
        lines = aligned(self.table, left=self.left) if self.table else []
        return "\n".join([*[self.head] * bool(self.head), *lines, *self.notes])

    def html(self) -> str:
        """Lay it out for a notebook: no script, and no colours but those of the page that it stands on."""
        head = f"<p>{_html(self.head)}</p>" if self.head else ""
        notes = f"<p><small>{'<br>'.join(map(_html, self.notes))}</small></p>" if self.notes else ""
        return f'<div style="overflow-x: auto">{head}{self._html_table()}{notes}</div>'

    def _html_table(self) -> str:
        if not self.table:
            return ""
        titles, *lines = self.table
        style = 'style="text-align: {}; white-space: nowrap; padding: 0.15em 0.7em"'
        styles = [style.format("left" if place in self.left else "right") for place in range(len(titles))]
        top = "".join(f'<th scope="col" {each}>{_html(cell)}</th>' for each, cell in zip(styles, titles, strict=True))
        rows = "".join(
            f'<tr><th scope="row" {styles[0]}>{_html(first)}</th>'
            + "".join(f"<td {each}>{_html(cell)}</td>" for each, cell in zip(styles[1:], rest, strict=True))
            + "</tr>"
            for first, *rest in lines
        )
        return (
            f'<table style="font-variant-numeric: tabular-nums"><thead><tr>{top}</tr></thead><tbody>{rows}</tbody>'
            "</table>"
        )


def _html(text: str) -> str:
    escaped = escape(plain(text)).replace("\n", "<br>")
    return f"<strong>{escaped}</strong>" if isinstance(text, Loud) and text else escaped


def aligned(table: Sequence[Sequence[str]], *, left: Collection[int]) -> list[str]:
    """Lay out the lines of a table for the terminal; the columns named are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if index in left else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """Choose at most so many of the values, the first and the last among them, at about equal distances."""
    last = len(values) - 1
    return list(values) if last < most else [values[round(place * last / (most - 1))] for place in range(most)]


def frame(rows: Sequence[Mapping[str, Any]]) -> "pl.DataFrame":
    """Make a polars table of rows; a column in which some values are lacking keeps its type.

    Raises:
        ImportError: polars is not installed.
    """
    try:
        import polars as pl
    except ImportError:
        raise ImportError('a table needs polars: pip install "falign[lab]", or take .rows()') from None
    return pl.DataFrame(rows, infer_schema_length=None)


# What shows itself.


class Shown:
    """Base of results: printed they are tables, in a notebook tables of HTML, and ``plot`` draws them."""

    def _sheet(self) -> Sheet:
        """Describe what it says."""
        raise NotImplementedError

    def _draw(self, axes: Axes) -> None:
        """Draw it."""
        nothing_to_draw("it holds no numbers; print it")

    def _size(self) -> tuple[float, float]:
        """Give width and height of its picture, in inches."""
        return 7.0, 4.0

    def __str__(self) -> str:
        return self._sheet().text()

    def _repr_html_(self) -> str:
        """Give what Jupyter and its relatives show."""
        return self._sheet().html()

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw it.

        Args:
            ax: The axes to draw on; None makes a figure of its own in the house style, which notebooks show, and which
                in a script ``plot().figure.savefig(...)`` keeps.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: ``ax`` is no axes.
            ValueError: There is nothing to draw.
        """
        with axes_for(ax, self._size()) as axes:
            self._draw(axes)
        return axes


class Tabular(Shown):
    """Base of results that are rows of numbers, too."""

    def rows(self) -> list[dict[str, Any]]:
        """Give the rows as dicts; None stands where there is no number."""
        raise NotImplementedError

    def to_polars(self) -> "pl.DataFrame":
        """Give the rows as a table.

        Raises:
            ImportError: polars is not installed.
        """
        return frame(self.rows())
