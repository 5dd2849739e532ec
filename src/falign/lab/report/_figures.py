"""Pictures drawn for the page: as SVG that is seen, and as CSV that can be taken along."""

import io
import math
import re
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import polars as pl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator

from falign.lab._text import explained
from falign.lab.experiment import Missing, Picture
from falign.lab.report._numbers import format_number, power_of_ten
from falign.lab.report.style import RC_PARAMS

# SVG that lives inside a page: no ids that clash, no addresses, colours of the page.

_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_POINT = 4 / 3
"""CSS pixels a point."""


@dataclass(frozen=True)
class Drawing:
    """SVG markup.

    Args:
        markup: One ``<svg>`` element.
        width: Its natural width in CSS pixels.
        colours: What it was drawn in; each is a CSS variable in the markup, named as ``variable`` says.
    """

    markup: str
    width: int
    colours: frozenset[str]


def variable(colour: str) -> str:
    """The name of the CSS variable that stands for a colour of a figure."""
    return f"--c{colour[1:].lower()}"


def inline(figure: Figure, prefix: str, label: str) -> Drawing:
    """Draw a figure as part of a page.

    Text stays text: small, searchable, in the page's own font, and positioned by its anchor, so that a font of
    other widths does no harm. Colours become CSS variables, so that a figure follows the page into the dark.

    Args:
        figure: The figure; drawn within ``style.RC_PARAMS``.
        prefix: What no other figure's ids on the page begin with.
        label: What a screen reader says.

    Returns:
        The drawing, the same for the same figure.
    """
    content = io.BytesIO()
    # not by savefig, which draws everything twice: the sizes are known, and there is no box to fit
    FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(content.getvalue())
    _strip(root)
    _rename(root, prefix)
    colours = _theme(root)
    box = root.attrib["viewBox"]
    width = round(float(box.split()[2]) * _POINT)
    root.attrib = {
        "viewBox": box,
        "role": "img",
        "aria-label": label,
        "style": f"--width:{width}px",
        # matplotlib says this in a style sheet for all elements, which inside a page would be the whole page
        "stroke-linejoin": "round",
        "fill": "currentColor",
    }
    return Drawing(ElementTree.tostring(root, encoding="unicode"), width, frozenset(colours))


def _strip(root: ElementTree.Element) -> None:
    """Drop namespaces, metadata, style sheets and indentation: an HTML parser needs none of them."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if element.tag not in {"text", "tspan"}:
            element.text = None
        if element.tag != "tspan":
            element.tail = None
        if "d" in element.attrib:
            element.attrib["d"] = " ".join(element.attrib["d"].split())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {"metadata", "style"}:
                parent.remove(child)


def _rename(root: ElementTree.Element, prefix: str) -> None:
    """Prefix every id that something refers to, and drop the others."""
    references = re.compile(r"url\(#([^)]+)\)")
    used = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href" and value.startswith("#"):
                used.add(value[1:])
                element.attrib[name] = f"#{prefix}-{value[1:]}"
            elif targets := references.findall(value):
                used.update(targets)
                element.attrib[name] = references.sub(rf"url(#{prefix}-\1)", value)
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.attrib["id"] = f"{prefix}-{name}"


def _theme(root: ElementTree.Element) -> set[str]:
    """Let text take the page's font and every colour be a variable."""
    colours = set()
    for element in root.iter():
        style = element.attrib.get("style")
        if style is None:
            continue
        kept = [part.strip() for part in style.split(";") if not part.strip().startswith("font-family")]
        colours |= {colour.lower() for colour in _COLOUR.findall(style)}
        element.attrib["style"] = _COLOUR.sub(
            lambda colour: f"var({variable(colour[0])})", ";".join(filter(None, kept))
        )
    return colours


_DPI = 160
_CELLS = 500_000
"""So many values of a picture's data are put on the page at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RenderedFigure:
    """A picture that could be drawn; ``csv`` is None where its data are too many to be taken along."""

    picture: Picture
    data: pl.DataFrame
    drawing: Drawing
    csv: bytes | None


@dataclass(frozen=True, kw_only=True)
class MissingFigure:
    """A picture that could not: not run, or failed; and why."""

    picture: Picture
    status: str
    reason: str


def render(picture: Picture, table: pl.DataFrame, prefix: str) -> RenderedFigure | MissingFigure:
    """Draw a picture from the runs that were done.

    Args:
        picture: The picture.
        table: Records of the runs that were done.
        prefix: What no other picture's ids on the page begin with.

    Returns:
        The picture; whatever its functions raise is told as the reason why there is none.
    """
    if table.is_empty():
        return MissingFigure(picture=picture, status="not run", reason="no run is done")
    try:
        data = picture.data(table)
        if data.is_empty():
            return MissingFigure(picture=picture, status="not run", reason="the runs that it shows are not done")
        with matplotlib.rc_context(RC_PARAMS):
            figure = picture.draw(data)
            if (layout := figure.get_layout_engine()) is not None:
                layout.execute(figure)  # once: drawing would do it again
                figure.set_layout_engine("none")
            drawing = inline(figure, prefix, picture.caption)
        csv = data.write_csv().encode() if data.height * data.width <= _CELLS else None
        return RenderedFigure(picture=picture, data=data, drawing=drawing, csv=csv)
    except Missing as missing:
        return MissingFigure(picture=picture, status="not run", reason=str(missing))
    except Exception as error:  # a picture's functions are anyone's: the other pictures and the claims go on
        reason = explained(error, picture.data, picture.draw)
        return MissingFigure(picture=picture, status="failed", reason=reason)


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file on white."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return content.getvalue()


# Ticks of logarithmic axes, with numbers written without mathtext, which other fonts would pull apart. Their classes
# subclass matplotlib's, which the style imports only to draw: so they are here.


class Decades(LogLocator):
    """Powers of ten; where there are too few of them, also their double and fivefold."""

    def __init__(self) -> None:
        super().__init__(numticks=7)

    def tick_values(self, vmin: Any, vmax: Any) -> Any:
        """Places of the ticks."""
        self.set_params(subs=(1.0, 2.0, 5.0) if vmin > 0 and max(vmin, vmax) < 50 * min(vmin, vmax) else (1.0,))
        return super().tick_values(vmin, vmax)


class Powers(Formatter):
    """Plain numbers where all ticks of an axis are handy, powers of ten where there are none else."""

    def __call__(self, x: Any, pos: Any = None) -> str:
        return format_number(x, 3)

    def format_ticks(self, values: Any) -> list[str]:
        """The labels of all ticks together."""
        ticks = [float(value) for value in values]
        low, high = sorted(self.axis.get_view_interval())  # pyright: ignore
        seen = [value for value in ticks if low <= value <= high]
        if not all(_is_power(value) for value in ticks) or all(0.01 <= value <= 1000 for value in seen):
            return [format_number(value, 3) for value in ticks]
        return ["1" if value == 1 else power_of_ten(round(math.log10(value))) for value in ticks]


def _is_power(value: float) -> bool:
    return value > 0 and math.isclose(value, 10 ** round(math.log10(value)))
