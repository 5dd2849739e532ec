"""Agreement of the gradients of different batches: whether a direction is of the task or of the batch alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from falign._show import Loud, Sheet
from falign._style import Points, dots
from falign._validation import describe
from falign._wiring import converted, unwrapped
from falign.measure._alignment import lost_rows, parts_of_rows, summarise
from falign.measure._angles import length
from falign.measure._passes import Loss, rule_and_true_gradients
from falign.measure._report import OfLayers

FEWEST = 8
"""Batches from which on a mean over their pairs says something."""


@dataclass(frozen=True, kw_only=True)
class LayerConsistency:
    """Mean cosine between the gradients of a layer over all pairs of batches; 1 where all have one direction.

    Attributes:
        layer: The layer, or a parameter that is multiplied by hand.
        taken: Of the gradients that it takes; None where fewer than two are not zero.
        true: Of its true gradients.
        batches: Batches of which both gradients are not zero and can be read.
        unreadable: Batches in which the layer's gradients rest on rounding; they are left out.
    """

    layer: str
    taken: float | None
    true: float | None
    batches: int
    unreadable: int


@dataclass(frozen=True, kw_only=True)
class Consistency(OfLayers):
    """Agreement of the gradients of different batches, by the rule and truly; prints as a table.

    Attributes:
        rule: The rule's name.
        batches: How many batches there were.
        layers: A row a layer, in running order.
    """

    rule: str
    batches: int
    layers: tuple[LayerConsistency, ...]

    def _sheet(self) -> Sheet:
        def cell(row: LayerConsistency, value: float | None) -> str:
            return f"{value:+.3f}" if value is not None else Loud("unreadable") if row.unreadable else "-"

        table = [["layer", self.rule, "bp", "batches"]]
        table += [[row.layer, cell(row, row.taken), cell(row, row.true), f"{row.batches}"] for row in self.layers]
        head = f"mean cosine between the gradients of {self.batches} batches"
        return Sheet(head=head, table=table)

    def _draw(self, axes: Any) -> None:
        series = [
            Points(
                label=label,
                values=[
                    "unreadable" if (value := getattr(row, column)) is None and row.unreadable else value
                    for row in self.layers
                ],
            )
            for label, column in ((self.rule, "taken"), ("bp", "true"))
        ]
        names, xlabel = [row.layer for row in self.layers], f"mean cosine between {self.batches} batches"
        dots(axes, names, series, xlabel=xlabel, title="consistency", marked=(0.0, "independent"))


def consistency(model: nn.Module, loss_fn: Loss, batches: Iterable[tuple[Any, Any]]) -> Consistency:
    """Measure the mean cosine between gradients of different batches, of the rule and of backpropagation.

    With unit vectors u_i of K batches it is ::

        2 / (K (K - 1)) Σ_{i<j} ⟨u_i, u_j⟩ = (|Σu_i|² - K) / (K (K - 1))

    and that of independent directions is 0 ± √2 / (K √D), D the number of weights. A rule whose gradients agree among
    themselves but not with the true one has a bias; one whose gradients do not agree among themselves has noise.

    Args:
        model: A converted model; it is left as it was.
        loss_fn: (model output, y) -> scalar.
        batches: At least 8 pairs (x, y), each as for ``falign.measure.alignment``.

    Returns:
        A row a layer.

    Raises:
        TypeError: The batches are no pairs.
        ValueError: There are fewer than 8 batches, or as ``falign.measure.alignment``.
    """
    model = unwrapped(model)
    rule = " + ".join(dict.fromkeys(wiring.rule.name for wiring in converted(model)))
    sums: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    counts: dict[str, int] = {}
    lost_counts: dict[str, int] = {}
    number = 0
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"a batch is {describe(batch)}, expected a pair (x, y)")
        number += 1
        x, y = batch
        passes = rule_and_true_gradients(model, loss_fn, x, y)
        slopes = summarise(model, passes)[1]
        lost = lost_rows(model, loss_fn, x, y, passes, slopes)
        parts = parts_of_rows(model, passes.true)
        for row in slopes:
            counts.setdefault(row, 0)
            if "gradient" in lost.get(row, ()):
                lost_counts[row] = lost_counts.get(row, 0) + 1
                continue
            vectors = [[part.of(which).detach() for part in parts[row]] for which in (passes.taken, passes.true)]
            sizes = [sqrt(sum(length(piece) ** 2 for piece in vector)) for vector in vectors]
            if not all(size > 0 and isfinite(size) for size in sizes):
                continue
            counts[row] += 1
            if row not in sums:
                sums[row] = tuple([torch.zeros_like(p, dtype=torch.float64) for p in vector] for vector in vectors)  # pyright: ignore[reportArgumentType]
            for total, vector, size in zip(sums[row], vectors, sizes, strict=True):
                for piece, own in zip(total, vector, strict=True):
                    piece += own.double() / size
    if number < FEWEST:
        raise ValueError(f"there are {number} batches, expected {FEWEST} or more: a mean over few pairs says nothing")
    layers = []
    for row, count in counts.items():
        taken, true = (_mean_cosine(total, count) for total in sums.get(row, ([], [])))
        layers.append(
            LayerConsistency(layer=row, taken=taken, true=true, batches=count, unreadable=lost_counts.get(row, 0))
        )
    return Consistency(rule=rule, batches=number, layers=tuple(layers))


def _mean_cosine(total: list[Tensor], count: int) -> float | None:
    """Compute (|Σu|² - K) / (K (K - 1)); None of fewer than two."""
    if count < 2:
        return None
    square = sum(float(piece.square().sum()) for piece in total)
    return max(-1.0, min(1.0, (square - count) / (count * (count - 1))))
