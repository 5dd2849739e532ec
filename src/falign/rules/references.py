"""References that a rule has to beat: networks of which the last layers alone are trained."""

from dataclasses import dataclass
from typing import ClassVar

from falign.rules.rule import Rule

__all__ = ["Frozen", "Shallow"]


@dataclass(frozen=True, kw_only=True)
class Frozen(Rule):
    """The last layer alone is trained, on features that stay as they were drawn.

    A rule of which the hidden layers learn must be better than this by more than its spread over seeds; accuracy beside
    an angle does not say so: features of an untrained network carry a readout far, and a rule can leave them worse than
    it found them.

    What is trained are the parameters of the last layer, and of modules that run after it. On ``example`` that is the
    order in which modules run, else that in which the model names them. All others are taken from the optimizer by
    ``requires_grad``, which ``falign.revert`` gives back.

    Source: the reference of every audit (Chu and Bacho 2023; Marschall, Cho and Savin 2020).
    """

    name: ClassVar[str] = "frozen"
    wiring: ClassVar = "none"
    draws: ClassVar[bool] = False
    trained_layers: ClassVar[int | None] = 1


@dataclass(frozen=True, kw_only=True)
class Shallow(Frozen):
    """The last two layers alone are trained, by backpropagation: one hidden layer on features that stay as drawn.

    A rule that is no better than this has trained the depth of the network in vain. Everything else is as under
    ``frozen``.

    Source: as for ``frozen``.
    """

    name: ClassVar[str] = "shallow"
    trained_layers: ClassVar[int | None] = 2
