"""A start in which the first layer's weights are replaced by what they do at the points: U(0) = X W(0)ᵀ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.door import public
from falign.theory.inputs import room
from falign.theory.two_layer.start import Scale, Start, Teacher, draw_data, draw_output_weights
from falign.theory.two_layer.streams import check_dtype, check_sizes, rows_of


@public
@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What feedback alignment on full batches needs of a start; p (n + m) numbers a run for p d.

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
        raise ValueError(f"only a scalar output can be reduced, got beta {list(start.beta.shape)}: use Literal")
    seeds = start.W.shape[0]

    def own(tensor: Tensor | None) -> Tensor | None:
        shared = start.X.dim() == 2
        return tensor.expand(seeds, *tensor.shape) if tensor is not None and shared else tensor

    X, y, X_test, y_test = (own(tensor) for tensor in (start.X, start.y, start.X_test, start.y_test))
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
    check_sizes(seeds=len(seeds), n=n, d=d, p=p, test=test)
    room("the points at every neuron", len(seeds), n + test, p)
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
