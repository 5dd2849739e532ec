"""The pictures of one run, each a function of its tables."""

import matplotlib
from matplotlib.figure import Figure

from falign.lab.config import TrainConfig
from falign.lab.pictures.angles import angles
from falign.lab.pictures.curves import accuracy, loss
from falign.lab.pictures.dominance import dominance
from falign.lab.pictures.law import law
from falign.lab.pictures.lines import layer_colours, literal
from falign.lab.pictures.neurons import neurons
from falign.lab.report.drawing import png
from falign.lab.report.house import HOUSE
from falign.lab.runs import Run
from falign.lab.tables import Tables

__all__ = ["draw", "figures"]


def draw(run: Run, tables: Tables, config: TrainConfig) -> None:
    """Write the pictures of a run.

    Args:
        run: Where to.
        tables: What was measured.
        config: What was run; the titles say it.

    Raises:
        WriteError: A picture cannot be written.
    """
    with matplotlib.rc_context(HOUSE):
        for name, figure in figures(tables, config).items():
            run.write(name, png(figure))


def figures(tables: Tables, config: TrainConfig) -> dict[str, Figure]:
    """{file name: figure} of the pictures, in all of which a layer has the same colour.

    Args:
        tables: What was measured.
        config: What was run.

    Returns:
        The figures, not yet drawn; that of the conservation law only where it was checked.
    """
    about = literal(f"{config.rule} · {config.dataset} · {config.model}")
    records, alignment, colours = tables.records, tables.alignment, layer_colours(tables.records)
    found = {
        "loss.png": loss(records, about),
        "accuracy.png": accuracy(records, about),
        "angles.png": angles(records, alignment, colours, about),
        "neurons.png": neurons(tables.neurons, colours, about),
        "dominance.png": dominance(records, alignment, colours, about),
    }
    return found if tables.law is None else found | {"law.png": law(tables.law, colours, about)}
