"""The page: one HTML file that asks for nothing outside itself."""

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from falign.lab.experiment import Check
from falign.lab.report._content import Report
from falign.lab.report._document import entries
from falign.lab.report._figures import RenderedFigure, variable
from falign.lab.report._numbers import digits_of, duration, format_number, interval

# A check as a small picture: where the number lies beside its interval.

_EDGE = 5.0
"""Percent that are kept free at both ends, so that a number far off is still seen."""


@dataclass(frozen=True)
class IntervalBar:
    """Positions in percent of the track's length.

    Args:
        start: Where the interval begins.
        end: Where it ends.
        at: Where the number lies; at the track's end if it is farther off.
        open: To which side the interval has no end.
    """

    start: float
    end: float
    at: float
    open: Literal["", "up", "down"]


def interval_bars(checks: Sequence[Check]) -> list[IntervalBar | None]:
    """Places of the numbers of a claim beside their intervals.

    A closed interval takes the middle half of its track. An open one begins or ends at a third, and the farthest
    of the claim's numbers from such an end sets the scale.

    Args:
        checks: All checks of a claim.

    Returns:
        The positions, check by check; None where there is nothing to see: no end, no width, or no finite number.
    """
    off = [abs(check.measured - end) for check in checks if (end := _only_end(check)) is not None]
    farthest = max((distance for distance in off if math.isfinite(distance)), default=0.0) or 1.0
    return [_interval_bar(check, farthest) for check in checks]


def _interval_bar(check: Check, farthest: float) -> IntervalBar | None:
    low, high, measured = check.low, check.high, check.measured
    if not math.isfinite(measured) or not low < high:
        return None
    if (end := _only_end(check)) is not None:
        far = 50.0 * (measured - end) / farthest
        up = math.isfinite(low)
        return (
            IntervalBar(33.0, 100.0, _within(33.0 + far), "up")
            if up
            else IntervalBar(0.0, 67.0, _within(67.0 + far), "down")
        )
    if math.isinf(low):
        return None
    return IntervalBar(25.0, 75.0, _within(25.0 + 50.0 * (measured - low) / (high - low)), "")


def _only_end(check: Check) -> float | None:
    """The end of an interval that has one."""
    ends = [end for end in (check.low, check.high) if math.isfinite(end)]
    return ends[0] if len(ends) == 1 else None


def _within(position: float) -> float:
    return round(min(100.0 - _EDGE, max(_EDGE, position)), 2)


# Colours of the page, and how a colour that a figure was drawn in on white looks on a dark page.

PALETTE = {
    "paper": ("#fdfdfb", "#14171b"),
    "raised": ("#f5f5f1", "#1c2026"),
    "ink": ("#1c1f23", "#e6e4df"),
    "quiet": ("#5a6068", "#a3a8b0"),
    "line": ("#dcdcd5", "#343a42"),
    "link": ("#1f5fa8", "#86b6ee"),
    "holds": ("#0b6650", "#62cfae"),
    "holds-back": ("#e2f2ec", "#16312a"),
    "fails": ("#a8320c", "#ff9b73"),
    "fails-back": ("#fdeae2", "#3b2018"),
    "open": ("#555b63", "#b4b9c0"),
    "open-back": ("#ecece8", "#2a2f36"),
}
"""Name on the page -> (on a light page, on a dark one)."""

_GREY = 0.03
"""Below so much chroma a colour is ink, axis or grid, and must turn around wholly."""


def on_dark(colour: str) -> str:
    """The colour of the same hue that does on a dark page what a colour does on white.

    In OKLab (Ottosson 2020), where equal steps look equal: greys are turned around, white becoming the page;
    what has a hue keeps it, and dark becomes light, but never so dark that it is lost.

    Args:
        colour: Such as "#1f5fa8".

    Returns:
        Likewise.
    """
    lightness, a, b = _oklab(colour)
    if math.hypot(a, b) < _GREY:
        return _hexadecimal(1.0 - 0.8 * lightness, a, b)
    return _hexadecimal(0.58 + 0.35 * (1.0 - lightness), a, b)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours, from 1 to 21, after WCAG 2."""
    dark, light = sorted(_luminance(colour) for colour in (first, second))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(colour: str) -> tuple[float, float, float]:
    def one(start: int) -> float:
        value = int(colour[start : start + 2], 16) / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    return one(1), one(3), one(5)


def _oklab(colour: str) -> tuple[float, float, float]:
    r, g, b = _linear(colour)
    long = math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)
    middle = math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    short = math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def _hexadecimal(lightness: float, a: float, b: float) -> str:
    """From OKLab; what no screen can show loses chroma until it can, and keeps its hue."""
    for share in range(20, -1, -1):
        channels = _channels(lightness, a * share / 20, b * share / 20)
        if all(-1e-3 <= channel <= 1.001 for channel in channels):
            break
    else:
        channels = _channels(min(1.0, lightness), 0.0, 0.0)
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, channel)))):02x}" for channel in channels)


def _channels(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def page(report: Report, index: str) -> str:
    """Render a report.

    Every text of a paper, a claim or a run is escaped; the only markup that is not is what falign itself made:
    the drawings, the style sheet and the script.

    Args:
        report: What it says.
        index: Address of the index of all pages.

    Returns:
        The whole HTML document.
    """
    used = {
        colour
        for part in report.part.experiments
        for figure in part.figures
        if isinstance(figure, RenderedFigure)
        for colour in figure.drawing.colours
    }
    if report.training is not None:
        used |= report.training.drawing.colours
    return _render("page.html.jinja", used, report=report, index=index)


def index(folder: Path) -> str:
    """Render the index of all pages of a folder that lies beside it.

    Args:
        folder: The folder.

    Returns:
        The whole HTML document.
    """
    return _render("index.html.jinja", set(), entries=list(entries(folder)), folder=folder.name)


def _render(template: str, colours: set[str], **values: object) -> str:
    """Render a template with the CSS variables of the page and of all its figures, for light and for dark."""
    light = {f"--{name}": pair[0] for name, pair in PALETTE.items()}
    dark = {f"--{name}": pair[1] for name, pair in PALETTE.items()}
    light |= {variable(colour): colour for colour in sorted(colours)}
    dark |= {variable(colour): on_dark(colour) for colour in sorted(colours)}
    style = {"light": _declarations(light), "dark": _declarations(dark)}
    return _environment().get_template(template).render(**style, **values)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FunctionLoader(_file),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["style"] = Markup(_file("page.css"))
    made.globals["script"] = Markup(_file("page.js"))
    made.globals["is_drawn"] = lambda figure: isinstance(figure, RenderedFigure)
    made.filters.update(
        format_number=format_number,
        interval=interval,
        interval_bars=interval_bars,
        digits_of=digits_of,
        duration=duration,
        csv=_csv,
        markup=Markup,
    )
    made.filters.update(several=_several, verdict_class=_verdict_class)
    return made


def _file(name: str) -> str:
    return files("falign.lab.report").joinpath(name).read_text(encoding="utf-8")


def _csv(content: bytes) -> str:
    return f"data:text/csv;charset=utf-8;base64,{b64encode(content).decode()}"


def _several(count: int, one: str, more: str) -> str:
    """A count with its noun."""
    return f"{count} {one if count == 1 else more}"


def _verdict_class(verdict: str, own: bool) -> str:
    """The CSS class of a verdict: that a statement of the paper's own fails is red, that another one does is not."""
    return "differs" if verdict == "fails" and not own else verdict.replace(" ", "-")


def _declarations(variables: dict[str, str]) -> Markup:
    return Markup("").join(Markup("{}:{};").format(name, value) for name, value in variables.items())
