"""From a block of runs to batches of modes, one mode a run, and the times at which they are recorded."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from falign.lab.experiment import Task
from falign.theory.deep_linear import Modes, modes, scheme


def batches(tasks: Sequence[Task]) -> Iterator[tuple[list[int], Modes]]:
    """The runs of a rule and depth together, each from the named start of its point, with unit feedback.

    Args:
        tasks: Their points have "rule", "depth", "scheme", "size" and "target".

    Yields:
        Places of the runs in the block, and their modes [runs].
    """
    for kind in dict.fromkeys((task.point["rule"], task.point["depth"]) for task in tasks):
        places = [at for at, task in enumerate(tasks) if (task.point["rule"], task.point["depth"]) == kind]
        yield places, started([tasks[at] for at in places])


def started(tasks: Sequence[Task]) -> Modes:
    """Runs of one rule and depth as modes [runs], see ``batches``."""
    points = [task.point for task in tasks]
    starts = [scheme(str(point["scheme"])).start(float(point["size"]), int(point["depth"])) for point in points]
    weights = torch.tensor([[float(weight) for weight in start] for start in starts], dtype=torch.float64).mT
    target = torch.tensor([float(point["target"]) for point in points], dtype=torch.float64)
    return modes(target, list(weights), rule=points[0]["rule"])  # pyright: ignore[reportArgumentType]  # it checks


def paced(begun: Modes, pace: Float[Tensor, "*modes"]) -> Modes:
    """The same modes in units in which time runs so many times faster.

    ``θ_l → aθ_l``, ``λ → a^L λ`` and ``c_l → a^(L-l) c_l`` leave the shares as they are and multiply ρ by
    ``a^(2L-2)``: an exact symmetry of every rule. So one list of times, or one step size, fits all modes.

    Args:
        begun: Any modes with s = 1.
        pace: ``a^(2L-2)`` of each.
    """
    depth = begun.depth
    a = pace ** (1 / (2 * depth - 2))
    powers = [depth - 1 - place if begun.rule == "dfa" else 1 for place in range(depth - 1)]
    return replace(
        begun,
        weights=begun.weights * a,
        feedback=torch.stack([m * a**power for m, power in zip(begun.feedback, powers, strict=True)]),
        target=begun.target * a**depth,
    )


def logarithmic_times(first: float, last: float, count: int) -> Float[Tensor, " times"]:
    """0, and then so many times evenly on a logarithmic axis."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(*_decades(first, last), count).double()])


def _decades(first: float, last: float) -> tuple[float, float]:
    low, high = torch.tensor([first, last], dtype=torch.float64).log10().tolist()
    return low, high
