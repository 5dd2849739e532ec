"""Beginnings of training: weights, feedback and the output's bias, and what the conservation law says of each.

For a neuron k under the law ``C = ½|w_in|² + ½b² - V`` stays what it is, up to the squares of the steps, V being the
alignment ``⟨B[:, k], W[:, k]⟩`` of the weights out of it (``falign.measure.ConservationLaw`` has the other rules'). So
``V(t) ≥ -C(0)`` at all times, and a neuron with C(0) ≤ 0 is aligned for ever, with ``V ≥ ½|w_in|² + ½b²``.

Weights: ``dominant``, ``small``, ``generic`` and ``anti`` draw all weights anew, so that they compare on the same
random numbers, change the model in place and return it. They are for models that are not trained yet: what a model has
learned is lost. ``noise`` trains the weights on noise, towards the feedback::

    falign.convert(model, "fa")
    falign.init.dominant(model, example=x)

Feedback: ``soft`` puts it at a given angle to the weights, once, and ``match`` takes that of direct rules from weights
that backpropagation has trained. The output's bias: ``prior_bias``. These three keep the weights as they are.
"""

from falign.init._feedback import MatchReport, MatchRow, match, soft
from falign.init._noise import NoiseReport, NoiseRow, noise
from falign.init._prior import prior_bias
from falign.init._schemes import SCHEMES, aligned_forever, anti, dominant, generic, small

__all__ = [
    "SCHEMES",
    "MatchReport",
    "MatchRow",
    "NoiseReport",
    "NoiseRow",
    "aligned_forever",
    "anti",
    "dominant",
    "generic",
    "match",
    "noise",
    "prior_bias",
    "small",
    "soft",
]
