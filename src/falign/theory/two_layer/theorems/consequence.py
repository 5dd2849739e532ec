"""Without ridge wide networks do not align: cos∠(b, β) = O(n/√p), and for linear networks its mean is about n/p."""

from collections.abc import Sequence
from math import sqrt

import torch

from falign.theory.door import public
from falign.theory.statement import Assumption, TheoremCheck
from falign.theory.two_layer.activations import activation as activation_named
from falign.theory.two_layer.dual import Dual
from falign.theory.two_layer.kernels import limiting_kernel
from falign.theory.two_layer.start import Scale, Start
from falign.theory.two_layer.theorems import conditions
from falign.theory.two_layer.trajectory import spaced
from falign.theory.two_layer.width_free import WidthFree

_SOURCE = "Song, Xu and Lafferty 2021 (NeurIPS), section 4.1"


@public
def vanishing_alignment(start: Start, *, activation: str, rate: float, steps: int) -> TheoremCheck:
    """Check ``|cos∠(b, β)| ≤ (|<b, β(0)>|/|b| + |Δ|) / (|β(0)| - |Δ|)``, ``Δ = β(t) - β(0)``, in runs without ridge.

    The inequality is exact while |Δ| < |β(0)|; what theorem 3.2 adds is that |Δ| = O(n) as |β(0)| ≈ √p, whence
    O(n/√p). ``constants["cosine √p/n"]`` and ``constants["change/n"]`` are the largest ``|cos| √p/n`` and ``|Δ|γ/n``
    of the runs: compare them over widths.

    Args:
        start: Data and initial weights.
        activation: A name of ``ACTIVATIONS``.
        rate: η.
        steps: Steps to follow, looked at about 40 times.

    Source: Song, Xu and Lafferty 2021 (NeurIPS), section 4.1, the display before equation 4.1.
    """
    seeds, p = start.beta.shape
    n = start.X.shape[-2]
    own, largest = conditions.spectrum(limiting_kernel(start.X, activation_named(activation)).expand(seeds, n, n))
    engine = Dual(start, activation=activation, rate=rate)
    length, chance = start.beta.norm(dim=-1), (start.b * start.beta).sum(-1).abs() / start.b.norm(dim=-1)
    changes, cosines = [], []
    for t in spaced(steps, 40):
        engine.advance(t - engine.t)
        changes.append((engine.beta[:, 0] - start.beta).norm(dim=-1))
        cosines.append(engine.measure()["cosine"][:, 0].abs())
    change, cosine = torch.stack(changes, -1), torch.stack(cosines, -1)
    far = float((change / length[:, None]).max())
    bound = (chance[:, None] + change) / (length[:, None] - change)
    return TheoremCheck(
        name="Consequence of theorem 3.2",
        source=_SOURCE,
        reading="the chain of inequalities as printed; O(n/√p) is read off over widths",
        assumptions=(
            conditions.positive("assumption 3.1", "λ_min(Ḡ) > 0", own, largest, None),
            Assumption(name="small change", statement="|Δ| < |β(0)|", measured=far, needed=1.0, holds=far < 1),
        ),
        bound=bound,
        measured=cosine,
        scale=torch.ones_like(own),
        constants={
            "cosine √p/n": float(cosine.max()) * sqrt(p) / n,
            "change/n": float((change.amax(-1) * own).max()) / n,
            "mean cosine": float(cosine[:, -1].mean()),
        },
    )


@public
def linear_alignment_law(
    widths: Sequence[int], *, n: int, d: int, rate: float, steps: int, seeds: Sequence[int], inputs: Scale = "standard"
) -> TheoremCheck:
    """Check ``E cos∠(b, β(∞)) = (1/p) Σ_k (1 - ηk)/(1 - ηk/2)``, k the eigenvalues of XXᵀ: n/p for small η.

    For linear networks without ridge, taught by a Gaussian network. To leading order in 1/p, ``e(t) = (1 - ηk)ᵗ e(0)``
    in each eigenvector, E e(0)² = 2k, and β(t) gets ``(η²/p) Σ_{j<i} e(j)ᵀ XXᵀ e(i)`` times b, which sums to
    ``(1/p) Σ_k ½(1/k - η/(2 - ηk)) e_k(0)²``; |b||β| ≈ p. So the continuous-time law n/p, by which <b, β> grows by
    half the growth of |W|², is an upper limit: steps of ηk = 1/2 reach 2/3 of it.

    The measured series is ``|mean - law|`` over widths; it may be three standard errors of the mean, plus the
    relative correction of order n/p that the derivation leaves out.

    Args:
        widths: p, the axis of the series.
        n: Points.
        d: Input dimension.
        rate: η.
        steps: Steps, enough for the error to vanish: ``constants["error left"]`` is what remains of it.
        seeds: One run each, at least two.
        inputs: Distribution of the inputs.

    Raises:
        ValueError: fewer than two seeds, or no width or step.

    Source: derived here; the paper states only O(n/√p), section 4.1.
    """
    if not widths or steps < 1:
        raise ValueError(f"widths are {list(widths)} and steps {steps}, expected at least one of each")
    if len(seeds) < 2:
        raise ValueError(f"a mean needs a standard error, so at least two seeds, got {len(seeds)}")
    columns, left = [], []
    for p in widths:
        engine = WidthFree.sample(seeds, n=n, d=d, p=p, rate=rate, inputs=inputs)
        product = rate * engine.gram.K
        before = engine.error().norm(dim=-1)
        engine.advance(steps)
        left.append((engine.error().norm(dim=-1) / before).max())
        cosine = engine.measure()["cosine"][:, 0]
        law = ((1 - product) / (1 - product / 2)).sum(-1).mean() / p
        columns.append(torch.stack([cosine.mean(), cosine.std() / sqrt(len(seeds)), law]))
    mean, error, law = torch.stack(columns, dim=1).unsqueeze(1)
    rest = float(torch.stack(left).max())
    width = torch.tensor([list(widths)], dtype=torch.float64)
    return TheoremCheck(
        name="Law of the mean cosine",
        source="derived; sharper than " + _SOURCE,
        reading="linear network, Gaussian teacher; within three standard errors and a share n/p of the law",
        assumptions=(
            Assumption(
                name="converged", statement="|e(t)| ≤ 10⁻³ |e(0)|", measured=rest, needed=1e-3, holds=rest <= 1e-3
            ),
        ),
        bound=3 * error + law * n / width,
        measured=(mean - law).abs(),
        scale=torch.ones(1, dtype=torch.float64),
        constants={"error left": rest},
        series={"mean": mean, "standard error": error, "law": law, "n/p": n / width, "width": width},
    )
