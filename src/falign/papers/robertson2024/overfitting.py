"""Training on labels of which some are wrong, until they are learned by heart."""

import polars as pl

from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Picture, Point, Scalar, Setting, grid
from falign.lab.experiment.statistics import around, final, largest, mean, paired, sorted_groups, summary
from falign.lab.report.style import AXIS, Figure, band, each_of, panels
from falign.papers._images import load_images
from falign.papers.robertson2024._training import (
    STYLES,
    Record,
    start_training,
    train_and_measure,
    with_images,
    with_noise,
)

__all__ = ["OVERFITTING"]

_RULES = ("bp", "fa", "usf")
_NOISE = 0.2
"""Share of wrong labels in the paper's experiment."""


def _points(dataset: str, **sizes: Scalar) -> tuple[Point, ...]:
    """All rules with and without noise."""
    return grid(dataset=dataset, rule=_RULES, noise=(0.0, _NOISE), **sizes)


_SIZES = {"scale": 0.6, "rate": 0.1, "momentum": 0.9, "batch": 100}

_RECORDS = 20


def _run(
    *,
    seed: int,
    setting: Setting,
    dataset: str,
    images: int,
    noise: float,
    model: str,
    rule: str,
    scale: float,
    rate: float,
    momentum: float,
    batch: int,
    epochs: int,
) -> Outcome:
    """Train a network on labels of which some are wrong, and record its errors on the way."""
    training = start_training(
        with_noise(with_images(load_images(dataset, setting), images, seed), noise, seed),
        seed,
        setting,
        dataset=dataset,
        model=model,
        rule=rule,
        rate=rate,
        batch=batch,
        momentum=momentum,
        scale=None if rule == "bp" else scale,
    )
    learner, steps = training.learner, training.steps_of_epoch()
    weights = [learner.model.get_parameter(f"{name}.weight") for name in learner.layers]

    def measure(done: int) -> list[Record]:
        loss, right = learner.test(training.train)
        test_error = 1 - learner.test(training.test)[1]
        norm = sum(float(weight.detach().square().sum()) for weight in weights)
        return [
            {
                "epoch": done // steps,
                "train_loss": loss,
                "train_error": 1 - right,
                "test_error": test_error,
                "norm": norm,
            }
        ]

    # Dense early, when most is learned.
    at = sorted({round(epochs * (k / _RECORDS) ** 2) for k in range(_RECORDS + 1)})
    return train_and_measure(training, [epoch * steps for epoch in at], measure)


_RUN = ["dataset", "noise", "rule"]
_NOISY = pl.col("noise") > 0
_FITTED = 0.01


def _by_rule(runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """[("digits, fa", its runs)]."""
    return [(f"{name}, {rule}", rows) for (name, rule), rows in sorted_groups(runs, ["dataset", "rule"])]


def _interpolates(table: pl.DataFrame) -> Evidence:
    groups = _by_rule(final(table, by=_RUN))
    return largest(groups, "train_error", _FITTED, label="{label}: most of {rows} runs")


def _below_noise(table: pl.DataFrame) -> Evidence:
    groups = _by_rule(final(table, by=_RUN))
    checks = []
    for label, runs in groups:
        estimate = mean(runs["test_error"], of=label)
        checks.append(Check(label=label, measured=estimate.value, high=runs["noise"][0] - estimate.half(len(groups))))
    return Evidence(checks=tuple(checks), note=f"{table['seed'].n_unique()} runs a rule")


def _as_clean(table: pl.DataFrame) -> Evidence:
    noise = float(table["noise"].to_numpy().max())
    differences = [
        (label, paired(runs, "test_error", axis="noise", low=0.0, high=noise, by=["dataset", "rule"]))
        for label, runs in _by_rule(final(table, by=_RUN))
    ]
    return around(differences, 0, side="at most", note=f"{table['seed'].n_unique()} runs a rule")


def _no_worse(table: pl.DataFrame) -> Evidence:
    ends = final(table, by=_RUN)
    differences = [
        (f"{name}, {rule} less bp", paired(runs, "test_error", axis="rule", low="bp", high=rule, by=["dataset"]))
        for (name,), runs in ends.group_by(["dataset"], maintain_order=True)
        for rule in runs["rule"].unique().sort().to_list()
        if rule != "bp"
    ]
    return around(differences, 0, side="at most")


_INDEX = (
    "A study of benign overfitting (4,000 images of MNIST, 20 % wrong labels), by an index of papers; its numbers are "
    "not readable"
)

_ZERO = "0 or less, and half the 99 % interval of the difference on top (Student's t over the seeds, all together)."

_CLAIMS = (
    Claim(
        name="interpolates",
        statement="Each rule learns the training labels by heart, the wrong ones too.",
        reference=_INDEX,
        method="Share of training labels, wrong ones included, that the network does not give at the end; the most of "
        "all runs of a rule.",
        tolerance_reason=f"At most {_FITTED:g}: a twentieth of the wrong labels.",
        read=_interpolates,
        scope=_NOISY,
    ),
    Claim(
        name="benign",
        statement="It still generalises: on right test labels it errs less often than its training labels were wrong.",
        reference=_INDEX + ". “Benign” in the weakest sense, which is ours",
        method="Test error at the end, on right labels.",
        tolerance_reason="Below the share of wrong training labels by half the 99 % interval of the mean over the "
        "seeds (Student's t, all together). The nearest neighbour's label would be wrong that often.",
        read=_below_noise,
        scope=_NOISY,
    ),
    Claim(
        name="benign-strict",
        statement="Learning wrong labels by heart costs nothing: the test error is that of training on right labels.",
        reference=_INDEX + ". “Benign” in the strict sense of theory, where the excess error vanishes",
        method="Test error at the end less that of the same network trained as long on right labels, paired by seed.",
        tolerance_reason=_ZERO,
        read=_as_clean,
    ),
    Claim(
        name="overfits-like-backpropagation",
        statement="Feedback alignment and sign feedback overfit no worse than backpropagation.",
        origin="beyond",
        reference="Not in what is readable of the paper: whether the rule matters",
        method="Test error at the end less backpropagation's, paired by seed: the same images, wrong labels and "
        "weights.",
        tolerance_reason=_ZERO,
        read=_no_worse,
        scope=_NOISY,
    ),
)


_SHOWN = ("train_error", "test_error", "norm")


def _errors_and_norms(data: pl.DataFrame) -> Figure:
    """Training error, test error and squared norm of the weights by epoch; a row a data set."""
    from matplotlib.lines import Line2D

    sets = each_of(data, "dataset")
    figure, axes = panels(
        3,
        len(sets),
        titles=[title for name, _ in sets for title in (f"{name}: training error", "Test error", "Weights")],
        xlabels=["epoch"],
        ylabels=["share of labels not given"] * len(sets),
        height=3.0,
    )
    noise = float(data["noise"].to_numpy().max())
    for row, (_, rows) in enumerate(sets):
        for panel, shown in zip(axes[3 * row :], _SHOWN, strict=False):
            for rule, runs in each_of(rows.filter(pl.col("shown") == shown), "rule", tuple(STYLES)):
                clean = runs.filter(pl.col("noise") == 0).sort("epoch")
                panel.plot(clean["epoch"], clean["mean"], color=STYLES[rule].colour, linestyle=":", linewidth=1.4)
                noisy = runs.filter(pl.col("noise") > 0).sort("epoch")
                spread = noisy["sd"].fill_null(0)
                low, high = noisy["mean"] - spread, noisy["mean"] + spread
                band(panel, noisy["epoch"], noisy["mean"], low, high, label=rule, colour=STYLES[rule].colour)
            if shown != "norm":
                panel.axhline(noise, color=AXIS, linewidth=0.9, linestyle="--")
                panel.set_ylim(0, 2 * noise)
        axes[3 * row + 2].set_ylabel("Σ|W|²")
    handles, labels = axes[0].get_legend_handles_labels()
    handles += [
        Line2D([], [], color=AXIS, linewidth=1.7),
        Line2D([], [], color=AXIS, linestyle=":", linewidth=1.4),
        Line2D([], [], color=AXIS, linestyle="--", linewidth=0.9),
    ]
    labels += [f"{noise:.0%} of the labels wrong", "all labels right", "share of wrong labels"]
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def _picture_data(table: pl.DataFrame) -> pl.DataFrame:
    keys = ["dataset", "noise", "rule", "epoch"]
    return pl.concat([summary(table, value, by=keys).with_columns(shown=pl.lit(value)) for value in _SHOWN])


OVERFITTING = Experiment(
    name="robertson2024.overfitting",
    title="Benign overfitting",
    source="Robertson and Koyejo 2024; 4,000 images of MNIST with 20 % wrong labels, by an index of papers",
    revision=1,
    grid={
        "smoke": _points("digits", model="mlp:64", images=200, epochs=10, **_SIZES),
        "quick": _points("digits", model="mlp:512", images=1000, epochs=120, **_SIZES),
        "paper": tuple(
            point
            for dataset in ("mnist", "fashion-mnist", "mnist-10k")
            for point in _points(dataset, model="mlp:1000", images=4000, epochs=300, **_SIZES)
        ),
    },
    seeds={"smoke": 2, "quick": 8, "paper": 10},
    run=_run,
    agreement=1e-4,
    together=("rule", "noise"),
    at_most=8,
    cost=lambda *, epochs, images: float(epochs * images),
    pictures=(
        Picture(
            name="overfitting",
            caption="Training on labels of which a fifth was changed to another class: share of training labels, wrong "
            "ones included, that the network does not give; test error on right labels; sum of the squared weights. "
            "Mean ± standard deviation; dotted: the same with all labels right, means only.",
            data=_picture_data,
            draw=_errors_and_norms,
        ),
    ),
    claims=_CLAIMS,
)
