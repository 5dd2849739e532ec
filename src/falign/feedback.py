"""Random feedback matrices: families, their scale, and their seeds.

A family draws a (rows, columns) matrix whose entries have mean zero and variance one. ``draw`` scales it by
``scale / √fan_in``, so that an error keeps its norm, up to ``scale``, on its way: E|error carried|² = scale²·|error|².
What is drawn is a pure function of (seed, layer name, family): it is drawn on the CPU in float32 from a generator of
its own and only then converted, so every device and dtype holds the same numbers.
"""

import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

__all__ = [
    "FAMILIES",
    "Family",
    "LowRank",
    "Normal",
    "Orthogonal",
    "Shared",
    "Sparse",
    "Uniform",
    "draw",
    "family",
    "faults_of",
    "generator",
]

Family = Callable[[tuple[int, int], Generator], Tensor]
"""((rows, columns), generator) -> a matrix of that shape, entries of mean zero and variance one."""


#: What is drawn does not depend on the default device and dtype of the process.
_PLAIN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def _randn(shape: tuple[int, ...], random: Generator) -> Tensor:
    return torch.randn(shape, generator=random, **_PLAIN)


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """Give a family of the user's the defaults under which a seed means the same numbers everywhere."""
    dtype = torch.get_default_dtype()
    with torch.device("cpu"):
        try:
            if dtype != torch.float32:
                torch.set_default_dtype(torch.float32)
            yield
        finally:
            if dtype != torch.float32:
                torch.set_default_dtype(dtype)


def generator(seed: int, name: str, purpose: str) -> Generator:
    """Make a CPU generator that depends on nothing but its arguments."""
    digest = sha256(f"{seed}\0{name}\0{purpose}".encode()).digest()
    return Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Normal:
    """Entries N(0, 1)."""

    def __call__(self, shape: tuple[int, int], random: Generator) -> Float[Tensor, "rows columns"]:
        return _randn(shape, random)

    def __str__(self) -> str:
        return "normal"


@dataclass(frozen=True)
class Uniform:
    """Entries U(-√3, √3)."""

    def __call__(self, shape: tuple[int, int], random: Generator) -> Float[Tensor, "rows columns"]:
        return (torch.rand(shape, generator=random, **_PLAIN) * 2 - 1) * 3**0.5

    def __str__(self) -> str:
        return "uniform"


@dataclass(frozen=True)
class Orthogonal:
    """Orthonormal rows (or columns, if there are fewer), Haar distributed, times √max(rows, columns)."""

    def __call__(self, shape: tuple[int, int], random: Generator) -> Float[Tensor, "rows columns"]:
        rows, columns = shape
        tall = _randn((max(shape), min(shape)), random)
        q, r = torch.linalg.qr(tall)
        # The signs make Q a function of the draw alone (LAPACK's QR leaves them open), and so Haar distributed.
        q = q * r.diagonal().sign() * max(shape) ** 0.5
        return (q if rows >= columns else q.mT).contiguous()

    def __str__(self) -> str:
        return "orthogonal"


@dataclass(frozen=True)
class LowRank:
    """U Vᵀ / √rank, U and V with entries N(0, 1): at most ``rank`` directions of the error arrive."""

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"feedback family low-rank needs a rank of at least 1, got {self.rank}")

    def __call__(self, shape: tuple[int, int], random: Generator) -> Float[Tensor, "rows columns"]:
        left = _randn((shape[0], self.rank), random)
        right = _randn((self.rank, shape[1]), random)
        return left @ right / self.rank**0.5

    def __str__(self) -> str:
        return f"low-rank({self.rank})"


@dataclass(frozen=True)
class Sparse:
    """Each column has ``entries`` N(0, 1) entries at random rows (or all rows), times √(rows / entries).

    A column belongs to one neuron that receives an error: it listens to that many error neurons.
    """

    entries: int

    def __post_init__(self) -> None:
        if self.entries < 1:
            raise ValueError(f"feedback family sparse needs at least 1 entry a column, got {self.entries}")

    def __call__(self, shape: tuple[int, int], random: Generator) -> Float[Tensor, "rows columns"]:
        rows, columns = shape
        kept = min(self.entries, rows)
        chosen = torch.rand(columns, rows, generator=random, **_PLAIN).topk(kept, dim=1).indices.mT
        values = _randn((kept, columns), random) * (rows / max(kept, 1)) ** 0.5
        return torch.zeros(shape, **_PLAIN).scatter_(0, chosen, values)

    def __str__(self) -> str:
        return f"sparse({self.entries})"


@dataclass(frozen=True)
class Shared:
    """N(0, 1) entries that all layers read from one sequence, each from a start of its own.

    The memory of all feedback is that of the largest layer (and a sixteenth, the room for the starts), not the sum.
    Layers of the same shape hold shifted, hence different, matrices. Unlike Launay et al. 2020, where every layer
    reads from the same start and equal layers receive the same feedback.
    """

    _CHUNK = 1 << 20
    _ROOM = 1 << 16

    def __call__(self, shape: tuple[int, int], random: Generator) -> Float[Tensor, "rows columns"]:
        raise TypeError("the shared family is read with sequence() and start(), not drawn layer by layer")

    def __str__(self) -> str:
        return "shared"

    def _room(self, size: int) -> int:
        return max(self._ROOM, size // 16)

    def start(self, seed: int, name: str, size: int) -> int:
        """Give the entry at which the layer ``name`` with ``size`` entries begins to read."""
        return int(torch.randint(self._room(size), (), generator=generator(seed, name, "shared start"), device="cpu"))

    def sequence(self, seed: int, largest: int) -> Float[Tensor, " length"]:
        """The sequence, long enough for a layer of ``largest`` entries; a longer one begins with a shorter one."""
        length = largest + self._room(largest)
        chunks = range((length + self._CHUNK - 1) // self._CHUNK)
        return torch.cat([_randn((self._CHUNK,), generator(seed, "", f"shared {chunk}")) for chunk in chunks])[
            :length
        ].clone()


FAMILIES: dict[str, Callable[..., Family]] = {
    "normal": Normal,
    "uniform": Uniform,
    "orthogonal": Orthogonal,
    "low-rank": LowRank,
    "sparse": Sparse,
    "shared": Shared,
}


def family(text: str) -> Family:
    """Make the family that a text names.

    Args:
        text: ``normal``, ``uniform``, ``orthogonal``, ``shared``, ``low-rank(RANK)``, ``sparse(ENTRIES)``; the number
            may also stand behind a colon (``low-rank:8``).

    Raises:
        ValueError: the name is unknown, or its number is missing, superfluous or below one.
    """
    match = (
        re.fullmatch(r"([a-z-]+)(?:\((-?[0-9]{1,18})\)|:(-?[0-9]{1,18}))?", text.strip())
        if isinstance(text, str)
        else None
    )
    known = "normal, uniform, orthogonal, low-rank(RANK), sparse(ENTRIES), shared"
    if match is None or match[1] not in FAMILIES:
        raise ValueError(f"unknown feedback family {reprlib.repr(text)}: choose one of {known}")
    number = match[2] or match[3]
    if (number is not None) != (match[1] in ("low-rank", "sparse")):
        need = "takes no number" if number is not None else "needs a number"
        raise ValueError(f"feedback family {text!r} {need}: choose one of {known}")
    return FAMILIES[match[1]]() if number is None else FAMILIES[match[1]](int(number))


def draw(family: Family, shape: tuple[int, ...], *, seed: int, name: str, deviation: float) -> Tensor:
    """Draw the feedback of one layer: family entries of variance one, times ``deviation``.

    Args:
        family: how to draw a (rows, columns) matrix; a convolution's B is drawn as (first axis, all others).
        shape: shape of B.
        seed: the seed given to ``convert``.
        name: the layer's name in the model; it gives every layer a generator of its own.
        deviation: standard deviation of the entries, scale / √fan_in.

    Returns:
        B, float32 on the CPU.

    Raises:
        ValueError: the family returned another shape or a number that is not finite.
    """
    rows = shape[0]
    columns = torch.Size(shape[1:]).numel()
    with _plain_defaults():  # a user's family draws with the process's defaults
        matrix = family((rows, columns), generator(seed, name, f"feedback {family}"))
    if not isinstance(matrix, Tensor) or tuple(matrix.shape) != (rows, columns):
        got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"feedback of layer {name!r}: the family returned {got}, expected a tensor ({rows}, {columns})"
        )
    if faults := faults_of(matrix, torch.float32):
        raise ValueError(f"feedback of layer {name!r}: what the family returned {faults[0]}")
    return (matrix.to(**_PLAIN) * deviation).reshape(shape).contiguous()


def faults_of(values: Tensor, dtype: torch.dtype) -> list[str]:
    """List what keeps numbers from being feedback of a dtype, as sentences without their subject."""
    if values.is_meta or values.layout is not torch.strided:
        return [
            f"is {'on the meta device' if values.is_meta else 'sparse'}, expected a dense tensor with numbers in it"
        ]
    if values.is_complex():
        return ["holds complex numbers, expected real ones"]
    if not torch.isfinite(values).all():
        return ["holds numbers that are not finite"]
    rounded = values.to(dtype)
    if not torch.isfinite(rounded).all():
        return [f"holds numbers too large for {dtype}".replace("torch.", "")]
    if bool(values.any()) and not bool(rounded.any()):
        return [f"holds nothing but zeros once rounded to {dtype}".replace("torch.", "")]
    return []
