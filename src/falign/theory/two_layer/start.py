"""Data and weights that a run starts from, drawn from named generators or given."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public, typed
from falign.theory.inputs import room
from falign.theory.two_layer.projection import project
from falign.theory.two_layer.streams import (
    Scale,
    Teacher,
    answers,
    check_choice,
    check_dtype,
    check_sizes,
    inputs_of,
    normal,
    rows_of,
)

__all__ = [
    "Scale",
    "Start",
    "Teacher",
    "draw",
    "draw_data",
    "draw_output_weights",
    "draw_weights",
    "inputs_of",
    "project",
]


@typed
@dataclass(frozen=True, kw_only=True)
class Start:
    """Data, teacher's answers and initial weights of a block of runs, one per seed.

    Attributes:
        X: Inputs [seeds n d]; [n d] where all seeds share the data.
        y: Targets [seeds n], or [seeds n k] for k outputs; without the first axis where X has none.
        W: First layer's weights [seeds p d].
        beta: Output weights β [seeds p], or [seeds p k].
        b: Feedback weights, of β's shape.
        X_test: Inputs [seeds m d] ([m d]) whose loss is measured and not trained on.
        y_test: Their targets.
        seeds: Seed of each run, the name of its streams of batches and dropout masks; 0, 1, … if left out.

    Raises:
        ValueError: an axis is empty, shapes disagree, the dtype is neither float32 nor float64, or a number is not
            finite.
    """

    X: Float[Tensor, "..."]
    y: Float[Tensor, "..."]
    W: Float[Tensor, "..."]
    beta: Float[Tensor, "..."]
    b: Float[Tensor, "..."]
    X_test: Float[Tensor, "..."] | None = None
    y_test: Float[Tensor, "..."] | None = None
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.W.dim() != 3:
            raise ValueError(f"W must be [seeds p d], got {list(self.W.shape)}")
        check_dtype(self.W.dtype)
        seeds, p, _ = self.W.shape
        self._expect("W", self.W, list(self.W.shape))
        outputs = list(self.beta.shape[2:])
        self._expect("beta", self.beta, [seeds, p, *outputs])
        self._expect("b", self.b, [seeds, p, *outputs])
        self._expect_data("", self.X, self.y)
        if (self.X_test is None) != (self.y_test is None):
            raise ValueError("X_test and y_test come together, got one of them")
        if self.X_test is not None and self.y_test is not None:
            if self.X_test.dim() != self.X.dim():
                raise ValueError(f"X_test must have X's axes, got {list(self.X_test.shape)} and {list(self.X.shape)}")
            self._expect_data("_test", self.X_test, self.y_test)
        if self.seeds is None:
            object.__setattr__(self, "seeds", tuple(range(seeds)))
        elif len(self.seeds) != seeds:
            raise ValueError(f"{len(self.seeds)} seeds were named for W of {seeds}")

    def _expect_data(self, ending: str, X: Tensor, y: Tensor) -> None:
        shared = [] if X.dim() == 2 else [self.W.shape[0]]
        points = X.shape[-2] if X.dim() >= 2 else 0
        self._expect(f"X{ending}", X, [*shared, points, self.W.shape[2]])
        self._expect(f"y{ending}", y, [*shared, points, *self.beta.shape[2:]])

    def _expect(self, name: str, tensor: Tensor, shape: list[int]) -> None:
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the other arrays ask for {shape}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty: shape {shape}")
        if tensor.dtype != self.W.dtype or tensor.device != self.W.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but W {self.W.dtype} on {self.W.device}: "
                "all arrays need one dtype and device"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite")


@public
def draw_data(
    seeds: Sequence[int],
    *,
    n: int,
    d: int,
    p: int,
    activation: str = "identity",
    inputs: Scale = "standard",
    teacher: Teacher = "network",
    outputs: int | None = None,
    test: int = 0,
) -> dict[str, Tensor]:
    """X, y and, where ``test`` points are asked for, X_test and y_test, in float64 on the CPU; see ``draw``."""
    check_sizes(seeds=len(seeds), n=n, d=d, p=p, outputs=outputs, test=test)
    check_choice("inputs", inputs, ("standard", "scaled"))
    check_choice("teacher", teacher, ("network", "linear"))
    room("inputs and targets", len(seeds), n + test, d + (outputs or 1))
    room("the teacher", 1 if teacher == "linear" else p, outputs or 1)
    found: dict[str, list[Tensor]] = {"X": [], "y": [], "X_test": [], "y_test": []}
    for seed in seeds:
        X = inputs_of(seed, n, d, inputs)
        X_test = inputs_of(seed, test, d, inputs, "test inputs")
        y = answers(seed, torch.cat([X, X_test]), p, activation, teacher, outputs)
        for name, tensor in zip(found, (X, y[:n], X_test, y[n:]), strict=True):
            found[name].append(tensor)
    return {name: torch.stack(parts) for name, parts in found.items() if test or not name.endswith("_test")}


@public
def draw_weights(
    seeds: Sequence[int],
    *,
    p: int,
    d: int,
    outputs: int | None = None,
    weights: Scale = "standard",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """W, beta and b, all N(0, 1); with ``weights="scaled"`` W is N(0, 1/d)."""
    check_sizes(seeds=len(seeds), d=d, p=p, outputs=outputs)
    check_choice("weights", weights, ("standard", "scaled"))
    check_dtype(dtype)
    room("weights", len(seeds), p, d + 2 * (outputs or 1))
    scale = 1 / sqrt(d) if weights == "scaled" else 1.0
    W = torch.empty(len(seeds), p, d, dtype=dtype, device=device)
    for index, seed in enumerate(seeds):
        for rows, piece in rows_of(seed, "W", p, d):
            W[index, rows] = (piece.to(dtype) * scale).to(device)
    return {"W": W, **draw_output_weights(seeds, p, outputs, dtype, device)}


def draw_output_weights(
    seeds: Sequence[int], p: int, outputs: int | None, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """The weights beta and b, N(0, 1)."""
    shape = (p,) if outputs is None else (p, outputs)
    return {
        name: torch.stack([normal(seed, name, *shape) for seed in seeds]).to(device, dtype) for name in ("beta", "b")
    }


@public
def draw(
    seeds: Sequence[int],
    *,
    n: int,
    d: int,
    p: int,
    activation: str = "identity",
    inputs: Scale = "standard",
    teacher: Teacher = "network",
    outputs: int | None = None,
    weights: Scale = "standard",
    test: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Start:
    """Draw inputs, teacher and initial weights of the paper's synthetic experiment.

    Every array of every seed has a generator of its own, read in float32 on the CPU: what a seed draws depends on
    the sizes only, not on the other seeds of the block, the dtype, the device or the engine.

    Args:
        seeds: One run each.
        n: Training points.
        d: Input dimension.
        p: Hidden neurons, of the network and of the teacher.
        activation: The teacher's ψ.
        inputs: ``standard`` N(0, I_d), with which the paper's rates converge; ``scaled`` N(0, I_d/d), that of its
            propositions 3.3 and 4.5.
        teacher: ``network``: y = (1/√p) β*ᵀψ(W*x), all weights N(0, 1). ``linear``: y = v·x, v ~ N(0, I_d).
        outputs: k, or None for the scalar output without an axis for it.
        weights: ``standard``: W ~ N(0, 1), the paper's text. ``scaled``: W ~ N(0, 1/d).
        test: Points beyond n that are drawn and answered likewise and not trained on.
        dtype: Of everything returned.
        device: Of everything returned.

    Raises:
        ValueError: a size is no integer or below 1, a choice unknown, or the dtype neither float32 nor float64.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 5. The distribution of the inputs is not stated there.
    """
    data = draw_data(
        seeds, n=n, d=d, p=p, activation=activation, inputs=inputs, teacher=teacher, outputs=outputs, test=test
    )
    own = draw_weights(seeds, p=p, d=d, outputs=outputs, weights=weights, dtype=dtype, device=device)
    return Start(**{name: array.to(device, dtype) for name, array in data.items()}, **own, seeds=tuple(seeds))
