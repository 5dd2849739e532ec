"""Several runs in one picture."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from falign.lab.compare import Record, shared
from falign.lab.pictures.dominance import against_minus_one
from falign.lab.pictures.lines import TITLE, Line, decades, degrees, line, literal, plot
from falign.lab.report.house import HOUSE
from falign.lab.report.style import COLOURS, panels

_NAMED = 6
"""Up to so many layers are named."""
_MANY = matplotlib.colormaps["turbo"]
"""Colours of more runs than the house has inks."""


@matplotlib.rc_context(HOUSE)
def figure(runs: Sequence[Record]) -> Figure:
    """Test accuracy, training loss, mean angle and dominance against the epoch, and the last angle of every layer.

    One line a run; the legend has the last panel.
    """
    titles = (
        "Test accuracy",
        "Training loss",
        "Mean angle before the last layer",
        "Alignment dominance D",
        "Angle of every layer at the end",
        "",
    )
    made, (accuracy, loss, mean, dominance, layers, names) = panels(3, 2, titles=titles, width=11, height=3.1)
    made.suptitle(literal(" · ".join(shared(runs).values())), **TITLE)
    named = [f"{name} (diverged)" if run.diverged else name for run, name in zip(runs, _names(runs), strict=True)]
    labels = list(zip(runs, named, _colours(len(runs)), strict=True))

    def lines(column: str, factor: float = 1.0) -> list[Line]:
        return [line(run.tested(), column, name, colour, factor) for run, name, colour in labels]

    plot(accuracy, lines("test_accuracy", 100.0))
    _trained(accuracy)
    plot(loss, lines("train_loss"))
    decades(loss)
    plot(mean, lines("mean_angle"))
    against_minus_one(dominance, lines("dominance"))
    _angles_at_the_end(layers, labels)
    degrees(mean, layers)
    accuracy.set_ylabel("right answers, %")
    loss.set_ylabel("cross-entropy")
    mean.set_ylabel("degrees")
    layers.set_ylabel("degrees")
    names.axis("off")
    drawn = accuracy.get_lines()
    names.legend(drawn, [str(each.get_label()) for each in drawn], loc="center left", ncols=1 + len(runs) // 14)
    return made


def _angles_at_the_end(axes: Axes, labels: Sequence[tuple[Record, str, str]]) -> None:
    """The last angle of every layer, in the order in which they run; names where all runs have the same few."""
    shown: set[tuple[str, ...]] = set()
    for run, name, colour in labels:
        angles = {layer: angle for layer, angle in run.last_angles().items() if angle is not None}
        shown.add(tuple(angles))
        axes.plot(range(1, len(angles) + 1), list(angles.values()), color=colour, label=literal(name), marker="o")
    axes.set_xlabel("layer, from the input")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(shown) == 1 and 0 < len(same := shown.pop()) <= _NAMED:
        axes.set_xticks(range(1, len(same) + 1), [literal(layer) for layer in same])
        axes.set_xlabel("layer")


def _names(runs: Sequence[Record]) -> list[str]:
    """What tells the runs apart in a picture: the rule, else rule and seed, else the folder."""
    for names in (
        [run.config.rule for run in runs],
        [f"{run.config.rule}, seed {run.config.seed}" for run in runs],
    ):
        if len(set(names)) == len(runs):
            return names
    return [run.name for run in runs]


def _trained(target: Axes) -> None:
    """Let the axis begin below the first epoch's end: the untrained start would press all lines together."""
    values = [y for drawn in target.lines for x, y in drawn.get_xydata() if x >= 1]  # pyright: ignore
    if values:
        low, high = min(values), max(values)
        target.set_ylim(max(0.0, low - 0.1 * (high - low) - 1), min(100.5, high + 0.1 * (high - low) + 1))


def _colours(count: int) -> list[str]:
    return (
        list(COLOURS[:count])
        if count <= len(COLOURS)
        else [to_hex(_MANY(index / (count - 1))) for index in range(count)]
    )
