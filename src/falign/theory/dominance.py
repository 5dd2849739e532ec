"""Alignment dominance: the hidden layers' part in the descent of the loss, against that of the last layer.

The last layer always learns by its true gradient, so the loss falls as long as the hidden layers do not raise it by
more than the last one lowers it. The functions take plain tensors: those that ``falign.measure`` gives for real
networks, or the trajectories of ``falign.theory.conservation``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from falign._validation import check_floating, check_same_shape, describe, is_number
from falign.theory._coerce import public
from falign.theory.conservation._law import aligned_forever
from falign.theory.conservation._network import (
    Dynamics,
    Points,
    State,
    activation,
    check_inputs,
    check_layers,
    check_targets,
    feedback_matrices,
    output,
)
from falign.theory.conservation._simulate import Trajectory
from falign.theory.conservation._theorems import homogeneous_activation
from falign.theory.statement import Assumption, TheoremCheck

__all__ = [
    "Split",
    "convergence",
    "largest_kappa",
    "lasting_descent",
    "least_product",
    "lojasiewicz_constant",
    "lojasiewicz_exponent",
    "neuron_descent",
    "predicted_loss",
    "rising_example",
    "split",
    "squared_loss_rate",
]

# The descent of the loss under any rule: alignment × gradient × update, and the hidden layers' part in it.


@dataclass(frozen=True, kw_only=True)
class Split:
    """The descent ``-dL/dt = Σ_l ⟨g_l, f_l⟩ = Σ_l cos∠(g_l, f_l) |g_l| |f_l|``, layer by layer.

    g is the true gradient, f the one that the rule takes in its place.

    Attributes:
        alignment: cos∠(g_l, f_l); 0 where g_l or f_l is 0.
        gradient: |g_l|.
        update: |f_l|.
        descent: Their product, ⟨g_l, f_l⟩.
    """

    alignment: Float[Tensor, "*times layers"]
    gradient: Float[Tensor, "*times layers"]
    update: Float[Tensor, "*times layers"]
    descent: Float[Tensor, "*times layers"]

    @property
    def total(self) -> Float[Tensor, "*times"]:
        """``-dL/dt``."""
        return self.descent.sum(-1)

    @property
    def dominance(self) -> Float[Tensor, "*times"]:
        """``D = Σ_{l<L} ⟨g_l, f_l⟩ / |g_L|²``: the loss falls where D > -1, as f_L = g_L."""
        return self.descent[..., :-1].sum(-1) / self.gradient[..., -1].square()


@public
def split(
    descent: Float[Tensor, "*times layers"],
    gradient_norm: Float[Tensor, "*times layers"],
    taken_norm: Float[Tensor, "*times layers"],
) -> Split:
    """Split the descent, from ⟨g_l, f_l⟩, |g_l| and |f_l| as a trajectory or ``falign.measure.alignment`` gives them.

    Args:
        descent: ⟨g_l, f_l⟩, the output layer last.
        gradient_norm: |g_l|.
        taken_norm: |f_l|.

    Raises:
        ValueError: the three differ in shape.

    Source: after Robertson and Koyejo 2024 (ICML), whose summary names the three components; the formula is ours.
    """
    check_same_shape(descent=descent, gradient_norm=gradient_norm, taken_norm=taken_norm)
    norms = gradient_norm * taken_norm
    # A gradient of 0 has no direction: it counts as orthogonal.
    cosine = torch.where(norms > 0, descent / torch.where(norms > 0, norms, 1.0), 0.0)
    return Split(alignment=cosine, gradient=gradient_norm, update=taken_norm, descent=descent)


@public
def largest_kappa(dominance: Float[Tensor, "*runs times"]) -> Float[Tensor, "*runs"]:
    """Return ``κ = 1 + min_t D(t)``: the largest with ``Σ_{l<L} ⟨g_l, f_l⟩ ≥ -(1 - κ) |g_L|²`` at every recorded time.

    Then ``dL/dt ≤ -κ |g_L|²``. Alignment dominance holds where κ > 0; above 1 the hidden layers help throughout.

    Raises:
        ValueError: there is no time.

    Source: the definition is our reading of "alignment dominance", Robertson and Koyejo 2024 (ICML), whose own was not
    available; there κ is capped at 1.
    """
    check_same_shape(dominance=dominance)
    return 1 + dominance.amin(-1)


# The rate at which the loss must fall, by how far alignment dominates and a bound on the gradient by the loss.

_SOURCE = "derived; after Robertson and Koyejo 2024 (ICML)"


@public
def predicted_loss(
    initial: Float[Tensor, " runs"],
    times: Float[Tensor, " times"],
    *,
    kappa: Float[Tensor, " runs"],
    mu: Float[Tensor, " runs"],
    exponent: float = 1.0,
) -> Float[Tensor, "runs times"]:
    """Return the largest loss possible under ``dL/dt ≤ -κ |g_L|²`` and ``|g_L|² ≥ μ Lᵃ``.

    a = 1: ``L(t) = L₀ exp(-κμt)``. a > 1: ``L(t) = (L₀^{1-a} + (a - 1) κμt)^{-1/(a-1)}``, which for a = 2 falls as
    1/t. Equality holds where both premises are equalities.

    Args:
        initial: L₀.
        times: t, from 0; for steps of size η, η times their number.
        kappa: κ > 0 of each run.
        mu: μ > 0 of each run.
        exponent: a ≥ 1.

    Raises:
        ValueError: a is below 1, κ, μ or L₀ is negative, or there is not one of each a run.

    Source: derived. Summaries of Robertson and Koyejo 2024 (ICML) speak of "exponential or generalised decay".
    """
    if not (is_number(exponent) and exponent >= 1):
        raise ValueError(
            f"exponent is {describe(exponent)}, expected a ≥ 1: below it the loss would vanish in finite time"
        )
    check_same_shape(initial=initial, kappa=kappa, mu=mu)
    check_floating(times=times)
    if initial.ndim != 1 or times.ndim != 1:
        raise ValueError(
            f"initial losses {tuple(initial.shape)} and times {tuple(times.shape)} must be lists: one a run"
        )
    for name, given in (("initial", initial), ("kappa", kappa), ("mu", mu)):
        if (given < 0).any():
            raise ValueError(f"{name} is {float(given.min()):g} in a run, expected at least 0")
    rate = (kappa * mu)[:, None] * times
    if exponent == 1:
        return initial[:, None] * torch.exp(-rate)
    power = exponent - 1
    return initial[:, None] * (1 + power * initial[:, None] ** power * rate) ** (-1 / power)


@public
def lojasiewicz_constant(
    loss: Float[Tensor, "*runs times"], gradient_norm: Float[Tensor, "*runs times"], exponent: float = 1.0
) -> Float[Tensor, "*runs"]:
    """Return ``μ = min_t |g_L|²/Lᵃ``: the largest constant of ``|g_L|² ≥ μ Lᵃ`` along a trajectory.

    Args:
        loss: L, less its infimum where that is not 0.
        gradient_norm: |g_L|, of the output layer.
        exponent: a.

    Raises:
        ValueError: the two have not the same shape, or a is no number.
    """
    check_same_shape(loss=loss, gradient_norm=gradient_norm)
    if not is_number(exponent):
        raise ValueError(f"exponent is {describe(exponent)}, expected a number")
    ratio = gradient_norm.square() / loss.clamp_min(torch.finfo(loss.dtype).tiny) ** exponent
    # Where the loss is 0 every μ will do.
    return torch.where(loss > 0, ratio, torch.inf).amin(-1)


@public
def lojasiewicz_exponent(loss: Float[Tensor, " times"], gradient_norm: Float[Tensor, " times"]) -> tuple[float, float]:
    """Estimate (a, its standard error): the slope of ``log |g_L|²`` against ``log L``, least squares.

    Raises:
        ValueError: fewer than three times with a positive loss and gradient, all at the same loss, or not as many of
            both.
    """
    check_floating(loss=loss, gradient_norm=gradient_norm)
    if loss.ndim != 1 or loss.shape != gradient_norm.shape:
        raise ValueError(
            f"shapes are {tuple(loss.shape)} and {tuple(gradient_norm.shape)}: expected one a time of both"
        )
    usable = (loss > 0) & (gradient_norm > 0)
    x, y = loss[usable].double().log(), 2 * gradient_norm[usable].double().log()
    if len(x) < 3 or float(x.max() - x.min()) == 0:
        raise ValueError(f"an exponent wants three different positive losses, got {int(usable.sum())} of {len(loss)}")
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    error = ((y - slope * x).square().sum() / (len(x) - 2) / (x @ x)).sqrt()
    return float(slope), float(error)


@public
def convergence(
    trajectory: Trajectory, *, exponent: float = 1.0, kappa: float | None = None, mu: float | None = None
) -> TheoremCheck:
    """Check ``L(t) ≤`` the predicted loss along a run, given κ and μ or with those measured along it.

    Args:
        trajectory: With ``loss``, ``dominance`` and ``gradient_norm`` recorded, without decay. The theorem is of
            gradient flow; steps add ``½ η² |f|²`` times a curvature, so they must be small.
        exponent: a of ``|g_L|² ≥ μ Lᵃ``.
        kappa: κ; None takes each run's largest.
        mu: μ; None takes each run's largest.

    Returns:
        The check. ``constants``: kappa, mu (the least of the runs); ``series["dominance"]``. A given κ or μ that the
        run does not have is an assumption that fails.

    Raises:
        ValueError: a is below 1, or κ or μ no number.

    Source: derived from the definition in ``largest_kappa``.
    """
    for name, given in (("kappa", kappa), ("mu", mu)):
        if given is not None and not is_number(given):
            raise ValueError(f"{name} is {describe(given)}, expected a number, or None")
    rates, _ = trajectory.dynamics.of_layers(trajectory.start)
    loss, dominance, gradient = trajectory["loss"], trajectory["dominance"], trajectory["gradient_norm"][..., -1]
    measured_kappa, measured_mu = largest_kappa(dominance), lojasiewicz_constant(loss, gradient, exponent)
    used_kappa = measured_kappa if kappa is None else torch.full_like(measured_kappa, kappa)
    used_mu = measured_mu if mu is None else torch.full_like(measured_mu, mu)
    bound = predicted_loss(
        loss[:, 0],
        trajectory.times,
        kappa=rates[-1] * used_kappa.clamp(min=0),
        mu=used_mu.clamp(min=0),
        exponent=exponent,
    )
    return TheoremCheck(
        name="Convergence under alignment dominance",
        source=_SOURCE,
        reading=f"D = Σ_(l<L) ⟨g_l, f_l⟩/|g_L|², κ = 1 + min D, |g_L|² ≥ μ L^{exponent:g}, at the recorded times",
        assumptions=(
            _reached("alignment dominance", "Σ_(l<L) ⟨g_l, f_l⟩ ≥ -(1 - κ)|g_L|² with κ > 0", measured_kappa, kappa),
            _reached("gradient inequality", f"|g_L|² ≥ μ L^{exponent:g} with μ > 0", measured_mu, mu),
            _no_decay(trajectory),
            _small_steps(trajectory),
        ),
        bound=bound,
        measured=loss,
        scale=loss[:, 0] * (1.0 if trajectory.rate else 1e6),
        constants={"kappa": float(used_kappa.min()), "mu": float(used_mu.min())},
        series={"dominance": dominance},
    )


def _no_decay(trajectory: Trajectory) -> Assumption:
    """Check that λ = 0: decay can raise a loss that does not include it."""
    decay = max(trajectory.dynamics.of_layers(trajectory.start)[1])
    return Assumption(name="no decay", statement="λ = 0", measured=decay, needed=0.0, holds=decay == 0)


def _small_steps(trajectory: Trajectory) -> Assumption:
    """State that time is continuous; the theorem does not say how small steps must be, so they leave it open."""
    return Assumption(
        name="small steps", statement="η → 0", measured=trajectory.rate, holds=None if trajectory.rate else True
    )


def _reached(name: str, statement: str, measured: Float[Tensor, " runs"], needed: float | None) -> Assumption:
    least = float(measured.min())
    limit = 0.0 if needed is None else needed
    return Assumption(name=name, statement=statement, measured=least, needed=limit, holds=least >= limit and least > 0)


# Two layers and one output: descent under any loss once every neuron is aligned; a counterexample with two outputs.


@public
def neuron_descent(state: State, dynamics: Dynamics, X: Points, y: Points) -> Float[Tensor, "runs neurons"]:
    """Return ``v_k m_k |u_k|²``, ``u_k = E[ℓ'(f) φ'(z_k) (x, 1)]``: the part of each hidden neuron in ``-dL/dt``.

    v are the output weights and m the feedback weights: ``-dL/dt = |∇_v L|² + Σ_k v_k m_k |u_k|²``
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
    check_targets(f, y)
    v, m = state.W[1][:, 0], feedback_matrices(state, dynamics)[0][:, 0]
    z = X @ state.W[0].mT + (state.b[0].unsqueeze(-2) if state.b else 0)
    weighed = dynamics.loss.error(f, y) * dynamics.activation.slope(z)
    square = (weighed.mT @ X).square().sum(-1) + (weighed.sum(-2).square() if state.b else 0)
    return v * m * square


@public
def lasting_descent(trajectory: Trajectory) -> TheoremCheck:
    """Check that the loss never rises when every neuron is aligned for ever, whatever the loss function.

    ``C_k(0) ≤ 0`` for all k gives ``v_k b_k ≥ 0`` at all times, so ``dL/dt ≤ -|∇_v L|²``. The series are the loss and
    that of the recorded time before.

    Args:
        trajectory: Of fa, two layers and one output, with ``loss`` recorded. The theorem is of gradient flow; steps
            must be small enough.

    Raises:
        ValueError: there are more layers or outputs, or only one time was recorded.

    Source: derived.
    """
    _two_layers(trajectory.start)
    aligned = aligned_forever(trajectory.start, trajectory.dynamics)
    loss = trajectory["loss"]
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
            homogeneous_activation(trajectory),
            _no_decay(trajectory),
            _small_steps(trajectory),
        ),
        bound=loss[:, :-1],
        measured=loss[:, 1:],
        scale=loss[:, 0] * (1.0 if trajectory.rate else 1e6),
    )


@public
def squared_loss_rate(state: State, dynamics: Dynamics, X: Points) -> Float[Tensor, " runs"]:
    """Return ``rate = (2/n)(λ_min(G) + λ_min(H))``: under the squared loss ``dL/dt = -eᵀ(G + H)e/n² ≤ -rate · L``.

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
    check_layers(state.W, state.b)
    check_inputs(state.W[0], X)
    one = 1.0 if state.b else 0.0
    z = X @ state.W[0].mT + (state.b[0].unsqueeze(-2) if state.b else 0)
    h, slope = dynamics.activation.value(z), dynamics.activation.slope(z)
    product = (state.W[1][:, 0] * feedback_matrices(state, dynamics)[0][:, 0]).unsqueeze(-2)
    G = h @ h.mT + one
    H = ((slope * product) @ slope.mT) * (X @ X.mT + one)
    least = torch.linalg.eigvalsh(G)[..., 0] + torch.linalg.eigvalsh(H)[..., 0]
    return 2 / X.shape[-2] * least


@public
def least_product(
    B: Float[Tensor, "outputs neurons"], W: Float[Tensor, "outputs neurons"]
) -> Float[Tensor, " neurons"]:
    """Return ``min over |δ| = 1 of (W[:, k]·δ)(B[:, k]·δ) = ½ (⟨B, W⟩ - |B||W|)`` for every neuron k.

    It is negative unless the columns are parallel, which is why a positive ⟨B[:, k], W[:, k]⟩ guarantees descent with
    one output only.

    Raises:
        ValueError: the two differ in shape.

    Source: derived.
    """
    check_same_shape(B=B, W=W)
    return ((B * W).sum(0) - B.norm(dim=0) * W.norm(dim=0)) / 2


def rising_example() -> tuple[State, Dynamics, Tensor, Tensor]:
    """Construct a linear network with two outputs, aligned for ever (C = -0.98), whose loss rises at first.

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
    return state, Dynamics(activation=activation("linear")), torch.ones(1, 1, dtype=torch.float64), y


def _two_layers(state: State) -> None:
    if state.depth != 2 or state.W[1].shape[1] != 1:
        raise ValueError(f"expected two layers and one output, got {state.depth} and {state.W[-1].shape[1]}")
