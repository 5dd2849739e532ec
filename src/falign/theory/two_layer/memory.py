"""How much memory a block of runs takes, before it is started."""

import torch

from falign.theory.door import public
from falign.theory.inputs import told
from falign.theory.two_layer.pieces import layout
from falign.theory.two_layer.streams import check_sizes


@public
def bytes_needed(
    engine: str,
    *,
    n: int,
    d: int,
    p: int,
    seeds: int = 1,
    penalties: int = 1,
    outputs: int = 1,
    test: int = 0,
    batch: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> int:
    """Bytes of a block's data, start, state and, at most, of the arrays that live during one step.

    Counted are the tensors of the engine and of the start it was given (for ``dual`` the reduced one, of
    ``draw_reduced``; a whole start adds its W, seeds · p · d), and an upper bound on a step's temporaries. Not counted:
    the interpreter, what a library's matrix product takes for itself, and the start's drawing. Dropout takes three
    more arrays of hidden activities; measuring a literal block takes three arrays of one seed's W, and pieces of 2²⁴
    hidden activities in place of a step's. Measuring how far a dual block's weights have come takes six arrays of a
    piece, measuring the rest of it three of β.

    Args:
        engine: ``literal``, ``dual`` or ``width-free``.
        n: Training points.
        d: Input dimension.
        p: Hidden neurons; no matter for ``width-free``.
        seeds: Runs of different draws.
        penalties: Runs of each draw.
        outputs: k, for ``literal``.
        test: Points that are measured and not trained on.
        batch: Points of a step, for ``literal``; None for all.
        dtype: Of the run.

    Raises:
        ValueError: there is no such engine, or a size is below 1.
    """
    check_sizes(n=n, d=d, p=p, seeds=seeds, penalties=penalties, outputs=outputs, test=test, batch=batch)
    runs = seeds * penalties
    data = seeds * (n + test) * (d + (outputs if engine == "literal" else 1))
    if engine == "literal":
        points = n if batch is None else batch
        weights = seeds * p * (d + 2 * outputs) + runs * p * (d + outputs)
        step = 4 * runs * p * points + 2 * runs * p * outputs + seeds * points * (d + outputs)
        numbers = data + weights + step + 4 * runs * points * outputs
    elif engine == "dual":
        most = layout(n, p, runs)
        start = seeds * (p * (n + test + 2) + (n + test) * min(n, d))
        state = runs * (2 * n * p + 2 * p + n * n + 2 * n) + n * most.runs * most.whole
        copies = most.runs * most.chunks * (n * n + 3 * n + 2) if most.runs > 1 < most.chunks else 0
        numbers = data + start + state + runs * (n * n + 5 * n) + copies
    elif engine == "width-free":
        r = min(n, d)
        gram = seeds * (n * r + r * r + 4 * r + n + 4) + seeds * test * (2 * r + 3)
        state = seeds * ((r + 1) * (r + 2) + r) + runs * (4 * r + 3)
        numbers = gram + state + 2 * runs * r
    else:
        raise ValueError(f"unknown engine {told(engine)}: choose one of literal, dual, width-free")
    return numbers * dtype.itemsize
