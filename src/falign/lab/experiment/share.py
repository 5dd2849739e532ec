"""What a block takes of a node of a Ray cluster, and how many blocks a node has room for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from falign.lab.config import ConfigError
from falign.lab.experiment.blocks import needed
from falign.lab.experiment.execution import Block

Node = Mapping[str, Any]
"""An entry of ``ray.nodes()``."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Cores and GPUs that a block takes.

    Ray gives out several whole ones, or a part of one in steps of 1/10000.

    Args:
        cpus: Cores.
        gpus: GPUs; 0.25 puts four blocks on each.

    Raises:
        ConfigError: Ray cannot give that out.
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for option, value in (("--cpus-per-run", self.cpus), ("--gpus-per-run", self.gpus)):
            fits = 0.0001 <= value < 1 or (isfinite(value) and value >= 1 and value == int(value))
            if not fits and not (value == 0 and option == "--gpus-per-run"):
                raise ConfigError(f"{option} is {value:g}, expected a part of 1, such as 0.5, or a whole number")

    @property
    def threads(self) -> int:
        """Threads of a block: one a core, and one for a part of a core."""
        return max(1, int(self.cpus))

    def room(self, node: Node) -> int:
        """How many blocks a node can have at work at once; no block gets its GPU in two parts."""
        by_cores = _whole(_has(node, "CPU") / self.cpus)
        if self.gpus == 0:
            return by_cores
        gpus = _has(node, "GPU")
        return min(by_cores, _whole(gpus / self.gpus) if self.gpus >= 1 else int(gpus) * _whole(1 / self.gpus))

    def memory(self, block: Block, nodes: Sequence[Node]) -> int | None:
        """Bytes to be set aside for a block, so that a node takes no more blocks than fit into its memory.

        Never more than the largest node has: such a block would wait for ever.

        Returns:
            The bytes; None if the block does not say, or needs them on a GPU.
        """
        if block.experiment.memory is None or self.gpus:
            return None
        largest = max((_has(node, "memory") for node in nodes), default=0.0)
        return min(needed(block), int(largest)) or None

    def refusal(self, nodes: Sequence[Node]) -> str:
        """That no node has room for a block, and what nodes there are."""
        listed = "; ".join(
            f"{node['NodeManagerAddress']} has {_has(node, 'CPU'):g} and {_has(node, 'GPU'):g}" for node in nodes
        )
        return (
            f"no node of the Ray cluster has the cores and GPUs for one run, --cpus-per-run {self.cpus:g} and "
            f"--gpus-per-run {self.gpus:g} ({listed or 'no node is left'})"
        )


def _has(node: Node, kind: str) -> float:
    return node["Resources"].get(kind, 0.0)


def _whole(number: float) -> int:
    """Rounded down, but not for a rounding error: 0.7 / 0.1 is 7."""
    return int(number + 1e-6)
