"""What a mode of a real linear network may be taken to be, and what that makes of its loss curve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory import conservation
from falign.theory.conservation import Course, State
from falign.theory.conservation.network import carriers
from falign.theory.deep_linear import courses
from falign.theory.deep_linear.covariances import Compressed
from falign.theory.deep_linear.modes import Modes, Rule, modes
from falign.theory.deep_linear.network import linear
from falign.theory.deep_linear.rates import warn_of_rate

Form: TypeAlias = Literal["outputs", "chains"]
"""``outputs``: mode i is the network that answers along u_i only. ``chains``: it is a scalar chain."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What a network and its modes go through.

    Attributes:
        products: ``a_i = u_iᵀ M v_i`` of the map M = W_L…W_1 [times modes]; learned where it is λ_i/s_i.
        mode_losses: Each mode's part of the loss [times modes].
        loss: The mean of ½|f - y|² [times].
    """

    products: Float[Tensor, "times modes"]
    mode_losses: Float[Tensor, "times modes"]
    loss: Float[Tensor, " times"]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Full-batch steps.

    Attributes:
        rate: η.
        count: Their number.
        at: Those to record at; None for about 100.
    """

    rate: float
    count: int
    at: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A linear network, its data in few points, their modes ``Σ_yx = Σ_i λ_i u_i v_iᵀ``, and how long to train.

    Attributes:
        state: One network.
        rule: How the error returns.
        few: Its data.
        outputs: U, complete: the modes first [outputs outputs].
        inputs: v_i in columns [d modes].
        target: λ_i above rounding [modes].
        variance: ``s_i = v_iᵀ Σ_xx v_i`` [modes].
        training: The steps, or the times where gradient flow is recorded.
    """

    state: State
    rule: Rule
    few: Compressed
    outputs: Float[Tensor, "outputs outputs"]
    inputs: Float[Tensor, "d modes"]
    target: Float[Tensor, " modes"]
    variance: Float[Tensor, " modes"]
    training: Steps | Float[Tensor, " times"]

    def trained(self, state: State, Y: Tensor) -> Course:
        """Networks on the few inputs, with their loss and map recorded."""
        dynamics, names = linear(self.rule), ("loss", "map")
        if not isinstance(self.training, Steps):
            return conservation.flow(state, dynamics, self.few.X, Y, times=self.training, names=names)
        rate, steps, at = self.training.rate, self.training.count, self.training.at
        return conservation.descend(state, dynamics, self.few.X, Y, rate=rate, steps=steps, names=names, at=at)


def matrices(problem: Problem) -> tuple[Tensor, Curves]:
    """The times, and the exact curves: those of the matrix dynamics. A mode's loss is ``½ E (u_iᵀ (y - f))²``."""
    course = problem.trained(problem.state, problem.few.Y)
    maps, modes_kept = course["map"][0], len(problem.target)
    missed = (problem.few.X @ maps.mT - problem.few.Y) @ problem.outputs
    curves = Curves(
        products=(problem.outputs[:, :modes_kept] * (maps @ problem.inputs)).sum(-2),
        mode_losses=(missed.square().mean(-2) / 2)[:, :modes_kept],
        loss=course["loss"][0] + problem.few.left,
    )
    return course.times, curves


def outputs(problem: Problem) -> tuple[Tensor, Curves]:
    """The times, and the curves of networks that answer along one u_i each; all outputs, also those of no mode."""
    state, U = problem.state, problem.outputs
    *shared, top = (part[0] for part in state.W)
    fed = [part[0] for part in state.B]
    first_fed = 0 if linear(problem.rule).rule.direct else len(fed) - 1  # what carries an error from the output
    start = State(
        W=(*(part.expand(len(U), -1, -1) for part in shared), (U.mT @ top).unsqueeze(1)),
        B=tuple(
            (U.mT @ part).unsqueeze(1) if place >= first_fed else part.expand(len(U), -1, -1)
            for place, part in enumerate(fed)
        ),
    )
    course = problem.trained(start, targets := (problem.few.Y @ U).mT.unsqueeze(-1))
    if isinstance(problem.training, Steps):
        steps = problem.training
        warn_of_rate(steps.rate, (start, course.end), problem.few.X, targets, problem.rule, steps.count)
    kept, rows = len(problem.target), course["map"][:, :, 0].transpose(0, 1)
    curves = Curves(
        products=(rows[:, :kept] * problem.inputs.mT).sum(-1),
        mode_losses=course["loss"].mT[:, :kept],
        loss=course["loss"].sum(0) + problem.few.left,
    )
    return course.times, curves


def chains(problem: Problem) -> tuple[Tensor, Curves]:
    """The times, and the curves of scalar chains; what the initial loss holds besides is a constant."""
    start = chains_of(problem)
    if isinstance(problem.training, Steps):
        steps = problem.training
        course = courses.descend(start, rate=steps.rate, steps=steps.count, at=steps.at)
    else:
        course = courses.flow(start, times=problem.training)
    network = problem.state.W[0]
    for part in problem.state.W[1:]:
        network = part @ network
    missed = problem.few.X @ network[0].mT - problem.few.Y
    besides = missed.square().sum(-1).mean() / 2 - start.loss.sum()
    curves = Curves(
        products=course.product, mode_losses=course.loss, loss=course.loss.sum(-1) + besides + problem.few.left
    )
    return course.times, curves


def chains_of(problem: Problem) -> Modes:
    """The scalar chain of each mode: what the weights are along the path that its error takes.

    ``p_L = u_i``, ``p_l = B_{l+1}ᵀ p_{l+1}`` (dfa: ``D_lᵀ u_i``; bp: ``W_{l+1}ᵀ p_{l+1}``), ``r_l = p_l/|p_l|``,
    ``θ_l = r_lᵀ W_l r_{l-1}`` with ``r_0 = v_i``, ``m_{l+1} = |p_l|/|p_{l+1}|`` (dfa: |p_l|).
    """
    state, dynamics = problem.state, linear(problem.rule)
    top = problem.outputs[:, : len(problem.target)]
    paths = [top]
    for matrix in reversed(carriers(state, dynamics)):
        paths.insert(0, matrix[0].mT @ (top if dynamics.rule.direct else paths[0]))
    lengths = [path.norm(dim=0) for path in paths]
    tiny = torch.finfo(top.dtype).tiny
    along = [path / length.clamp_min(tiny) for path, length in zip(paths, lengths, strict=True)]
    below = [problem.inputs, *along]
    weights = [(r * (part[0] @ under)).sum(0) for r, part, under in zip(along, state.W, below, strict=False)]
    if problem.rule == "bp":
        feedback = [1.0] * (len(weights) - 1)
    elif dynamics.rule.direct:
        feedback = lengths[:-1]
    else:
        feedback = [low / high for low, high in pairwise(lengths)]
    return modes(problem.target, weights, feedback=feedback, variance=problem.variance, rule=problem.rule)


FORMS: dict[str, Callable[[Problem], tuple[Tensor, Curves]]] = {"outputs": outputs, "chains": chains}
"""name -> (problem -> times and curves)."""
