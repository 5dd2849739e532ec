"""Two layers and one output: descent for any loss once every neuron is aligned, and what several outputs change."""

import torch
from jaxtyping import Float
from torch import Tensor

from falign.theory.conservation.fits import fits_inputs, fits_layers, fits_targets
from falign.theory.conservation.gates import gate
from falign.theory.conservation.law import aligned_forever
from falign.theory.conservation.measurements import Course
from falign.theory.conservation.network import Dynamics, Points, State, carriers, output
from falign.theory.conservation.theorems import homogeneous_gate
from falign.theory.dominance.convergence import no_decay, small_steps
from falign.theory.door import public
from falign.theory.inputs import alike
from falign.theory.statement import Assumption, TheoremCheck

_SOURCE = "derived; after Robertson and Koyejo 2024 (ICML)"


@public
def neuron_descent(state: State, dynamics: Dynamics, X: Points, y: Points) -> Float[Tensor, "runs neurons"]:
    """``v_k m_k |u_k|²``, ``u_k = E[ℓ'(f) φ'(z_k) (x, 1)]``: what each hidden neuron adds to ``-dL/dt``.

    v are the output weights and m the feedback that carries the error: ``-dL/dt = |∇_v L|² + Σ_k v_k m_k |u_k|²``
    (with the output bias in v).

    Args:
        state: Two layers, one output.
        dynamics: Equal rates.
        X: Inputs.
        y: Targets.

    Raises:
        ValueError: there are more layers or outputs, or the data do not fit the network.

    Source: derived.
    """
    _two_layers(state)
    f = output(state, dynamics, X)
    fits_targets(f, y)
    v, m = state.W[1][:, 0], carriers(state, dynamics)[0][:, 0]
    z = X @ state.W[0].mT + (state.b[0].unsqueeze(-2) if state.b else 0)
    weighed = dynamics.loss.error(f, y) * dynamics.gate.slope(z)
    square = (weighed.mT @ X).square().sum(-1) + (weighed.sum(-2).square() if state.b else 0)
    return v * m * square


@public
def lasting_descent(course: Course) -> TheoremCheck:
    """Check that the loss never rises when every neuron is aligned for ever, whatever the loss function.

    ``C_k(0) ≤ 0`` for all k gives ``v_k b_k ≥ 0`` at all times, so ``dL/dt ≤ -|∇_v L|²``. The series are the loss and
    what it was at the time recorded before.

    Args:
        course: Of fa, two layers and one output, with ``loss`` recorded. The theorem is of gradient flow; steps must
            be small enough.

    Raises:
        ValueError: there are more layers or outputs, or one time was recorded only.

    Source: derived.
    """
    _two_layers(course.start)
    aligned = aligned_forever(course.start, course.dynamics)
    loss = course["loss"]
    if loss.shape[1] < 2:
        raise ValueError(f"{loss.shape[1]} time was recorded: descent is seen between two")
    return TheoremCheck(
        name="Descent with one output",
        source=_SOURCE,
        reading="two layers, one output: L(t) ≤ L at the time recorded before",
        assumptions=(
            Assumption(
                name="aligned for ever",
                statement="share of neurons with C_k(0) ≤ 0",
                measured=float(aligned.double().mean()),
                needed=1.0,
                holds=bool(aligned.all()),
            ),
            homogeneous_gate(course),
            no_decay(course),
            small_steps(course),
        ),
        bound=loss[:, :-1],
        measured=loss[:, 1:],
        scale=loss[:, 0] * (1.0 if course.rate else 1e6),
    )


@public
def squared_loss_rate(state: State, dynamics: Dynamics, X: Points) -> Float[Tensor, " runs"]:
    """``(2/n)(λ_min(G) + λ_min(H))``: under the squared loss ``dL/dt = -eᵀ(G + H)e/n² ≤ -rate · L`` at this state.

    ``G_ij = h_i·h_j (+ 1)`` and ``H_ij = Σ_k v_k m_k φ'_ki φ'_kj (x_i·x_j (+ 1))``, 1 for the biases, ``L = |e|²/2n``.
    Where every ``v_k m_k ≥ 0`` H is positive semidefinite, and G alone gives exponential decay if the features are
    independent.

    Raises:
        ValueError: there are more layers or outputs, the loss is another, or the inputs do not fit the network.

    Source: derived; G and H are those of Song, Xu and Lafferty 2021 (NeurIPS), section 3.
    """
    _two_layers(state)
    if dynamics.loss.name != "squared":
        raise ValueError(f"the rate is that of the squared loss, got {dynamics.loss.name!r}")
    fits_layers(state.W, state.b)
    fits_inputs(state.W[0], X)
    one = 1.0 if state.b else 0.0
    z = X @ state.W[0].mT + (state.b[0].unsqueeze(-2) if state.b else 0)
    h, slope = dynamics.gate.value(z), dynamics.gate.slope(z)
    product = (state.W[1][:, 0] * carriers(state, dynamics)[0][:, 0]).unsqueeze(-2)
    G = h @ h.mT + one
    H = ((slope * product) @ slope.mT) * (X @ X.mT + one)
    least = torch.linalg.eigvalsh(G)[..., 0] + torch.linalg.eigvalsh(H)[..., 0]
    return 2 / X.shape[-2] * least


@public
def least_product(
    B: Float[Tensor, "outputs neurons"], W: Float[Tensor, "outputs neurons"]
) -> Float[Tensor, " neurons"]:
    """``min over |δ| = 1 of (W[:, k]·δ)(B[:, k]·δ) = ½ (⟨B, W⟩ - |B||W|)``: negative unless the columns are parallel.

    It is why a positive ⟨B[:, k], W[:, k]⟩ guarantees descent with one output only.

    Raises:
        ValueError: the two have not the same shape.

    Source: derived.
    """
    alike(B=B, W=W)
    return ((B * W).sum(0) - B.norm(dim=0) * W.norm(dim=0)) / 2


def rising_example() -> tuple[State, Dynamics, Tensor, Tensor]:
    """A linear network with two outputs, aligned for ever (C = -0.98), whose loss rises at first.

    One neuron, h = 0.2 x; w_out = (1, 0), B = (1, 2), x = 1 and the error δ = (1, -1): ``⟨B, w_out⟩ = 1``, but
    ``(w_out·δ)(B·δ) = -1``, so ``-dL/dt = |δ|²h² - x² = -0.92``.

    Returns:
        State, dynamics, X, y.

    Source: constructed.
    """
    number = torch.tensor
    state = State(
        W=(number([[[0.2]]]).double(), number([[[1.0], [0.0]]]).double()), B=(number([[[1.0], [2.0]]]).double(),)
    )
    y = number([[0.2 - 1.0, 1.0]]).double()
    return state, Dynamics(gate=gate("linear")), torch.ones(1, 1, dtype=torch.float64), y


def _two_layers(state: State) -> None:
    if state.depth != 2 or state.W[1].shape[1] != 1:
        raise ValueError(f"expected two layers and one output, got {state.depth} and {state.W[-1].shape[1]}")
