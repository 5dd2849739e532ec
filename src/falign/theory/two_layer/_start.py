"""Data and weights that a run starts from, drawn from named generators or given."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal as OneOf
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_finite, check_memory, check_sizes, one_of, whole_between
from falign.feedback import generator
from falign.theory._coerce import public, typed
from falign.theory.two_layer._activations import activation as activation_named

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

# Named random streams of a seed: inputs, teacher, weights.

Scale = OneOf["standard", "scaled"]
Teacher = OneOf["network", "linear"]

_ROWS = 1024
"""W is drawn in pieces of that many rows; the pieces are part of what a seed means."""


def normal(seed: int, purpose: str, *shape: int) -> Tensor:
    """N(0, 1) in float32 on the CPU, a function of its arguments only; float64 draws would be another stream."""
    return torch.randn(shape, generator=generator(seed, "two-layer", purpose))


def rows_of(seed: int, purpose: str, p: int, d: int) -> Iterator[tuple[slice, Tensor]]:
    """N(0, 1) of shape [p d], in pieces."""
    random = generator(seed, "two-layer", purpose)
    for first in range(0, p, _ROWS):
        rows = min(_ROWS, p - first)
        yield slice(first, first + rows), torch.randn(rows, d, generator=random)


def inputs_of(seed: int, n: int, d: int, inputs: Scale, purpose: str = "inputs") -> Float[Tensor, "n d"]:
    """A seed's inputs, N(0, I_d) or N(0, I_d/d), float64 on the CPU."""
    return normal(seed, purpose, n, d).double() / (sqrt(d) if inputs == "scaled" else 1.0)


def answers(seed: int, X: Tensor, p: int, activation: str, teacher: Teacher, outputs: int | None) -> Tensor:
    """The teacher's outputs at X [m d], in float64."""
    k, d = outputs or 1, X.shape[1]
    if teacher == "linear":
        y = X @ normal(seed, "linear teacher", d, k).double()
    else:
        value = activation_named(activation).value
        beta = normal(seed, "teacher beta", p, k).double()
        y = X.new_zeros(X.shape[0], k)
        for rows, W in rows_of(seed, "teacher W", p, d):
            y += value(X @ W.double().mT) @ beta[rows]
        y /= sqrt(p)
    return y if outputs else y[:, 0]


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what a run loses its small steps in."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"runs are in float32 or float64, got {dtype}: η/√p times an error is lost in fewer digits")


# Projection where there are more points than dimensions: the part of a linear problem that a network can move.


@public
def project(
    X: Float[Tensor, "*seeds n d"], y: Float[Tensor, "*seeds n"]
) -> tuple[Float[Tensor, "*seeds m d"], Float[Tensor, "*seeds m"], Float[Tensor, "*seeds"]]:
    """Reduce n > d points to d: ``|XV - y|² = |RV - ȳ|² + |y_perp|²`` for every V.

    The columns of Q are an orthonormal basis of X's column space (its left singular vectors), m = min(n, d) many.
    A linear network's run on (R, ȳ) is its run on (X, y): e = Q ē + y_perp and y_perp never moves.

    Returns:
        R = QᵀX, whose Gram matrix is diagonal; ȳ = Qᵀy; |y_perp|².

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 4.2, "large sample scenario".
    """
    Q = torch.linalg.svd(X, full_matrices=False)[0]
    reduced = (Q.mT @ y.unsqueeze(-1)).squeeze(-1)
    rest = y - (Q @ reduced.unsqueeze(-1)).squeeze(-1)
    return Q.mT @ X, reduced, rest.square().sum(-1)


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
        check_finite(name, tensor)


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
    """X, y and, where ``test`` points are asked for, X_test and y_test, in float64 on the CPU.

    Args:
        seeds: As for ``draw``, as all others.
        n: Training points.
        d: Input dimension.
        p: Hidden neurons of the teacher.
        activation: The teacher's ψ.
        inputs: ``standard`` or ``scaled``.
        teacher: ``network`` or ``linear``.
        outputs: k, or None for the scalar output.
        test: Points beyond n.

    Returns:
        {"X": [runs n d], "y": [runs n] or [runs n k]}, and the same for the test points.

    Raises:
        ValueError: As ``draw``.
    """
    check_sizes(seeds=len(seeds), n=n, d=d, p=p, outputs=outputs)
    whole_between("test", test, 0)
    one_of("inputs", inputs, get_args(Scale))
    one_of("teacher", teacher, get_args(Teacher))
    check_memory("inputs and targets", len(seeds), n + test, d + (outputs or 1))
    check_memory("the teacher", 1 if teacher == "linear" else p, outputs or 1)
    arrays: dict[str, list[Tensor]] = {"X": [], "y": [], "X_test": [], "y_test": []}
    for seed in seeds:
        X = inputs_of(seed, n, d, inputs)
        X_test = inputs_of(seed, test, d, inputs, "test inputs")
        y = answers(seed, torch.cat([X, X_test]), p, activation, teacher, outputs)
        for name, tensor in zip(arrays, (X, y[:n], X_test, y[n:]), strict=True):
            arrays[name].append(tensor)
    return {name: torch.stack(parts) for name, parts in arrays.items() if test or not name.endswith("_test")}


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
    """W, beta and b, all N(0, 1); with ``weights="scaled"`` W is N(0, 1/d).

    Args:
        seeds: As for ``draw``, as all others.
        p: Hidden neurons.
        d: Input dimension.
        outputs: k, or None for the scalar output.
        weights: ``standard`` or ``scaled``.
        dtype: Of everything returned.
        device: Of everything returned.

    Returns:
        {"W": [runs p d], "beta": [runs p] or [runs p k], "b": as beta}.

    Raises:
        ValueError: As ``draw``.
    """
    check_sizes(seeds=len(seeds), d=d, p=p, outputs=outputs)
    one_of("weights", weights, get_args(Scale))
    check_dtype(dtype)
    check_memory("weights", len(seeds), p, d + 2 * (outputs or 1))
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
    drawn = draw_weights(seeds, p=p, d=d, outputs=outputs, weights=weights, dtype=dtype, device=device)
    return Start(**{name: array.to(device, dtype) for name, array in data.items()}, **drawn, seeds=tuple(seeds))


# Reduced starts: the first layer's weights replaced by what they do at the points, U(0) = X W(0)ᵀ.


@public
@dataclass(frozen=True, kw_only=True)
class Reduced:
    """A start reduced to what full batches need of it: p (n + m) numbers a run in place of p d.

    Attributes:
        X: Inputs [seeds n d].
        y: Targets [seeds n].
        U: ``X W(0)ᵀ`` [seeds n p].
        beta: Output weights β(0) [seeds p].
        b: Feedback weights [seeds p].
        X_test: Inputs that are measured and not trained on [seeds m d], or None.
        y_test: Their targets [seeds m].
        U_test: ``X_test W(0)ᵀ`` [seeds m p].

    Raises:
        ValueError: the dtype is neither float32 nor float64.
    """

    X: Float[Tensor, "seeds n d"]
    y: Float[Tensor, "seeds n"]
    U: Float[Tensor, "seeds n p"]
    beta: Float[Tensor, "seeds p"]
    b: Float[Tensor, "seeds p"]
    X_test: Float[Tensor, "seeds m d"] | None = None
    y_test: Float[Tensor, "seeds m"] | None = None
    U_test: Float[Tensor, "seeds m p"] | None = None

    def __post_init__(self) -> None:
        check_dtype(self.U.dtype)


@public
def reduce(start: Start) -> Reduced:
    """Put W's action on the points in its place.

    Raises:
        ValueError: the start has more than one output.
    """
    if start.beta.dim() != 2:
        raise ValueError(f"only a scalar output can be reduced, got beta {list(start.beta.shape)}: use WeightSpace")
    seeds = start.W.shape[0]

    def of_each_seed(tensor: Tensor | None) -> Tensor | None:
        shared = start.X.dim() == 2
        return tensor.expand(seeds, *tensor.shape) if tensor is not None and shared else tensor

    X, y, X_test, y_test = (of_each_seed(tensor) for tensor in (start.X, start.y, start.X_test, start.y_test))
    assert X is not None
    assert y is not None
    U_test = None if X_test is None else X_test @ start.W.mT
    return Reduced(
        X=X, y=y, U=X @ start.W.mT, beta=start.beta, b=start.b, X_test=X_test, y_test=y_test, U_test=U_test
    )  # fmt: skip


@public
def draw_reduced(
    seeds: Sequence[int],
    *,
    n: int,
    d: int,
    p: int,
    activation: str = "identity",
    inputs: Scale = "standard",
    teacher: Teacher = "network",
    weights: Scale = "standard",
    test: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Reduced:
    """``reduce(draw(...))`` to rounding, W never held: its rows are drawn and applied in pieces.

    Args:
        seeds: As for ``draw``, like all that follows.
        n: Training points.
        d: Input dimension.
        p: Hidden neurons.
        activation: The teacher's ψ.
        inputs: Distribution of the inputs.
        teacher: Where y comes from.
        weights: Distribution of W.
        test: Points that are not trained on.
        dtype: Of everything returned.
        device: Of everything returned.
    """
    check_dtype(dtype)
    check_sizes(seeds=len(seeds), n=n, d=d, p=p)
    whole_between("test", test, 0)
    check_memory("the points at every neuron", len(seeds), n + test, p)
    data = draw_data(seeds, n=n, d=d, p=p, activation=activation, inputs=inputs, teacher=teacher, test=test)
    points = torch.cat([data["X"], data["X_test"]], 1) if test else data["X"]
    scale = 1 / sqrt(d) if weights == "scaled" else 1.0
    U = torch.empty(len(seeds), n, p, dtype=dtype, device=device)
    U_test = torch.empty(len(seeds), test, p, dtype=dtype, device=device)
    for index, seed in enumerate(seeds):
        for rows, piece in _applied(seed, points[index].to(dtype), p, d, scale):
            U[index, :, rows] = piece[:n].to(device)
            U_test[index, :, rows] = piece[n:].to(device)
    return Reduced(
        **{name: array.to(device, dtype) for name, array in data.items()},
        **draw_output_weights(seeds, p, None, dtype, device),
        U=U,
        U_test=U_test if test else None,
    )


def _applied(seed: int, points: Tensor, p: int, d: int, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """``X Wᵀ`` for some rows of W after the other."""
    for rows, W in rows_of(seed, "W", p, d):
        yield rows, points @ (W.to(points.dtype) * scale).mT
