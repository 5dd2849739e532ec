"""The house style: text that is safe to show, and colours, lines and lettering of all pictures.

Needs nothing but Python's standard library until something is drawn: the command must be able to say which package is
missing, and who measures does not wait for matplotlib.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, Never
from unicodedata import category

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike
else:  # for annotations only
    Axes = ArrayLike = Any

# Text that is safe to show.

_ALLOWED = "\n\t"


def plain(text: object) -> str:
    r"""Escape everything in a text that is invisible or that steers a terminal.

    Names, messages and paths are data: one that holds control characters could rewrite what a terminal shows. They
    become ``\x1b`` and the like, as do characters that turn the direction of writing; a byte of a file name that is not
    UTF-8 becomes ``\xfc``. Line breaks and tabs stay.

    Args:
        text: A text, or what ``str`` makes one of.
    """
    return "".join(letter if _is_visible(letter) else _escaped(letter) for letter in str(text))


def _is_visible(letter: str) -> bool:
    return letter.isprintable() or letter in _ALLOWED or category(letter) == "Zs"


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that the file system's encoding does not know
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "surrogatepass").decode()


# Pictures.

INK, AXIS, GRID = "#1c1f23", "#85898f", "#e4e5e3"
"""Text and laws; ticks and frames; grids."""
COLOURS = ("#1f5fa8", "#c04a12", "#17795a", "#8a4a9c", "#8c6a00", "#5b6470")
"""Of things without an order: at least 4:1 on white, and told apart with colour-blind eyes."""
MARKERS = "osD^vP"
"""One a line, so that colour is not all that tells them apart."""

RC_PARAMS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": AXIS,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": f"cycler(color={list(COLOURS)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.xmargin": 0.03,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # it comes with matplotlib: the layout is the same everywhere
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",
    "svg.hashsalt": "falign",
    "text.color": INK,
    "xtick.color": AXIS,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": AXIS,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}
"""Settings of matplotlib in which every picture is drawn."""

_NOTHING = "\u200b"
"""A letter without width: matplotlib leaves labels that begin with an underscore out of legends."""


def literal(text: str) -> str:
    """Escape a text so that matplotlib draws it as it stands: no formula, no missing glyph, and in legends, too.

    Args:
        text: A name that the user gave to a folder, a layer or a data set.
    """
    known = _glyphs()
    shown = "".join(
        letter if ord(letter) in known else letter.encode("unicode_escape").decode() for letter in plain(text)
    ).replace("$", r"\$")
    return f"{_NOTHING}{shown}" if shown.startswith("_") else shown


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(RC_PARAMS["font.family"][0])).get_charmap())


def sequence(count: int) -> list[str]:
    """Colours of an ordered parameter, such as λ: from orange to indigo, each darker than the one before."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps["plasma"]
    return [to_hex(shades(0.62 - 0.57 * index / max(1, count - 1))) for index in range(count)]


def law(axes: Axes, x: ArrayLike, y: ArrayLike, label: str) -> None:
    """Draw a law of the theory, dashed and in ink."""
    axes.plot(x, y, color=INK, linestyle=(0, (4, 2.5)), linewidth=1.2, label=label, zorder=3)


@contextmanager
def axes_for(given: Any, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on: those given, in the style that they have, or new ones in the house style.

    Raises:
        ImportError, TypeError: the first or the second; see ``falign._show.Shown.plot``.
    """
    try:
        import matplotlib.axes
        from matplotlib import pyplot, rc_context
    except ImportError:
        raise ImportError('a picture needs matplotlib: pip install "falign[lab]"') from None
    if given is not None:
        if not isinstance(given, matplotlib.axes.Axes):
            kind = type(given).__name__
            raise TypeError(f"ax is a {kind}, expected matplotlib's Axes, such as plt.subplots() gives as its second")
        yield given
        return
    # White, as notebooks may be dark and the lettering is.
    with rc_context({**RC_PARAMS, "figure.facecolor": "white"}):
        figure, axes = pyplot.subplots(figsize=size)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        try:
            yield axes
        except BaseException:
            pyplot.close(figure)
            raise


def nothing_to_draw(why: str) -> Never:
    """Refuse to draw.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"there is nothing to draw: {why}")


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points of one kind, one a row of the picture.

    Attributes:
        label: What they are, for the legend.
        values: Number of each row; None where there is none, and a word where there is none to be read.
        spread: Length of the bars to both sides, where there are any.
    """

    label: str
    values: Sequence[float | str | None]
    spread: Sequence[float | None] = ()


_TALLEST, _NAMED = 12.0, 48
"""Inches of a picture of rows, and so many rows are named at most."""


def height_of(rows: int) -> float:
    """Height of a picture of so many rows, in inches."""
    return min(1.3 + 0.42 * max(rows, 2), _TALLEST)


def dots(
    axes: Axes,
    rows: Sequence[str],
    series: Sequence[Points],
    *,
    xlabel: str,
    title: str = "",
    marked: tuple[float, str] | None = None,
    remarks: Sequence[str] = (),
    logarithmic: bool = False,
) -> None:
    """Draw numbers of rows as points beside the rows' names, the first row on top.

    A row that has a word in place of a number has the word, at its right end. On a logarithmic axis so has a zero.

    Args:
        axes: Where to.
        rows: Their names.
        series: The points.
        xlabel: What their numbers are.
        title: Of the picture.
        marked: A number that is marked by a dashed line, and what it is.
        remarks: A word for each row, written like those in place of numbers; empty for none.
        logarithmic: Whether the numbers are drawn by powers of ten.

    Raises:
        ValueError: No row has a number or a word.
    """
    words = {row: [text] for row, text in enumerate(remarks) if text}
    drawn, step = False, 0.56 / max(len(series), 1)
    for place, points in enumerate(series):
        x, y, spreads = [], [], []
        for row, value in enumerate(points.values):
            if isinstance(value, str) or (logarithmic and value == 0):
                words.setdefault(row, []).append(f"{points.label} {value if isinstance(value, str) else 'is 0'}")
            elif value is not None and isfinite(value):
                x.append(value)
                y.append(row + step * (place - (len(series) - 1) / 2))
                spreads.append((points.spread[row] if points.spread else None) or 0.0)
        if not x:
            continue
        drawn, colour = True, COLOURS[place % len(COLOURS)]
        if any(spreads):
            axes.errorbar(x, y, xerr=spreads, fmt="none", ecolor=colour, elinewidth=1.2)
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linestyle="none", label=literal(points.label))
    if not drawn and not words:
        nothing_to_draw("no row has a number")
    if logarithmic:
        axes.set_xscale("log")
    if marked is not None:
        law(axes, [marked[0]] * 2, [-0.5, len(rows) - 0.5], marked[1])
    for row, texts in words.items():
        axes.annotate(
            "; ".join(map(literal, texts)), (1.0, row), xycoords=("axes fraction", "data"), ha="right", va="center",
            color=INK, fontsize=8.5, fontstyle="italic", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axes.set_ylim(len(rows) - 0.5, -0.5)
    every = max(1, -(-len(rows) // _NAMED))
    axes.set_yticks(range(0, len(rows), every), [literal(name) for name in rows[::every]])
    axes.set_xlabel(xlabel)
    axes.set_title(literal(title), loc="left")
    if len(series) + (marked is not None) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, borderaxespad=0.2, columnspacing=1.2)


def scale_degrees(axes: Axes) -> None:
    """Scale the horizontal axis from 0 to beyond the right angle, and as far as angles go."""
    axes.set_xlim(-3.0, max(95.0, axes.get_xlim()[1]))
    axes.set_xticks(range(0, int(axes.get_xlim()[1]) + 1, 15))
