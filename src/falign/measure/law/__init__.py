"""The conservation law of a model's neurons, checked while the model trains.

Under feedback alignment ``½|w|² + ½b² - ⟨B, w_out⟩`` of a neuron changes only by the squares of the steps. How it is
checked, file by file: ``_trace`` runs the model once and follows the neurons from layer to layer, ``_propagate`` says
what each operation on the way does to them, ``_products`` which are multiplied with which (queries with keys), and
``_structures`` what is inside PyTorch's attention and recurrent modules; ``_laws`` decides for which layers there is a
law; ``_balance`` keeps its terms step by step, those of the layers fed in ``_downstream``, with sums over the rows of
``_weights`` and the optimizer's settings of ``_rates``; ``_conservation`` is the instrument that users hold, and
``_report`` its result.
"""

from falign.measure.law._conservation import ConservationLaw
from falign.measure.law._laws import Law
from falign.measure.law._report import LawReport, LawRow
from falign.measure.law._trace import Connection, Followed, follow

__all__ = ["Connection", "ConservationLaw", "Followed", "Law", "LawReport", "LawRow", "follow"]
