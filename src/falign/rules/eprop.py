"""E-prop: direct feedback alignment without errors through time."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules._direct import DirectRule

__all__ = ["EligibilityPropagation"]


@dataclass(frozen=True, kw_only=True)
class EligibilityPropagation(DirectRule):
    """Direct feedback alignment in which no error goes back through the recurrent products: B_hh = 0.

    ``error at x_t = e_t B_ih`` and ``error at h_{t-1} = 0``: the error of a time meets what a cell itself remembers,
    its gates, cell state and leak, which are walked back exactly. A weight's gradient is then Σ_t L_t ε_t, with the
    learning signal ``L_t`` that the layers above deliver to h_t, and the eligibility trace ``ε_t``. This is e-prop with
    random broadcast weights; for a plain leaky network it is random-feedback local online learning (RFLO). Layers that
    are not recurrent learn as under ``dfa``.

    Recurrent are the products of states in ``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` and their cells, and a layer that runs
    once a step, on what it has made one step before.

    Args:
        positions: as for ``dfa``.

    Needs: as ``dfa``. Limits: what a state does to the next by its products alone is not learned: without gates that
    keep it, memory is short.

    Source: Bellec et al. 2020 (Nature Communications 11, 3625), eq. 1 and 3, random e-prop; Murray 2019 (eLife 8,
    e43299), eq. 5 to 7.
    """

    name: ClassVar[str] = "eprop"
    size: ClassVar[float] = 0.5
    through_time: ClassVar[bool] = False
