"""Initial weights of converted models, chosen by what the conservation law says of the alignment that follows.

For a neuron k under the law ``C = ½|w_in|² + ½b² - V`` stays what it is, up to the squares of the steps, V being the
alignment ``⟨B[:, k], W[:, k]⟩`` of the weights out of it (``falign.measure.ConservationLaw`` has the other rules'). So
``V(t) ≥ -C(0)`` at all times, and a neuron with C(0) ≤ 0 is aligned for ever, with ``V ≥ ½|w_in|² + ½b²``.

The schemes draw all weights anew, so that they compare on the same random numbers, change the model in place and return
it. They are for models that are not trained yet: what a model has learned is lost::

    falign.convert(model, "fa")
    falign.init.dominant(model, example=x)
"""

from falign.init.neurons import aligned_forever
from falign.init.schemes import SCHEMES, anti, dominant, generic, small

__all__ = ["SCHEMES", "aligned_forever", "anti", "dominant", "generic", "small"]
