"""Scalar modes over time: by steps, exactly as a network takes them, or in gradient flow, all modes at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from falign._validation import Numbers, positive, recording_steps, step_count
from falign.theory._coerce import recording, typed
from falign.theory._course import Course, Trajectories
from falign.theory._simulate import clock_of, judged, record, warn
from falign.theory.deep_linear._flow import first_passage, integrated, reduced_ode, settled
from falign.theory.deep_linear._learning import learning_time
from falign.theory.deep_linear._modes import Modes, finite, modes

# The recursion of steps, in place on NumPy buffers: an operation on a thousand numbers costs less there than in torch.


class Recursion:
    """``θ_l ← θ_l + η c_l θ_{l-1}…θ_1 e`` on buffers that are allocated once.

    What is not finite stays so: a mode that overflowed is never again a number.

    Attributes:
        weights: θ of the step reached [layers modes], of one axis of modes.
        squares: ``Σ(Δθ_l)²`` over the steps so far [layers modes]; of the last layer under bp only.
    """

    weights: Float[ndarray, "layers modes"]
    squares: Float[ndarray, "layers modes"]

    def __init__(self, modes: Modes, rates: Float[ndarray, " modes"]):
        """From ``modes`` of one axis, on the CPU, each with a rate η of its own in their type."""
        self.weights = modes.weights.numpy().copy()
        self.squares = np.zeros_like(self.weights)
        self._target, self._variance = rates * modes.target.numpy(), rates * modes.variance.numpy()
        self._moving = modes.rule == "bp"
        self._feedback_factors = modes.feedback_factors.numpy().copy()
        self._below = np.empty_like(self.weights)
        self._error, self._move = np.empty_like(rates), np.empty_like(rates)

    def take(self, steps: int) -> None:
        """Take so many steps. Overflow is not reported."""
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            for _ in range(steps):
                self._step()

    def take_until_lost(self, steps: int) -> Int[ndarray, " modes"]:
        """Take so many steps; return after which of them each mode was first not finite, -1 where it always was."""
        lost = np.full(self.weights.shape[1], -1)
        for step in range(1, steps + 1):
            self.take(1)
            lost[(lost < 0) & ~np.isfinite(self.weights).all(0)] = step
        return lost

    def _step(self) -> None:
        weights, below, error, move = self.weights, self._below, self._error, self._move
        depth = len(weights)
        product = weights[0]
        for layer in range(1, depth):  # below[layer] holds the product of all before it; that of layer 1 is θ_1 itself
            product = np.multiply(product, weights[layer], out=below[layer + 1] if layer + 1 < depth else error)
        np.multiply(error, self._variance, out=error)
        np.subtract(self._target, error, out=error)  # η e
        if self._moving:
            self._carry_back()
        for layer in range(depth - 1, -1, -1):  # θ_1 last: it is what carries layer 2
            lower = weights[0] if layer == 1 else below[layer]
            moved = np.multiply(lower, error, out=move) if layer else error
            if layer < depth - 1:
                moved = np.multiply(moved, self._feedback_factors[layer], out=move)
            np.add(weights[layer], moved, out=weights[layer])
            if layer < depth - 1 or self._moving:
                np.multiply(moved, moved, out=move)
                np.add(self.squares[layer], move, out=self.squares[layer])

    def _carry_back(self) -> None:
        """``θ_{l+1}…θ_L``, as the weights are before the step."""
        self._feedback_factors[-2] = self.weights[-1]
        for layer in range(len(self.weights) - 3, -1, -1):
            np.multiply(self._feedback_factors[layer + 1], self.weights[layer + 1], out=self._feedback_factors[layer])


# Step sizes with which modes converge: the sufficient one, from a formula, and the largest, by trying.

_SHARE_FROM_ZERO = {
    2: 0.7692882644723538,
    3: 0.7557387028931246,
    4: 0.7733835220324543,
    5: 0.7625769432817798,
    6: 0.7517066143539496,
}
"""depth -> ``η_max ρ*/2`` from zero weights, as ``_tried`` finds it: a number of the depth alone."""

_FINENESS, _MOST = 16, 1e4
"""Rates tried at once, and the largest tried, as a multiple of the sufficient rate."""

_BELOW, _APART, _APART_FROM_ZERO = 0.5, 0.001, 0.0001
"""Below the first rate that fails all are tried once more from this share of it on, in steps of these shares."""

_SMALL, _LONGEST = 1e-6, 20_000
"""The share of λ at which an error is judged by the local rate, and the most steps."""


@recording
def sufficient_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """Compute ``1/ρ_max``, a step size with which a mode converges, ρ_max the largest ρ on gradient flow's way.

    Of two layers ``ρ_max = s (mK + (3/2) max(θ_1(0)², θ_1*²))``; of more an upper bound by interval arithmetic. That it
    suffices is an observation (no exception in random draws), not a theorem: ``e⁺ = e (1 - ηρ - η² s m θ_1 e)`` falls
    where ``0 < ηρ + η² s m θ_1 e ≤ 1``. inf where ρ is nowhere positive.
    """
    path = reduced_ode(modes)
    end = first_passage(path, torch.zeros_like(path.start)).nan_to_num(nan=0.0)
    largest = path.decay_rate(path.start[:, None], end[:, None])[1][:, 0].clamp(min=0)
    return largest.reciprocal().reshape(modes.target.shape).to(modes.target)


@recording
def stable_rate(modes: Modes) -> Float[Tensor, "*modes"]:
    """Find η_max, the supremum of the step sizes below which all converge, by trying them on the recursion.

    From zero weights it is ``2/ρ*`` times a number that only the depth sets, .769 for two layers: the recursion has
    one parameter then. Others are tried from well below ``1/ρ_max`` up in steps of 5 % to the first that fails. As
    rates that fail may lie between others that do not, the upper half below it is looked over in steps of .1 %, from
    zero weights of .01 %, and the first failure there is narrowed to 1e-4 or better: what fails in a gap that is
    narrower than that is missed. inf where the mode has no error at the start, nan where gradient flow itself never
    removes it.
    """
    flat = modes.flat().double()
    end, safe = settled(flat), sufficient_rate(flat)
    largest = torch.full_like(flat.target, torch.inf)
    moving = flat.error != 0
    held = moving & (end.error.abs() > _SMALL * flat.error.abs())
    largest[held] = torch.nan
    blank = moving & ~held & (flat.weights == 0).all(0) & (flat.rule != "bp")
    if blank.any():
        largest[blank] = _share_from_zero(flat.depth) * 2 / end.decay_rate[blank]
    rows = (moving & ~held & ~blank & safe.isfinite()).nonzero()[:, 0]
    largest[rows] = _tried(flat.take(rows), safe[rows])
    return largest.reshape(modes.target.shape).to(modes.target)


def _share_from_zero(depth: int) -> float:
    """``η_max ρ*/2`` from zero weights."""
    if depth in _SHARE_FROM_ZERO:
        return _SHARE_FROM_ZERO[depth]
    mode = modes([1.0], [0.0] * depth)
    return float(_tried(mode, sufficient_rate(mode), _APART_FROM_ZERO) * settled(mode).decay_rate / 2)


def _tried(modes: Modes, safe: Tensor, apart: float = _APART) -> Float[Tensor, " modes"]:
    """Find the largest rates below which all that were tried converge; inf where none fails."""
    good, bad = safe / 4, torch.full_like(safe, torch.inf)
    times = learning_time(modes, 0.01)
    # First up in steps of 5 % to a rate that fails. A band of rates that fail may lie below others that do not, so the
    # upper half below it is then tried densely, and the first failure there narrowed three times by 17.
    ratios = 1.05 ** torch.arange(1, _FINENESS + 1, dtype=torch.float64)
    while (open_ := (bad.isinf() & (good < _MOST * safe)).nonzero()[:, 0]).numel():
        tried = ratios * good[open_, None]
        good[open_], bad[open_] = _bracket(modes.take(open_), times[open_], good[open_], tried)
    rows = bad.isfinite().nonzero()[:, 0]
    shares = torch.arange(_BELOW, 1, apart, dtype=torch.float64)
    for parts in (shares, *[torch.linspace(0, 1, _FINENESS + 2, dtype=torch.float64)[1:-1]] * 3):
        low = torch.zeros_like(good[rows]) if parts is shares else good[rows]
        rates = low[:, None] + parts * (bad[rows] - low)[:, None]
        low = torch.maximum(low, _BELOW * bad[rows] * (1 - apart))
        good[rows], above = _bracket(modes.take(rows), times[rows], low, rates)
        bad[rows] = torch.minimum(bad[rows], above)
    return good.where(bad.isfinite(), torch.inf)


def _bracket(modes: Modes, times: Tensor, good: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """The last rate before the first that fails, and that one; inf where none does. ``rates`` grow [modes tried]."""
    tried = rates.shape[1]
    rows = torch.arange(len(rates)).repeat_interleave(tried)
    fails = ~_converges(modes.take(rows), times[rows], rates.flatten()).view_as(rates)
    first = torch.where(fails.any(1), fails.int().argmax(1), tried)
    padded = torch.cat([good[:, None], rates, torch.full_like(good, torch.inf)[:, None]], 1)
    return padded.gather(1, first[:, None])[:, 0], padded.gather(1, first[:, None] + 1)[:, 0]


def _converges(modes: Modes, times: Tensor, rates: Tensor) -> Bool[Tensor, " modes"]:
    """Tell whether the recursion ends with a small error that still shrinks, each mode at a rate of its own.

    After about four times as many steps as gradient flow needs for 99 % (``times``), what is undecided is taken to
    converge if it fell by a tenth since half of them.
    """
    scale = torch.maximum(modes.target, modes.error.abs())
    # Four times the flow's learning time, in steps, and some more for modes that would learn in a few.
    needed = (4 * times / rates + 400).nan_to_num(posinf=_LONGEST).clamp(max=_LONGEST)
    converges = torch.zeros_like(rates, dtype=torch.bool)
    rows, reached, before = torch.arange(len(rates)), 0, modes.error.abs()
    recursion = Recursion(modes, rates.numpy())
    while len(rows):
        steps = max(reached, 64)  # as many as before: the error halfway is at hand, and decided modes leave the block
        recursion.take(steps)
        reached += steps
        now = modes.take(rows).at(torch.from_numpy(recursion.weights))
        error, contraction = now.error.abs(), rates[rows] * now.decay_rate
        # Of a small error a step leaves the share 1 - ηρ, which is below 1 in size for 0 < ηρ < 2.
        small = (error <= _SMALL * scale[rows]) & (contraction > 0) & (contraction < 2) | (error == 0)
        over = reached >= needed[rows]
        # Out of steps with a large error: if its second half took a tenth of it away, it is on its way down.
        converges[rows] = small | (over & (error <= 0.9 * before))
        left = ~small & ~over & error.isfinite()
        rows, before = rows[left], error[left]
        recursion = Recursion(now.take(left), rates[rows].numpy())
    return converges


_BLOCK = 10_240
"""Modes that are stepped together: with a few numbers each they stay in the processor's cache."""

_GROUP = 32
"""Modes that are integrated together, of like rates, so that the quick do not hold up the slow."""


@dataclass(frozen=True, kw_only=True)
class ModeTrajectory(Trajectories):
    """The weights of modes along a run of ``gradient_descent`` or ``gradient_flow``; prints as a table.

    Attributes:
        modes: The modes at the start.
        rate: η; 0 in gradient flow.
        times: Time of each record, η a step [times].
        weights: θ_1, …, θ_L [times layers *modes]; nan from where a mode diverged.
        diverged: First step at which a mode was not finite, -1 where it always was [*modes].
        expected_change: ``K_l - K_l(0)`` of steps by the exact identity ``-½ Σ (Δθ_l)²``, of bp
            ``½ Σ (Δθ_{l+1})² - ½ Σ (Δθ_l)²``; 0 in gradient flow [times layers-1 *modes].
    """

    modes: Modes
    rate: float
    times: Float[Tensor, " times"]
    weights: Float[Tensor, "times layers *modes"]
    diverged: Int[Tensor, "*modes"]
    expected_change: Float[Tensor, "times layers-1 *modes"]

    @typed
    def at(self, place: int) -> Modes:
        """Return the modes at a record."""
        return self.modes.at(self.weights[place])

    @property
    def product(self) -> Float[Tensor, "times *modes"]:
        """``θ_L…θ_1``."""
        return self.weights.prod(1)

    @property
    def error(self) -> Float[Tensor, "times *modes"]:
        """``e = λ - s θ_L…θ_1``."""
        return self.modes.target - self.modes.variance * self.product

    @property
    def loss(self) -> Float[Tensor, "times *modes"]:
        """``e²/(2s)``."""
        return self.error.square() / (2 * self.modes.variance)

    @property
    def share(self) -> Float[Tensor, "times *modes"]:
        """``s θ_L…θ_1 / λ``, how much of the mode is learned; nan where λ = 0."""
        share = self.modes.variance * self.product / self.modes.target
        return share.where(self.modes.target > 0, torch.nan)

    @property
    def invariants(self) -> Float[Tensor, "times links *modes"]:
        """K_l of every record."""
        return torch.stack([self.at(place).invariants for place in range(len(self.times))])

    def _course(self) -> Course:
        clock, at = clock_of(self.rate, self.times)
        parts = {"share": self.share, "loss": self.loss, "error": self.error}
        values = {name: part.flatten(1).mT for name, part in parts.items()}
        lost = {"weights": self.diverged.flatten().cpu()}
        # A loss overflows before the weights do; of a share of λ = 0 there is none.
        found = judged({"loss": values["loss"]}, at, weights=lost["weights"])
        labels = [f"λ = {target:.4g}" for target in self.modes.target.flatten().tolist()]
        return Course(
            what="modes of a deep linear network", clock=clock, at=at, axes=("mode",), apart="mode", values=values,
            diverged=found["diverged"], lost=found["lost"], labels=labels,
        )  # fmt: skip


@recording
def gradient_descent(modes: Modes, *, rate: float, steps: int, at: Sequence[int] | None = None) -> ModeTrajectory:
    """Steps ``θ ← θ + η θ'`` of all layers together, as full batches of a network take them.

    A mode that overflows is nan from there; the others go on.

    Args:
        modes: Start.
        rate: η.
        steps: Their number.
        at: Steps to record at, increasing, the last at most ``steps``; None for about 100, evenly.

    Raises:
        ValueError: η is not positive, steps is no whole number, or the recording steps are out of order or range.

    Warns:
        UserWarning: modes diverged, or have not converged and cannot at this rate (``η ≥ 2/ρ*``, from zero weights
            η_max), with what the worst of them needs.
    """
    positive("rate", rate)
    step_count(steps, least=1)
    at = recording_steps(steps, at)
    flat = modes.flat()
    firsts = range(0, max(flat.target.numel(), 1), _BLOCK)
    blocks = [_stepped(flat.take(slice(first, first + _BLOCK)), rate, at) for first in firsts]
    weights, expected, diverged = (torch.cat(parts, -1) for parts in zip(*blocks, strict=True))
    times = rate * torch.tensor(at, dtype=torch.float64)
    trajectory = _trajectory(modes, rate, times, weights, expected, diverged)
    _warn_of_large_rate(trajectory)
    return trajectory


def _stepped(modes: Modes, rate: float, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Take the steps; return weights and expected change of K at each record, and when each mode was lost."""
    rates = np.full(modes.target.shape, rate, dtype=modes.weights.numpy().dtype)
    recursion, lost, reached = Recursion(modes, rates), np.full(modes.target.shape, -1), 0

    def advance(count: int) -> None:
        nonlocal reached
        before = recursion.weights.copy()
        recursion.take(count)
        newly = (lost < 0) & ~np.isfinite(recursion.weights).all(0)
        if newly.any():  # to look after every step costs more than all of them: only those that were lost go once more
            again = modes.at(torch.from_numpy(before)).take(torch.from_numpy(newly))
            lost[newly] = reached + Recursion(again, rates[newly]).take_until_lost(count)
        reached += count

    def measure() -> dict[str, Tensor]:
        parts = {"weights": recursion.weights, "squares": recursion.squares}
        return {name: torch.from_numpy(np.where(lost < 0, part, np.nan)) for name, part in parts.items()}

    values = record(at, advance, measure, axis=0)
    squares = values["squares"]
    upper = squares[:, 1:] if modes.rule == "bp" else 0.0
    return values["weights"], (upper - squares[:, :-1]) / 2, torch.from_numpy(lost)


def _warn_of_large_rate(trajectory: ModeTrajectory) -> None:
    """Warn of modes that diverged, or that cannot stay at the limit of gradient flow and are at no other.

    Near its limit a step multiplies a mode's error by ``1 - η ρ*``, so that it needs ``η < 2/ρ*``; from zero weights
    the largest rate is a known share of that. Nothing is simulated to find out.
    """
    rate, flat = trajectory.rate, trajectory.modes.flat().double()
    end, scale = settled(flat), torch.maximum(flat.target, flat.error.abs())
    arrives = (flat.error != 0) & (end.error.abs() <= _SMALL * flat.error.abs()) & (end.decay_rate > 0)
    zero = (flat.weights == 0).all(0) & (flat.rule != "bp")
    share = torch.ones_like(flat.target).masked_fill(zero, _SHARE_FROM_ZERO.get(flat.depth, 1.0))
    largest = (share * 2 / end.decay_rate).where(arrives, torch.inf)
    learned = trajectory.error[-1].flatten().cpu().abs() <= _SMALL * scale
    beyond = (largest < rate) & ~learned | (trajectory.diverged.flatten().cpu() >= 0)
    if beyond.any():
        # A mode may have diverged though its limit is stable at this rate: of it is known only that less is needed.
        largest = largest.clamp(max=rate).where(beyond, torch.inf)
        worst = int(largest.argmin())
        safe = float(sufficient_rate(flat.take(slice(worst, worst + 1))))
        warn(
            f"the rate {rate:g} is beyond what {int(beyond.sum())} of {len(beyond)} modes converge with: the one with "
            f"λ = {float(flat.target[worst]):g} needs less than {float(largest[worst]):.4g}, and {safe:.4g} suffices"
        )


def _trajectory(
    modes: Modes, rate: float, times: Tensor, weights: Tensor, expected: Tensor, diverged: Tensor
) -> ModeTrajectory:
    """Give what was recorded of flat modes the shape and device of the modes."""
    weights, expected, diverged = (
        part.reshape((*part.shape[:-1], *modes.target.shape)).to(modes.target.device)
        for part in (weights, expected, diverged)
    )
    return ModeTrajectory(
        modes=modes, rate=float(rate), times=times, weights=weights, expected_change=expected, diverged=diverged
    )


@recording
def gradient_flow(modes: Modes, *, times: Numbers, tolerance: float = 1e-10) -> ModeTrajectory:
    """Gradient flow, integrated over the one weight of each mode that the invariants leave (SciPy's DOP853).

    Within ten tolerances of its limit a mode is on the exponential that leads there, so that late times cost nothing.

    Args:
        modes: Start.
        times: Where to record, increasing, from 0 on.
        tolerance: Relative error of a step in that weight.

    Raises:
        ValueError: the times are out of order or not finite, or the tolerance is not positive.
        RuntimeError: the integration stopped or took too long.
    """
    positive("tolerance", tolerance)
    moments = finite("times", times).double().cpu()
    if moments.ndim != 1 or not len(moments) or moments[0] < 0 or not (moments.diff() > 0).all():
        raise ValueError(f"times must increase from 0 on, got {moments.tolist()}: pass a list, such as [0.0, 1.0]")
    path, flat = reduced_ode(modes), modes.flat()
    # Modes of one solution share its steps: groups of like rates keep the quick from holding up the slow. The norm of
    # an error over a group is its root mean square, so that one mode's may be √n times as large.
    weights = torch.empty(len(moments), *path.modes.weights.shape, dtype=torch.float64)
    rates = torch.maximum(path.modes.decay_rate, settled(path.modes).decay_rate)
    for rows in rates.argsort().split(_GROUP):
        weights[..., rows] = integrated(path.take(rows), moments, tolerance / _GROUP**0.5)
    weights = weights.to(flat.weights.dtype)
    never = torch.full(weights.shape[-1:], -1)
    return _trajectory(modes, 0.0, moments, weights, torch.zeros_like(weights[:, :-1]), never)
