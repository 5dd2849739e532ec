"""Pictures drawn for the page: as SVG that is seen, as PNG and CSV that can be taken along."""

import io
from dataclasses import dataclass

import matplotlib
import polars as pl
from matplotlib.figure import Figure

from falign.lab.experiment import Missing, Picture
from falign.lab.report.house import HOUSE
from falign.lab.report.svg import Drawing, inline

_DPI = 160
_CELLS = 500_000
"""So many values of a picture's data are put on the page at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A picture that could be drawn; ``csv`` is None where its data are too many to be taken along."""

    picture: Picture
    data: pl.DataFrame
    drawing: Drawing
    png: bytes
    csv: bytes | None


@dataclass(frozen=True, kw_only=True)
class NotDrawn:
    """A picture that could not: not run, or failed; and why."""

    picture: Picture
    status: str
    reason: str


def drawn(picture: Picture, table: pl.DataFrame, prefix: str) -> Drawn | NotDrawn:
    """Draw a picture from the runs that were done.

    Args:
        picture: The picture.
        table: Records of the runs that were done.
        prefix: What no other picture's ids on the page begin with.

    Returns:
        The picture; whatever its functions raise is told as the reason why there is none.
    """
    if table.is_empty():
        return NotDrawn(picture=picture, status="not run", reason="no run is done")
    try:
        data = picture.data(table)
        if data.is_empty():
            return NotDrawn(picture=picture, status="not run", reason="the runs that it shows are not done")
        with matplotlib.rc_context(HOUSE):
            figure = picture.draw(data)
            if (layout := figure.get_layout_engine()) is not None:
                layout.execute(figure)  # once for both files: it takes half as long as drawing
                figure.set_layout_engine("none")
            drawing = inline(figure, prefix, picture.caption)
            image = png(figure)
        csv = data.write_csv().encode() if data.height * data.width <= _CELLS else None
        return Drawn(picture=picture, data=data, drawing=drawing, png=image, csv=csv)
    except Missing as missing:
        return NotDrawn(picture=picture, status="not run", reason=str(missing))
    except Exception as error:  # a picture's functions are anyone's: the other pictures and the claims go on
        return NotDrawn(picture=picture, status="failed", reason=f"{type(error).__name__}: {error}")


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file on white."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return content.getvalue()
