"""The conservation law under practical training: plain descent, and what departs from it."""

from collections.abc import Iterator, Sequence

import polars as pl

from falign.lab.data import Dataset, load
from falign.lab.experiment import Experiment, Outcome, Picture, Point, Scalar, Setting, Task
from falign.lab.experiment.statistics import summary
from falign.measure import ConservationLaw
from falign.papers.robertson2024.conservation_claims import CLAIMS, MOMENTUM, off_diagonal
from falign.papers.robertson2024.cuts import with_images
from falign.papers.robertson2024.drawing_conservation import diagonals, drifts
from falign.papers.robertson2024.training import Record, Training, course, start

_NETWORKS = "falign.papers.robertson2024.networks"
_CASES: dict[str, dict[str, Scalar]] = {
    "plain": {},
    "momentum": {"momentum": MOMENTUM},
    "Adam": {"optimizer": "adam"},
    "decay": {"weight_decay": 0.01},
    "equilibrium": {"weight_decay": 0.05},
    "tanh": {"activation": "tanh"},
    "residual": {},
    "batch norm": {},
}
"""Case -> options of training."""
_RATES = {"momentum": 1 - MOMENTUM, "Adam": 0.02}
"""η of a case over that of plain descent. Momentum: the same effective rate η/(1-μ). Adam: about the same progress."""
_TRACKING = 0.1
"""adafa: α/η, so that there is a limit of small steps."""
_RECORDS = 4
_TIME = 8.0
"""Length of a training in η × steps."""


def run(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Train the runs of a block one after the other, in float64; the images are loaded once."""
    data = load(str(tasks[0].point["dataset"]), folder=setting.data, progress=False)
    return [_trained(data, task, setting) for task in setting.each(tasks)]


def _trained(data: Dataset, task: Task, setting: Setting) -> Outcome:
    point, steps = task.point, int(task.point["steps"])
    case, rate = str(point["case"]), float(point["rate"])
    options = {"dtype": "float64", "scale": float(point["scale"]), **_CASES[case]}
    if point["rule"] == "adafa":
        options["adafa_rate"] = _TRACKING * rate
    part = with_images(data, int(point["images"]), task.seed)
    training = start(part, {**point, "rate": rate * _RATES.get(case, 1.0)}, task.seed, setting, **options)
    law = ConservationLaw(training.learner.model, training.learner.optimizer, example=training.x[:2])
    at = [round(steps * k / _RECORDS) for k in range(1, _RECORDS + 1)]
    return course(training, at, lambda done: list(_rows(training, law)))


def _rows(training: Training, law: ConservationLaw) -> Iterator[Record]:
    """A record a layer that feeds another."""
    changes, values, drifts = law.changes(), law.value(), law.drift()
    for depth, row in enumerate(law.report().laws):
        incoming, outgoing = (float(change.sum()) for change in changes[row.layer])
        own = training.learner.model.get_submodule(row.layer).named_parameters()
        weights = [part for name, part in own if "feedback" not in name.split(".")]
        size = sum(float(part.detach().square().sum()) for part in weights) / 2
        value = values[row.layer]
        yield {
            "layer": row.layer,
            "depth": depth,
            "law": row.status,
            "order": row.order,
            "incoming_change": incoming,
            "outgoing_change": outgoing,
            "incoming": size,
            "value": float(value.sum()),
            "negative": float((value < 0).double().mean()),
            "apart": float(drifts[row.layer].abs().sum()),
            "drift": row.drift,
            "residual": row.residual,
        }


def _points(mlp: str, rates: Sequence[float], *, rest: int, **sizes: Scalar) -> tuple[Point, ...]:
    """Plain descent by four rules, the departures from it by feedback alignment, and decay until it is at rest.

    Args:
        mlp: The perceptron.
        rates: η of plain feedback alignment, falling; the others have the first and the last of them. All train for as
            long, 8/η steps.
        rest: Steps of the training with decay that comes to rest, at the first rate and in batches of 128.
        sizes: Further values of every point.
    """
    conv = f"{_NETWORKS}:pooled"
    kinds = (
        *(("plain", rule, model) for rule in ("fa", "usf", "kp", "adafa") for model in (mlp, conv)),
        *((case, "fa", model) for case in ("momentum", "Adam", "decay") for model in (mlp, conv)),
        ("tanh", "fa", mlp),
        ("residual", "fa", f"{_NETWORKS}:residual"),
        ("batch norm", "fa", f"{_NETWORKS}:normalised"),
    )
    points = [
        {"case": case, "rule": rule, "model": model, "rate": rate, "steps": round(_TIME / rate), "batch": 32}
        for case, rule, model in kinds
        for rate in (rates if (case, rule) == ("plain", "fa") else (rates[0], rates[-1]))
    ]
    points.append({"case": "equilibrium", "rule": "fa", "model": mlp, "rate": rates[0], "steps": rest, "batch": 128})
    return tuple({**point, "scale": 0.6, **sizes} for point in points)


def _diagonal(table: pl.DataFrame) -> pl.DataFrame:
    """Changes of both sides along the training of the first seed at the smallest rate, a row a record and layer."""
    shown = (pl.col("seed") == 0) & (pl.col("case") != "equilibrium") & (pl.col("rate") == pl.col("rate").min())
    columns = ["dataset", "case", "rule", "model", "layer", "depth", "step", "incoming_change", "outgoing_change"]
    return table.filter(shown).select(columns).sort(columns[:-2])


def _drifts(table: pl.DataFrame) -> pl.DataFrame:
    """Σ|C(T) - C(0)| over all neurons at the end, by rate."""
    runs = off_diagonal(table.filter(pl.col("case") != "equilibrium"))
    return summary(runs, "apart", by=["dataset", "case", "rule", "model", "rate"])


CONSERVATION = Experiment(
    name="robertson2024.conservation",
    title="The conservation law under practical training",
    source="Robertson and Koyejo 2024, abstract (“a novel conservation law”); the discrete identity is derived",
    revision=1,
    grid={
        "smoke": _points("mlp:16-16", (0.8, 0.4), rest=20, dataset="digits", images=200),
        "quick": _points("mlp:64-64", (0.1, 0.05, 0.025), rest=1000, dataset="digits", images=1437),
        "paper": tuple(
            point
            for name, images in (("mnist", 60000), ("fashion-mnist", 60000), ("mnist-10k", 9000))
            for point in _points("mlp:256-256", (0.1, 0.05, 0.025, 0.0125), rest=5000, dataset=name, images=images)
        ),
    },
    seeds={"smoke": 2, "quick": 5, "paper": 5},
    run=run,
    agreement=1e-9,
    together=("case", "rule", "model", "rate", "steps", "batch"),
    at_most=8,
    cost=lambda task: float(int(task.point["steps"])),
    pictures=(
        Picture(
            name="conservation",
            caption="Change of ½|W|² + ½|b|² of each layer against that of ⟨B, W⟩ of the layer that it feeds, along "
            "training at the smallest rate; one seed. Under plain descent the law puts them on the diagonal but for "
            "½Ση²|g|². Filled: perceptron; open: convolutions. usf has Σ|B||W|, kp ⟨B, W⟩ - ½|W|² in place of ⟨B, W⟩; "
            "adafa's own motion of B takes it off the diagonal.",
            data=_diagonal,
            draw=diagonals,
        ),
        Picture(
            name="conservation-rates",
            caption="What the neurons drift from the law, Σ|C(T) - C(0)|, against η for trainings of the same length "
            "in η × steps (momentum and Adam: the η of plain descent beside which they are put); mean ± standard "
            "deviation. Where the law holds in the limit it falls as η. Filled: perceptron; open: convolutions.",
            data=_drifts,
            draw=drifts,
        ),
    ),
    claims=CLAIMS,
)
