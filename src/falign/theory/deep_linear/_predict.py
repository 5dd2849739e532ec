"""The loss curve of a real linear network, and of each of its modes, from its initial weights, feedback and data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import Numbers, one_of, real_tensor, recording_times
from falign.theory import conservation
from falign.theory._coerce import public
from falign.theory._course import Course, Trajectories
from falign.theory._simulate import clock_of, judged
from falign.theory.conservation import State, Trajectory
from falign.theory.conservation._network import Points, check_inputs, stored_feedback
from falign.theory.deep_linear import _steps
from falign.theory.deep_linear._modes import Modes, Rule
from falign.theory.deep_linear._network import (
    Components,
    Compressed,
    components,
    compressed,
    data,
    linear,
    network,
    scalar_chains,
    warn_of_rate,
)

# The two decouplings of a network into modes, and the loss curves that each gives.

Decoupling: TypeAlias = Literal["outputs", "chains"]
"""``outputs``: mode i is the network that answers along u_i only. ``chains``: it is a scalar chain."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Curves of a network and of its modes.

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
    """A linear network, its data in few points, their components ``Σ_yx = Σ_i λ_i u_i v_iᵀ``, and how long to train.

    Attributes:
        state: One network.
        rule: How the error returns.
        few: Its data.
        components: u_i, v_i and λ_i above rounding, and the variances s_i.
        training: The steps, or the times where gradient flow is recorded.
    """

    state: State
    rule: Rule
    few: Compressed
    components: Components
    training: Steps | Float[Tensor, " times"]

    def trained(self, state: State, Y: Tensor) -> Trajectory:
        """Networks on the few inputs, with their loss and map recorded."""
        dynamics, names = linear(self.rule), ("loss", "map")
        if not isinstance(self.training, Steps):
            return conservation.gradient_flow(state, dynamics, self.few.X, Y, times=self.training, names=names)
        rate, steps, at = self.training.rate, self.training.count, self.training.at
        return conservation.gradient_descent(state, dynamics, self.few.X, Y, rate=rate, steps=steps, names=names, at=at)


def matrices(problem: Problem) -> tuple[Tensor, Curves]:
    """Train the matrices themselves; return times and exact curves. A mode's loss is ``½ E (u_iᵀ (y - f))²``."""
    trajectory = problem.trained(problem.state, problem.few.Y)
    maps, modes_kept = trajectory["map"][0], len(problem.components.target)
    missed = (problem.few.X @ maps.mT - problem.few.Y) @ problem.components.outputs
    curves = Curves(
        products=(problem.components.outputs[:, :modes_kept] * (maps @ problem.components.inputs)).sum(-2),
        mode_losses=(missed.square().mean(-2) / 2)[:, :modes_kept],
        loss=trajectory["loss"][0] + problem.few.left,
    )
    return trajectory.times, curves


def outputs(problem: Problem) -> tuple[Tensor, Curves]:
    """Train networks that answer along one u_i each, also those of no mode; return times and curves."""
    state, U = problem.state, problem.components.outputs
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
    trajectory = problem.trained(start, targets := (problem.few.Y @ U).mT.unsqueeze(-1))
    if isinstance(problem.training, Steps):
        steps = problem.training
        warn_of_rate(steps.rate, (start, trajectory.end), problem.few.X, targets, problem.rule)
    kept, rows = len(problem.components.target), trajectory["map"][:, :, 0].transpose(0, 1)
    curves = Curves(
        products=(rows[:, :kept] * problem.components.inputs.mT).sum(-1),
        mode_losses=trajectory["loss"].mT[:, :kept],
        loss=trajectory["loss"].sum(0) + problem.few.left,
    )
    return trajectory.times, curves


def chains(problem: Problem) -> tuple[Tensor, Curves]:
    """Train the scalar chains; return times and curves. What the initial loss holds besides is a constant."""
    start = _chains_of(problem)
    if isinstance(problem.training, Steps):
        steps = problem.training
        trajectory = _steps.gradient_descent(start, rate=steps.rate, steps=steps.count, at=steps.at)
    else:
        trajectory = _steps.gradient_flow(start, times=problem.training)
    network = problem.state.W[0]
    for part in problem.state.W[1:]:
        network = part @ network
    missed = problem.few.X @ network[0].mT - problem.few.Y
    besides = missed.square().sum(-1).mean() / 2 - start.loss.sum()
    curves = Curves(
        products=trajectory.product,
        mode_losses=trajectory.loss,
        loss=trajectory.loss.sum(-1) + besides + problem.few.left,
    )
    return trajectory.times, curves


def _chains_of(problem: Problem) -> Modes:
    """Reduce each mode to its scalar chain."""
    return scalar_chains(problem.state, problem.rule, problem.components)


_DECOUPLINGS: dict[str, Callable[[Problem], tuple[Tensor, Curves]]] = {"outputs": outputs, "chains": chains}
"""name -> (problem -> times and curves)."""


# The linearisation of a ReLU network: valid while its neurons keep their gains.


@public
def relu_gains(state: State, X: Points) -> tuple[Float[Tensor, "runs _"], ...]:
    """Fit a slope g_k to every hidden ReLU: ``relu(z_k) ≈ g_k z_k`` in least squares over the inputs.

    ``g_k = E[z_k relu(z_k)]/E[z_k²]``: 1 for a neuron that is always active, 0 for one that never is, ½ for one whose
    sums are symmetric about 0. Nearer to ReLU networks on digits than ½ for all, or than the share of active inputs.
    """
    check_inputs(state.W[0], X)
    gains, h = [], X
    for W in state.W[:-1]:
        z = h @ W.mT
        h = z.clamp(min=0)
        # A neuron that is 0 on all points gets gain 0, not 0/0.
        gains.append((h * z).sum(-2) / z.square().sum(-2).clamp_min(torch.finfo(z.dtype).tiny))
    return tuple(gains)


@public
def relu_linearisation(state: State, X: Points, rule: Rule = "fa") -> State:
    """Linearise a ReLU network: the linear network that computes and learns what it does while ReLUs keep their gains.

    With ``G_l = diag(g)``, ``h_l = G_l W_l h_{l-1}`` and ``δ_l = G_l B_{l+1}ᵀ δ_{l+1}``. Then ``Ŵ_l = G_l W_l``
    follows the equations of a linear network with ``B̂_{l+1} = G_{l+1}⁻¹ B_{l+1} G_l²`` (dfa: ``D̂_l = D_l G_l²``),
    ``G_L = 1``: ``G_l δ_l = B̂_{l+1}ᵀ (G_{l+1} δ_{l+1})`` and ``Ŵ_l' = -G_l δ_l h_{l-1}ᵀ``. A neuron with gain 0 learns
    nothing and passes nothing on, there as here.

    Args:
        state: A ReLU network without biases.
        X: Its inputs.
        rule: fa or dfa.

    Raises:
        ValueError: the rule is bp, whose hidden layers would learn at rates G_l² that no linear network has,
            the inputs do not fit, or the feedback is not that of the rule.

    Source: derived.
    """
    if rule == "bp":
        raise ValueError("a ReLU network under bp has no linear network in its stead: pass rule 'fa' or 'dfa'")
    gains = relu_gains(state, X)
    W = [g.unsqueeze(-1) * part for g, part in zip(gains, state.W, strict=False)]
    # A neuron that is never on sends nothing back: its feedback is 0, not infinite.
    above = [torch.where(g > 0, 1 / g, 0.0).unsqueeze(-1) for g in gains[1:]] if rule == "fa" else []
    above += [torch.ones(()).to(gains[0])] * (len(gains) - len(above))
    B = [
        up * part * g.square().unsqueeze(-2)
        for up, part, g in zip(above, stored_feedback(state, linear(rule)), gains, strict=True)
    ]
    return State(W=(*W, state.W[-1]), B=tuple(B))


@dataclass(frozen=True, kw_only=True)
class Prediction(Curves, Trajectories):
    """The predicted curves, and what they were made of; prints as a table.

    Attributes:
        decoupling: What a mode was taken to be.
        chains: The scalar chain of each mode, whatever the decoupling: ``learning_time(chains)`` and the like
            apply to it.
        rate: η of the steps; 0 in gradient flow.
        times: Of the records; of steps, η times their number [times].
        target: ``λ_i``, the singular values of ``Σ_yx = Σ λ_i u_i v_iᵀ`` above rounding, falling [modes].
        variance: ``s_i = v_iᵀ Σ_xx v_i`` [modes].
        outputs: u_i in columns [outputs modes].
        inputs: v_i in columns [d modes].
        floor: The loss that no linear map can go below.
        exact: The curves of the matrix dynamics themselves, where they were asked for.
    """

    decoupling: Decoupling
    chains: Modes
    rate: float
    times: Float[Tensor, " times"]
    target: Float[Tensor, " modes"]
    variance: Float[Tensor, " modes"]
    outputs: Float[Tensor, "outputs modes"]
    inputs: Float[Tensor, "d modes"]
    floor: float
    exact: Curves | None = None

    @property
    def share(self) -> Float[Tensor, "times modes"]:
        """``s_i a_i / λ_i``: how much of each mode is learned."""
        return self.variance * self.products / self.target

    def _course(self) -> Course:
        clock, at = clock_of(self.rate, self.times)
        none = torch.full_like(self.loss, torch.nan)
        values = {
            "loss": torch.stack([self.loss, *self.mode_losses.unbind(-1)]),
            "share": torch.stack([none, *self.share.unbind(-1)]),
        }
        labels = ["whole", *(f"λ = {target:.4g}" for target in self.target.tolist())]
        return Course(
            what=f"predicted by {self.decoupling}", clock=clock, at=at, axes=("part",), apart="part", labels=labels,
            **judged(values, at, undefined={"share"}),
        )  # fmt: skip

    @public
    def beside(self, trained: Numbers) -> Float[Tensor, " times"]:
        """Predicted less trained loss at each record, as a share of the trained network's first.

        Args:
            trained: The losses of the trained network at the same records.

        Raises:
            ValueError: their number is another, they are not finite, or the first is not above 0.
        """
        losses = real_tensor("losses", trained).to(self.loss)
        if losses.shape != self.loss.shape or not losses.isfinite().all():
            raise ValueError(
                f"losses of shape {tuple(losses.shape)}, expected finite ones at the {len(self.times)} records"
            )
        if not losses[0] > 0:
            raise ValueError(f"the first loss is {float(losses[0]):g}, of which errors are a share: expected above 0")
        return (self.loss - losses) / losses[0]


@public
def predict(
    W: Sequence[Numbers],
    B: Sequence[Numbers],
    X: Numbers,
    Y: Numbers,
    *,
    rule: Rule = "fa",
    rate: float | None = None,
    steps: int | None = None,
    at: Sequence[int] | None = None,
    times: Numbers | None = None,
    activation: Literal["linear", "relu"] = "linear",
    decoupling: Decoupling = "outputs",
    exact: bool = False,
) -> Prediction:
    """Predict the loss of every mode and of the whole, in full-batch steps or gradient flow, as if modes never met.

    ``Σ_yx = Σ λ_i u_i v_iᵀ``. Of a network that starts spectral, modes never meet and the prediction is exact. Of any
    other, ``W_l' = Σ_i (C_l u_i) (Q_l Eᵀ u_i)ᵀ``: the outputs' directions u_i meet in the hidden weights that they
    share. What is dropped is that:

    - ``outputs``: mode i is the same network with the answer ``u_iᵀ f`` alone, feedback ``u_iᵀ B_L``, trained on
      ``u_iᵀ y``. Exact at the start, in Σ_xx, in what the weights hold outside the mode, and of a single output. The
      mode's loss is ``½ E (u_iᵀ (y - f))²`` above what no linear map can fit, so the whole is their sum and the floor.
    - ``chains``: mode i is the scalar chain with ``r_l ∝ C_l u_i``, the path that its error takes to layer l (bp: that
      through the weights at the start), ``θ_l = r_lᵀ W_l r_{l-1}``, m the ratios of the paths' lengths, and s_i. Its
      loss is ``½ s_i (a_i - λ_i/s_i)²``; what the initial loss holds besides stays as it is, so that the
      whole starts where the network does.

    Largest error of the whole, as a share of the initial loss, measured on digits (64 pixels, 10 classes one-hot, as
    they are and centred; 48 neurons; feedback as ``falign.convert`` draws it; fa, dfa and bp, two seeds; 2,000 steps)
    from PyTorch's initial weights, and from a tenth of them:

    | | depth 2 | depth 3 |
    |---|---|---|
    | outputs | 0.02, 0.02 | 0.03, 0.05 |
    | chains | 0.31, 0.10 | 0.35, 0.20 |

    The errors of the mode losses, added up over the modes, are at most 0.08 and 0.42 of their first sum. Outputs meet
    the more, the larger the feedback and the more they are learned at one time: with entries of variance 1/outputs
    the error was 0.07, with whitened inputs too 0.12.

    ReLU networks without biases are predicted by their ``relu_linearisation``, which holds while the loss is above
    what linear maps reach: there (fa, dfa, three seeds, depth 2 and 3, rate 0.05) the error was at most 0.06 over the
    first 100 steps, and 0.16 over 400, when the loss was down to between 0.9 and 0.4 of the first.

    Args:
        W: W_1, …, W_L at the start, each [out in], without biases.
        B: Feedback as ``network`` takes it, such as ``layer.feedback.B`` of a converted model.
        X: Inputs [n d].
        Y: Targets [n outputs].
        rule: fa, dfa or bp.
        rate: η of full-batch steps on the mean of ½|f - y|²; then ``steps`` too. PyTorch's ``mse_loss`` is 2/outputs
            of that: its rate times that is η.
        steps: Their number.
        at: Steps to record at; None for about 100, evenly.
        times: Instead of rate and steps, of gradient flow: where to record, increasing from 0.
        activation: Of the hidden layers.
        decoupling: What a mode is taken to be.
        exact: Whether to run the matrix dynamics besides (of a ReLU network, those of its linear one).

    Raises:
        ValueError: sizes do not chain, a B is not of full rank, data are not finite or have no points, neither steps
            nor times, or both, were asked for, or the rule does not go with ReLUs.

    Warns:
        UserWarning: the rate is beyond what is stable, with the value.

    Source: derived.
    """
    one_of("decoupling", decoupling, get_args(Decoupling))
    one_of("activation", activation, ("linear", "relu"))
    if times is None and rate is not None and steps is not None:
        training = Steps(rate=rate, count=steps, at=at)
    elif times is not None and rate is None and steps is None:
        training = recording_times(times)
    else:
        raise ValueError(f"rate {rate}, steps {steps} and times {times}: pass rate and steps, or times alone")
    problem = _problem(W, B, X, Y, rule, activation, training)
    when, curves = _DECOUPLINGS[decoupling](problem)
    return Prediction(
        decoupling=decoupling,
        chains=_chains_of(problem),
        rate=rate or 0.0,
        times=when,
        target=problem.components.target,
        variance=problem.components.variance,
        outputs=problem.components.outputs[:, : len(problem.components.target)],
        inputs=problem.components.inputs,
        floor=problem.few.left,
        products=curves.products,
        mode_losses=curves.mode_losses,
        loss=curves.loss,
        exact=matrices(problem)[1] if exact else None,
    )


def _problem(
    W: Sequence[Numbers],
    B: Sequence[Numbers],
    X: Numbers,
    Y: Numbers,
    rule: Rule,
    activation: str,
    training: Steps | Float[Tensor, " times"],
) -> Problem:
    """The linear network that is to be predicted, in float64, with its data in few points and their modes."""
    inputs, targets = (part.double() for part in data(X, Y))
    state = network(W, B, rule=rule).map(lambda part: part.to(inputs))
    if len(state.W[0]) != 1:
        raise ValueError(f"weights of {len(state.W[0])} networks were given, expected those of one")
    conservation.loss_of(state, linear(rule), inputs, targets)  # refuses data that do not fit the network
    if activation == "relu":
        state = relu_linearisation(state, inputs, rule)
    few = compressed(inputs, targets)
    return Problem(state=state, rule=rule, few=few, components=components(few.X, few.Y), training=training)
