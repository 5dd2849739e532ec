"""Numbers that the page shows: curves of the simulators, and what run folders and stores hold by now."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Literal

from falign.lab._files import RunError
from falign.lab._run_folder import RunFolder
from falign.lab.experiment._catalogue import stored_keys
from falign.lab.experiment._store import is_store
from falign.theory.deep_linear import gradient_flow, learning_time, modes
from falign.theory.two_layer import Penalty, WidthFree, simulate, spaced

POINTS, INPUTS, RATE, STEPS = 20, 60, 1e-3, 400
"""Of the two-layer network: points, their dimension, learning rate, steps."""
_RECORDS = 60
Start = Literal["θ₁ = 0", "aligned", "anti-aligned"]
PARTS = (1.0, 0.3, 0.1)
"""Components of the target, as shares of λ."""
_LATEST = 1e4
"""Time at which the axis ends at the latest."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line: its name and its points (x, y)."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart.

    Attributes:
        title: What is drawn.
        x: What the horizontal axis is.
        curves: The lines.
        logarithmic: Whether the vertical axis is.
        low: Where the vertical axis begins; None is where the lines do.
        high: Where it ends.
    """

    title: str
    x: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Panels beside a sentence that says what they come to."""

    panels: tuple[Panel, ...]
    sentence: str


def two_layer(*, strength: float | int, width: int, seed: int = 0) -> Shown:
    """Train a linear two-layer network of any width, with a ridge on the output weights and without.

    Args:
        strength: λ, at least 0.
        width: p, at least 1.
        seed: Of data, weights and feedback.
    """
    penalties = [Penalty(strength), Penalty(0.0)]
    engine = WidthFree.sample([seed], n=POINTS, d=INPUTS, p=width, rate=RATE, penalties=penalties)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run that overflows ends where its line does
        path = simulate(engine, spaced(STEPS, _RECORDS), ["loss", "cosine"])
    steps = path.steps.double().tolist()
    loss = path.values["loss"][0] / path.values["loss"][0, :, :1]
    names = (f"λ = {strength:g}", "λ = 0")
    lines = {
        what: tuple(
            Curve(name=name, points=_finite(steps, values.tolist())) for name, values in zip(names, of, strict=True)
        )
        for what, of in (("loss", loss), ("cosine", path.values["cosine"][0]))
    }
    ends = [curve.points[-1][1] for curve in lines["cosine"]]
    return Shown(
        panels=(
            Panel(
                title="cos∠(b, β): output weights and feedback", x="step", curves=lines["cosine"], low=-0.2, high=1.0
            ),
            Panel(title="Loss, as a share of the first", x="step", curves=lines["loss"], logarithmic=True),
        ),
        sentence=f"With λ = {strength:g} and p = {width:,} the cosine ends at {ends[0]:.3f}, without a ridge at "
        f"{ends[1]:.3f}.",
    )


def deep_linear(*, target: float | int, invariant: float | int, start: Start) -> Shown:
    """Learn three components by gradient flow in a two-layer linear network, with feedback m = 1.

    ``K = θ_2 - θ_1²/2`` is what the flow conserves; where it is positive θ_1 begins at 0.

    Args:
        target: λ of the largest component, above 0.
        invariant: K.
        start: Where it begins if K < 0: with θ_1 = 0, or with θ_2 = 0 and θ_1 = ±√(-2K).
    """
    if invariant >= 0 or start == "θ₁ = 0":
        weights = [0.0, invariant]
    else:
        weights = [sqrt(-2 * invariant) * (1 if start == "aligned" else -1), 0.0]
    components = [target * part for part in PARTS]
    chains = modes(components, weights)
    times = [float(time) for time in learning_time(chains)]
    latest = min(_LATEST, 1.4 * max((time for time in times if isfinite(time)), default=_LATEST))
    moments = [latest * step / 100 for step in range(101)]
    share = gradient_flow(chains, times=moments, tolerance=1e-6).share.T.tolist()
    curves = tuple(
        Curve(name=f"λ = {component:.3g}", points=_finite(moments, values))
        for component, values in zip(components, share, strict=True)
    )
    order = sorted(range(3), key=times.__getitem__)
    how = {"012": "the largest first: it regularises", "210": "the smallest first: it anti-regularises"}
    listed = ", ".join(f"λ = {components[place]:.3g} at t = {times[place]:.3g}" for place in order)
    return Shown(
        panels=(Panel(title="Share of a component that is learned", x="time t", curves=curves),),
        sentence=f"90 % are learned of {listed} ({how.get(''.join(map(str, order)), 'in no order of size')}).",
    )


def _finite(x: Sequence[float], y: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None and isfinite(b)]


# Runs.


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run folder as it stands.

    Attributes:
        folder: The folder.
        status: Its status, or why it cannot be read.
        title: Data, model and rule.
        epochs: Done, of all.
        accuracy: The last of the test, in percent.
        panels: Its charts.
    """

    folder: Path
    status: str
    title: str = ""
    epochs: str = ""
    accuracy: str = ""
    panels: tuple[Panel, ...] = field(default=(), repr=False)


def trainings(folder: Path) -> list[Training]:
    """Read the run folders in a folder, the latest first; those that cannot be read say why."""
    found = [path for path in (folder, *_inside(folder)) if RunFolder(path).exists]
    found.sort(key=_changed, reverse=True)
    return [_training(path) for path in found]


def _changed(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in folder.glob("*.*"))
    except (OSError, ValueError):  # it was deleted meanwhile, or has no file yet
        return 0.0


def _training(folder: Path) -> Training:
    run = RunFolder(folder)
    try:
        config, _ = run.read_config()
        status = run.read_status()
        title = f"{config.dataset} · {config.model} · {config.rule}"
        said = str(status["status"])
        try:
            records = run.read_records()
        except RunError:  # none yet, or one that is being replaced
            return Training(folder=folder, status=said, title=title, epochs=f"0 of {config.epochs}")
    except (RunError, OSError) as error:
        return Training(folder=folder, status=f"cannot be read: {error}")
    epochs = records["epoch"].to_list()
    columns: Mapping[str, list] = {name: records[name].to_list() for name in records.columns}
    accuracy = [value for value in columns["test_accuracy"] if value is not None]

    def panel(title: str, names: Mapping[str, str], factor: float = 1.0) -> Panel:
        curves = (
            Curve(name=name, points=_finite(epochs, [None if y is None else factor * y for y in columns[column]]))
            for column, name in names.items()
            if column in columns
        )
        return Panel(title=title, x="epoch", curves=tuple(each for each in curves if each.points), low=0.0)

    angles = {name: name.removeprefix("angle_") for name in columns if name.startswith("angle_")}
    return Training(
        folder=folder,
        status=said,
        title=title,
        epochs=f"{epochs[-1] if epochs else 0:.3g} of {config.epochs}",
        accuracy=f"{100 * accuracy[-1]:.2f}" if accuracy and said != "diverged" else "",
        panels=(
            panel("Accuracy, %", {"train_accuracy": "training", "test_accuracy": "test"}, 100.0),
            panel("Loss, nats", {"train_loss": "training", "test_loss": "test"}),
            panel("Angle of the gradient to the true one, degrees", angles),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An experiment of a store, and how many of its runs have a file."""

    experiment: str
    runs: int


def experiments(store: Path) -> list[Stored]:
    """Count the runs of a store, experiment by experiment; no file is opened."""
    if not is_store(store):
        return []
    counted = [Stored(experiment=path.name, runs=len(stored_keys(path))) for path in sorted(_inside(store))]
    return [each for each in counted if each.runs]


def _inside(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
