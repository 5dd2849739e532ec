"""The demonstration: four rules trained on the digits that scikit-learn ships, and a paper, on one page."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import torch
from rich.console import Console

from falign.lab import _compare
from falign.lab._options import ExecutionOptions
from falign.lab._text import print_plain
from falign.lab._train import train
from falign.lab.config import TrainConfig
from falign.lab.experiment import _reproduce
from falign.lab.experiment._selection import Selection
from falign.lab.report import write_report
from falign.lab.report._content import Training
from falign.lab.report._figures import inline
from falign.lab.report.style import RC_PARAMS

_RULES = {
    "bp": "the transposed weights",
    "fa": "random fixed weights",
    "dfa": "random fixed weights, straight from the output",
    "usf": "the signs of the weights",
}
"""Rule -> by what it sends the error back."""
_CONFIG = TrainConfig("digits", model="mlp:64-128-128-10", epochs=20, batch_size=32)


def demonstrate(
    selection: Selection,
    preset: str,
    *,
    runs: Path,
    out: Path,
    workers: int,
    console: Console,
    config: TrainConfig = _CONFIG,
) -> int:
    """Train the same network by four rules, reproduce a paper, and write a page on which both stand.

    Args:
        selection: The paper.
        preset: Its preset.
        runs: Folder in which each rule gets a run folder; those of an earlier demonstration are replaced.
        out: Folder of the results; what is there of the paper is not computed again.
        workers: Processes that compute the paper.
        console: Where all is printed.
        config: What is trained; its rule is replaced.

    Returns:
        The exit code of the paper's reproduction.

    Raises:
        RunError: A folder cannot be used.
        WriteError: Something cannot be written.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a network two only wait for each other
    folders = [runs / f"demo-{rule}" for rule in _RULES]
    for rule, folder in zip(_RULES, folders, strict=True):
        console.rule(rule)
        train(replace(config, rule=rule), folder, replaces=True, console=console)
    trained = _compare.read(folders)
    _compare.show(trained, console)
    torch.set_num_threads(threads)
    console.rule(", ".join(paper.name for paper in selection.papers))
    options = ExecutionOptions(workers=workers)
    code = _reproduce.reproduce(
        selection,
        preset,
        out=out,
        executor=_reproduce.make_executor(options),
        memory=_reproduce.memory_limit(options),
        console=console,
        write_report=partial(write_report, training=_training(trained, config)),
    )
    if code < 128:  # it was not interrupted
        print_plain(console, f"trained rules and paper on one page: {(out / 'demo.html').absolute().as_uri()}")
    return code


def _training(runs: Sequence[_compare.RunData], config: TrainConfig) -> Training:
    """The trained rules, as the page shows them."""
    accuracy, angle = {}, {}
    for run in runs:
        last = run.tested().row(-1, named=True)
        accuracy[run.config.rule], angle[run.config.rule] = 100 * last["test_accuracy"], last["mean_angle"]
    others = ", ".join(f"{rule} {value:.1f}" for rule, value in accuracy.items() if rule != "bp")
    with matplotlib.rc_context(RC_PARAMS):
        drawing = inline(_compare.comparison_figure(runs), "demo", "The trainings beside each other")
    return Training(
        title="Four rules learn to read digits",
        result=(
            f"Of the test digits backpropagation gets {accuracy['bp']:.1f} % right, {others}. The gradients of random "
            f"feedback (fa) end up {angle['fa']:.0f}° from the true ones, where 90° would be chance, and yet it learns."
        ),
        columns=("rule", "the error returns by", "right answers, %", "angle to the true gradient", "training, s"),
        rows=tuple(
            (
                run.config.rule,
                _RULES[run.config.rule],
                f"{accuracy[run.config.rule]:.1f}",
                f"{angle[run.config.rule]:.0f}°",
                f"{run.records['seconds'][-1]:.1f}",
            )
            for run in runs
        ),
        drawing=drawing,
        caption=(
            f"The network {config.model}, trained for {config.epochs} epochs: accuracy on the test digits, training "
            "loss, mean angle between the gradients that the layers take and their true ones, alignment dominance, and "
            "the angle of every layer at the end."
        ),
    )
