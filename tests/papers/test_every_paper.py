"""What holds of the experiments of every paper."""

import pytest

from falign.lab.experiment import PRESETS, Experiment
from falign.papers import PAPERS

EXPERIMENTS = [
    pytest.param(paper.name, experiment, id=experiment.name)
    for paper in PAPERS.values()
    for experiment in paper.experiments
]


@pytest.mark.parametrize(("paper", "experiment"), EXPERIMENTS)
def test_presets_change_sizes_and_repetitions_only(paper: str, experiment: Experiment) -> None:
    assert experiment.name.startswith(f"{paper}.")
    assert set(experiment.grid) == set(experiment.seeds) == set(PRESETS)
    axes = {preset: {tuple(sorted(point)) for point in experiment.grid[preset]} for preset in PRESETS}
    assert axes["smoke"] == axes["quick"] == axes["paper"]
    for preset in PRESETS:
        keys = [task.key for task in experiment.tasks(preset)]
        assert len(set(keys)) == len(keys)
