"""The page: one HTML file that asks for nothing outside itself."""

from base64 import b64encode
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from falign.lab.report.colours import PALETTE, on_dark
from falign.lab.report.content import Report
from falign.lab.report.drawing import Drawn
from falign.lab.report.numbers import digits_of, duration, interval, shown
from falign.lab.report.svg import variable
from falign.lab.report.track import tracks


def page(report: Report) -> str:
    """Render a report.

    Every text of a paper, a claim or a run is escaped; the only markup that is not is what falign itself made:
    the drawings, the style sheet and the script.

    Args:
        report: What it says.

    Returns:
        The whole HTML document.
    """
    light, dark = _colours(report)
    return _environment().get_template("page.html.jinja").render(report=report, light=light, dark=dark)


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
    made.globals["is_drawn"] = lambda figure: isinstance(figure, Drawn)
    made.filters.update(
        shown=shown,
        interval=interval,
        tracks=tracks,
        digits_of=digits_of,
        duration=duration,
        png=_png,
        csv=_csv,
        markup=Markup,
    )
    made.filters["several"] = _several
    return made


def _file(name: str) -> str:
    return files("falign.lab.report").joinpath(name).read_text(encoding="utf-8")


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{b64encode(content).decode()}"


def _csv(content: bytes) -> str:
    return f"data:text/csv;charset=utf-8;base64,{b64encode(content).decode()}"


def _several(count: int, one: str, more: str) -> str:
    """A count with its noun."""
    return f"{count} {one if count == 1 else more}"


def _colours(report: Report) -> tuple[Markup, Markup]:
    """CSS variables of the page and of all its figures, for light and for dark."""
    used = {
        colour
        for paper in report.papers
        for part in paper.experiments
        for figure in part.figures
        if isinstance(figure, Drawn)
        for colour in figure.drawing.colours
    }
    light = {f"--{name}": pair[0] for name, pair in PALETTE.items()}
    dark = {f"--{name}": pair[1] for name, pair in PALETTE.items()}
    light |= {variable(colour): colour for colour in sorted(used)}
    dark |= {variable(colour): on_dark(colour) for colour in sorted(used)}
    return _declarations(light), _declarations(dark)


def _declarations(variables: dict[str, str]) -> Markup:
    return Markup("").join(Markup("{}:{};").format(name, value) for name, value in variables.items())
