"""Rows of measurements on the way, taken in the coordinates in which a block of runs stays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from falign.theory.factorisation.closed_forms import optimal_rows
from falign.theory.factorisation.measurements import Course, Here, Reference, known
from falign.theory.factorisation.methods import Method, settled
from falign.theory.factorisation.problem import State
from falign.theory.factorisation.subspace import Small


class Record:
    """What a course is made of, while it is on its way.

    Attributes:
        reference: What every state is compared with.
        rows: What was measured so far, by name.
    """

    def __init__(self, method: Method, Y: Tensor, B: Tensor, start: State, small: Small, names: Sequence[str]) -> None:
        self.Y, self.B, self.start, self.small, self.measurements = Y, B, start, small, known(names)
        self.rows: list[dict[str, Tensor]] = []
        self.reference = Reference(
            method=method,
            Y=small.Y,
            B=small.B,
            start=small.start,
            outside=(Y - small.of_all(small.Y)).square().sum((1, 2)).sqrt(),
            whole_B=B.square().sum((1, 2)).sqrt(),
            optimal_rows=self._optimal_rows,
        )

    def add(self, state: State, gained: Tensor, growth: Tensor, sound: Tensor) -> None:
        """Measure a state; of runs that are no longer ``sound``, nan."""
        ref = self.reference
        Z, W = (torch.where(sound[:, None, None], part, 0.0) for part in settled(ref.method, ref.Y, state))
        at = Here(Z=Z, W=W, R=torch.baddbmm(ref.Y, Z, W, alpha=-1), gained=gained, growth=growth)
        taken = {name: measure(at, ref) for name, measure in self.measurements.items()}
        self.rows.append({name: torch.where(sound, value, torch.nan) for name, value in taken.items()})

    def course(self, end: State, *, rate: float, times: Tensor, diverged: Tensor) -> Course:
        """The record, lifted to the coordinates of Y."""
        method = self.reference.method
        return Course(
            method=method,
            Y=self.Y,
            B=self.B,
            start=self.start,
            end=settled(method, self.Y, self.small.lifted(end)),
            rate=rate,
            times=times,
            values={name: torch.stack([row[name] for row in self.rows], 1) for name in self.measurements},
            diverged=diverged,
        )

    def _optimal_rows(self) -> Tensor:
        """In the small coordinates; by one decomposition where all runs share Y."""
        shared = self.Y[0] if self.Y.stride(0) == 0 else self.Y
        return self.small.seen(optimal_rows(shared, self.B.shape[1]).expand(len(self.B), -1, -1))
