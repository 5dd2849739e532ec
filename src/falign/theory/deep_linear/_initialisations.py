"""Initial weights by name, and what each does to the order in which components of different size are learned.

Only the start differs. Feedback is taken as positive; λ is the size of a component. Under direct feedback alignment the
chain is the same with ``c_l = m_{l+1}`` in place of ``m_{l+1}…m_L``: at depth two, and with unit feedback at any depth,
it is the same one. Gradient descent beside each is ``modes(λ, start, rule="bp")``; it goes by the sizes of the weights,
so that positive, negative, aligned and anti-aligned starts are one and the same to it.

Source: derived, after the abstract of Girotti, Mitliagkas and Gidel 2021, which names implicit regularisation and
anti-regularisation; the starts are ours.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from falign._validation import named, positive, whole_between
from falign.theory._coerce import public
from falign.theory.deep_linear._modes import DEEPEST

Order: TypeAlias = Literal["regularises", "neutral", "anti-regularises", "never learns"]
"""Large components first, all together, small components first, none."""


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """One way to start.

    Attributes:
        name: Its name.
        order: What feedback alignment then does to the order.
        statement: The learning times, and where the order holds.
        descent: What gradient descent does from the same start.
        descent_statement: Its learning times.
        signs: θ_1, θ_2 and every θ above, as multiples of the size.
    """

    name: str
    order: Order
    statement: str
    descent: Order
    descent_statement: str
    signs: tuple[int, int, int]

    @public
    def start(self, size: float = 1.0, depth: int = 2) -> tuple[float, ...]:
        """θ_1, …, θ_L of every mode alike, for ``modes``.

        Args:
            size: Of the weights that are not 0.
            depth: L, at least 2.

        Raises:
            ValueError: the size is not positive or there are fewer than two layers.
        """
        positive("size", size)
        whole_between("depth", depth, 2, DEEPEST)
        first, second, above = self.signs
        return tuple(float(size * sign) for sign in (first, second, *[above] * (depth - 2)))


_EVEN = "the sizes of the weights alone count: ln(1/tolerance)/size^(2(L-1)) of all λ that are small to them"

INITIALISATIONS = {
    each.name: each
    for each in (
        Initialisation(
            name="zero",
            order="regularises",
            statement="t ∝ λ^(-(2^L-2)/(2^L-1)), exactly, of two layers 2.0107 (mλ)^(-2/3) to 90 %: larger components "
            "first, but by a power law, without a plateau, as θ_1' = c_1 λ is not 0 at the start",
            descent="never learns",
            descent_statement="zero weights are a saddle",
            signs=(0, 0, 0),
        ),
        Initialisation(
            name="small",
            order="regularises",
            statement="as from zero where λ is well above the product of the weights",
            descent="regularises",
            descent_statement="a plateau, then a rise: of two layers t ≈ ln(1/size²)/(2λ) and more, so that components "
            "are learned one after the other",
            signs=(1, 1, 1),
        ),
        Initialisation(
            name="positive",
            order="neutral",
            statement="all K_l > 0 and θ_1 = 0: all components at t ≈ ln(1/tolerance)/ΠK_l while λ is small to the "
            "weights (of two layers to √m K^(3/2)); larger ones as from zero",
            descent="neutral",
            descent_statement=_EVEN,
            signs=(0, 1, 1),
        ),
        Initialisation(
            name="negative",
            order="regularises",
            statement="K_1 < 0 and θ_1 = 0: the product goes the wrong way first, then t ≈ (3/2) ln(1/λ)/(m|K|) and a "
            "constant of two layers: larger components first, by a logarithm",
            descent="neutral",
            descent_statement=_EVEN,
            signs=(0, -1, 1),
        ),
        Initialisation(
            name="aligned",
            order="regularises",
            statement="θ_1 > 0, along m and λ, and θ_2 = 0: larger components first, mildly, the smallest together",
            descent="neutral",
            descent_statement=_EVEN,
            signs=(1, 0, 1),
        ),
        Initialisation(
            name="anti-aligned",
            order="anti-regularises",
            statement="θ_1 < 0, against m and λ, and θ_2 = 0: smaller components first below λ_c, where the final rate "
            "falls with λ to 0 and the forward weight ends against its feedback (of two layers λ_c = size³/(3√3 m)); "
            "above λ_c, past a bottleneck, larger ones first",
            descent="neutral",
            descent_statement=_EVEN,
            signs=(-1, 0, 1),
        ),
    )
}
"""All of them by name."""


def initialisation(name: str) -> Initialisation:
    """Look up an initialisation by its name.

    Raises:
        ValueError: there is none.
    """
    return named("initialisation", name, INITIALISATIONS)
