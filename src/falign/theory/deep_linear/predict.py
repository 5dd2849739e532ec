"""The loss curve of a real linear network, and of each of its modes, from its initial weights, feedback and data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory import conservation
from falign.theory.deep_linear.covariances import compressed, covariances, data
from falign.theory.deep_linear.forms import FORMS, Curves, Form, Problem, Steps, chains_of, matrices
from falign.theory.deep_linear.gains import linearised
from falign.theory.deep_linear.modes import Modes, Rule
from falign.theory.deep_linear.network import linear, network
from falign.theory.door import public
from falign.theory.inputs import Numbers, moments, numbers, told


@dataclass(frozen=True, kw_only=True)
class Prediction(Curves):
    """The predicted curves, and what they were made of.

    Attributes:
        form: What a mode was taken to be.
        chains: The scalar chain of each mode, whatever the form: ``learning_time(chains)`` and the like apply to it.
        rate: η of the steps; 0 in gradient flow.
        times: Of the records; of steps, η times their number [times].
        target: ``λ_i``, the singular values of ``Σ_yx = Σ λ_i u_i v_iᵀ`` above rounding, falling [modes].
        variance: ``s_i = v_iᵀ Σ_xx v_i`` [modes].
        outputs: u_i in columns [outputs modes].
        inputs: v_i in columns [d modes].
        floor: The loss that no linear map can go below.
        exact: The curves of the matrix dynamics themselves, where they were asked for.
    """

    form: Form
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

    @public
    def beside(self, trained: Numbers) -> Float[Tensor, " times"]:
        """Predicted less trained loss at each record, as a share of the trained network's first.

        Args:
            trained: The losses of the trained network at the same records.

        Raises:
            ValueError: their number is another, they are not finite, or the first is not above 0.
        """
        found = numbers("losses", trained).to(self.loss)
        if found.shape != self.loss.shape or not found.isfinite().all():
            raise ValueError(
                f"losses of shape {tuple(found.shape)}, expected finite ones at the {len(self.times)} records predicted"
            )
        if not found[0] > 0:
            raise ValueError(f"the first loss is {float(found[0]):g}, of which errors are a share: expected above 0")
        return (self.loss - found) / found[0]


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
    form: Form = "outputs",
    exact: bool = False,
) -> Prediction:
    """The loss of every mode and of the whole, of full-batch steps or of gradient flow, if the modes kept apart.

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

    ReLU networks without biases are predicted as their ``linearised`` networks, which holds while the loss is above
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
        form: What a mode is taken to be.
        exact: Whether to run the matrix dynamics besides (of a ReLU network, those of its linear one).

    Raises:
        ValueError: sizes do not chain, a B is not of full rank, data are not finite or have no points, neither steps
            nor times, or both, were asked for, or the rule does not go with ReLUs.

    Warns:
        UserWarning: the rate is beyond what is stable, with the value.

    Source: derived.
    """
    if form not in get_args(Form) or activation not in ("linear", "relu"):
        raise ValueError(
            f"form {told(form)}, activation {told(activation)}: expected outputs or chains, linear or relu"
        )
    if times is None and rate is not None and steps is not None:
        training = Steps(rate=rate, count=steps, at=at)
    elif times is not None and rate is None and steps is None:
        training = moments(times)
    else:
        raise ValueError(f"rate {rate}, steps {steps} and times {times}: pass rate and steps, or times alone")
    problem = _problem(W, B, X, Y, rule, activation, training)
    when, curves = FORMS[form](problem)
    return Prediction(
        form=form,
        chains=chains_of(problem),
        rate=rate or 0.0,
        times=when,
        target=problem.target,
        variance=problem.variance,
        outputs=problem.outputs[:, : len(problem.target)],
        inputs=problem.inputs,
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
        state = linearised(state, inputs, rule)
    few = compressed(inputs, targets)
    U, λ, V = torch.linalg.svd(covariances(few.X, few.Y)[1], full_matrices=True)
    kept = int((λ > max(U.shape[0], V.shape[0]) * torch.finfo(λ.dtype).eps * λ[0]).sum())
    return Problem(
        state=state,
        rule=rule,
        few=few,
        outputs=U,
        inputs=V[:kept].mT,
        target=λ[:kept],
        variance=(few.X @ V[:kept].mT).square().mean(0),
        training=training,
    )
