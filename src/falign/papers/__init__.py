"""The papers that established the field, each as experiments that are run and claims that are judged.

Nothing of a paper is imported before it is asked for: neither the paper, nor those of its experiments that are not run.
"""

from collections.abc import Iterator, Mapping
from pkgutil import resolve_name

from falign.lab.experiment import Paper

__all__ = ["PAPERS"]

_WHERE = {
    "song2021": "falign.papers.song2021:SONG2021",
    "girotti2021": "falign.papers.girotti2021:GIROTTI2021",
    "garg2022": "falign.papers.garg2022:GARG2022",
    "robertson2024": "falign.papers.robertson2024:ROBERTSON2024",
    "benchmark": "falign.papers.benchmark:BENCHMARK",
}


class _Papers(Mapping[str, Paper]):
    """Papers that are imported when they are asked for."""

    def __getitem__(self, name: str) -> Paper:
        return resolve_name(_WHERE[name])

    def __iter__(self) -> Iterator[str]:
        return iter(_WHERE)

    def __len__(self) -> int:
        return len(_WHERE)


PAPERS: Mapping[str, Paper] = _Papers()
"""Name on the command line -> paper."""
