"""Trainings that are tuned alike: every row gets the same candidates, and the best of them the other seeds.

A training is a line of a file, written as it ends. Called again, only what the file lacks is made, so that an
interrupted script goes on where it was.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Runs:
    """Trainings in a file of JSON lines.

    Args:
        path: of the file, made with the first line.
        train: makes a training of the keyword arguments that name it, and returns its numbers.
    """

    def __init__(self, path: Path, train: Callable[..., Mapping[str, float]]) -> None:
        self.path, self.train = path, train
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was cut short is made again
        if whole != text:
            path.write_text(whole)
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def find(self, **what: Any) -> list[dict[str, Any]]:
        """List the trainings that have these values."""
        return [line for line in self.lines if what.items() <= line.items()]

    def make(self, **what: Any) -> dict[str, Any]:
        """Return the training of these values, from the file or made now."""
        if known := self.find(**what):
            return known[0]
        line = {**what, **self.train(**what)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        return line

    def tune(
        self,
        row: Mapping[str, Any],
        candidates: Iterable[Mapping[str, Any]],
        seeds: Sequence[int],
        score: Callable[[Mapping[str, Any]], float],
    ) -> None:
        """Train a row at every candidate with the first seed, then at the best with the others.

        Args:
            row: values that all of its trainings have.
            candidates: further values.
            seeds: at least one.
            score: the larger, the better.
        """
        tried = [(self.make(**row, **candidate, seed=seeds[0]), candidate) for candidate in candidates]
        best = max(tried, key=lambda each: score(each[0]))[1]
        for seed in seeds[1:]:
            self.make(**row, **best, seed=seed)

    def best(
        self,
        row: Mapping[str, Any],
        candidates: Iterable[Mapping[str, Any]],
        score: Callable[[Mapping[str, Any]], float],
    ) -> list[dict[str, Any]]:
        """Return the trainings of a row at the best candidate, by its first seed, of those that are there."""
        tried = [self.find(**row, **candidate) for candidate in candidates]
        return max((lines for lines in tried if lines), key=lambda lines: score(lines[0]), default=[])


def spread(values: Sequence[float], digits: int) -> str:
    """Write mean and standard deviation of some values; of one value, that."""
    around = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{around}"
