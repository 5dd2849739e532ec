"""Result of measuring the alignment of a model: a row a layer, and the whole network."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from falign._show import Loud, Sheet, Tabular
from falign._style import Points, dots, height_of, scale_degrees


@dataclass(frozen=True, kw_only=True)
class LayerAlignment:
    """One linear map of a network; angles are in degrees, and None stands where there is nothing to compare.

    For a layer with weight W, feedback B, input x and output z let g be its true gradient (of all its trainable
    parameters) and f the one that it takes.

    Attributes:
        layer: Its name.
        kind: "linear", "convolution", or "parameter" of a matrix that is multiplied by hand (attention, recurrent
            kernels, products): its row has its gradient and B beside W, and no errors. Direct rules run attention and
            recurrent modules as layers: f and g are then those of the rows of W and bias that a product works with.
        delivered_angle: Mean over samples of the angle between the error that the layer hands to x and the true error
            at x, before it is multiplied by the derivative of the activation below. None where x wants no error.
        delivered_angle_sd: Standard deviation over samples.
        received_angle: The same of the error at z, behind the derivative of the activation above: what the layer learns
            from.
        received_angle_sd: Standard deviation over samples.
        gradient_angle: ∠(f, g).
        cosine: cos∠(f, g).
        gradient_norm: |g|.
        taken_norm: |f|.
        descent: ⟨g, f⟩ = cosine · gradient_norm · taken_norm.
        displacement_angle: ∠(-Δθ, g), Δθ what the optimizer does to the layer's parameters.
        displacement_norm: |Δθ|.
        weight_angle: ∠(B, W), signs included; None where B has another shape (direct rules) or carries nothing (the
            first layer).
        norm_ratio: |B| / |W|.
        sign_agreement: Share of the entries in which B and W have the same sign.
        neurons: How many neurons (channels) x has.
        aligned_neurons: Share of the neurons k of x with ⟨B[:, k], W[:, k]⟩ > 0.
        effective_rank: (Σσ²)² / Σσ⁴ of the error delivered, a matrix (samples, elements).
        input_norm: |h_l|, root mean square over samples of |x|.
        growth: |h_{l+1}| / |h_l| along the forward: of the block that the layer is in, where the model has a row of
            blocks of one class, else |z| / |x| of the layer itself. Below 5 in a healthy residual network.
        error_norm: |e|, the true error at z, of the whole batch.
        loss_change: Change of the loss by a step of the stated length along -f of this layer alone; None where none
            was asked for.
        unreadable: Which of "delivered", "received", "gradient", "loss" rest on rounding, joined by commas; their
            angles, cosine, ⟨g, f⟩ and loss change are None. None where everything can be read.
    """

    layer: str
    kind: str
    delivered_angle: float | None = None
    delivered_angle_sd: float | None = None
    received_angle: float | None = None
    received_angle_sd: float | None = None
    gradient_angle: float | None = None
    cosine: float | None = None
    gradient_norm: float | None = None
    taken_norm: float | None = None
    descent: float | None = None
    displacement_angle: float | None = None
    displacement_norm: float | None = None
    weight_angle: float | None = None
    norm_ratio: float | None = None
    sign_agreement: float | None = None
    neurons: int | None = None
    aligned_neurons: float | None = None
    effective_rank: float | None = None
    input_norm: float | None = None
    growth: float | None = None
    error_norm: float | None = None
    loss_change: float | None = None
    unreadable: str | None = None

    def lost(self, side: str) -> bool:
        """Tell whether a side, "delivered", "received", "gradient" or "loss", rests on rounding."""
        return self.unreadable is not None and side in self.unreadable.split(", ")


class OfLayers(Tabular):
    """Base of reports in which every layer is a row."""

    layers: Any

    def rows(self) -> list[dict[str, Any]]:
        """Give the rows as dicts, one a layer."""
        return [asdict(layer) for layer in self.layers]

    def _size(self) -> tuple[float, float]:
        return 7.0, height_of(len(self.layers))


@dataclass(frozen=True, kw_only=True)
class Alignment(OfLayers):
    """Agreement of the errors of one batch with the true ones; prints as a table.

    Attributes:
        rule: The rule's name; of several in one model all.
        loss: Of the batch.
        descent: -dL/dt = Σ⟨g, f⟩ over all parameters of the network, were they moved by -f dt: the sum of the layers'
            alignment × gradient × feedback-alignment components, and of ``other``.
        other: The part of it that is of parameters without a row: normalisation, embeddings, biases of what is
            multiplied by hand.
        dominance: D = Σ_{l<L} ⟨g_l, f_l⟩ / |g_L|², L the layer that runs last (of several outputs the last to
            be made) and has its true gradient; the loss falls while D > -1. None where g_L is zero.
        layers: A row a layer, in the order in which they ran.
        neurons: {layer: ⟨B[:, k], W[:, k]⟩ of every neuron k at its input}, where B has W's shape.
        neuron_cosines: {layer: cos∠(B[:, k], W[:, k])}.
        growth: {block: |h_{l+1}| / |h_l|}, of a model that has a row of blocks of one class.
        step_size: Length of the steps that ``loss_change`` is of, relative to |θ_l|; None where none was asked for.

    Source: Robertson and Koyejo 2024, the split into alignment, gradient and feedback-alignment components and
    alignment dominance as reconstructed from the abstract.
    """

    rule: str
    loss: float
    descent: float
    other: float
    dominance: float | None
    layers: tuple[LayerAlignment, ...]
    neurons: dict[str, Tensor] = field(repr=False)
    neuron_cosines: dict[str, Tensor] = field(repr=False)
    growth: dict[str, float] = field(default_factory=dict)
    step_size: float | None = None

    @property
    def unreadable(self) -> int:
        """Count the layers of which an angle rests on rounding."""
        return sum(any(layer.lost(side) for side in ("delivered", "received", "gradient")) for layer in self.layers)

    def _sheet(self) -> Sheet:
        dominance = "-" if self.dominance is None else f"{self.dominance:+.3g}"
        head = (
            f"rule {self.rule}: loss {self.loss:.4g}, -dL/dt {self.descent:.4g}, alignment dominance D {dominance} "
            f"({'the loss falls' if self.descent > 0 else 'the loss does not fall'} along the errors taken)"
        )
        table = [[title for title, _ in _COLUMNS], *([cell(row) for _, cell in _COLUMNS] for row in self.layers)]
        kept = [column for column in zip(*table, strict=True) if any(text != "-" for text in column[1:])]
        notes = [_LEGEND]
        if any(layer.unreadable for layer in self.layers):
            notes.append("unreadable: rounding moves this number by more than it tells; measure in a wider type")
        if self.step_size is not None:
            notes.append(f"loss change: of a step of {self.step_size:g} |θ| against f in this layer alone")
        return Sheet(head=head, table=list(zip(*kept, strict=True)), notes=notes)

    def _draw(self, axes: Any) -> None:
        series = []
        for label, side, column in _ANGLES:
            angles = [_UNREADABLE if row.lost(side) else getattr(row, column) for row in self.layers]
            spread = [getattr(row, f"{column}_sd", None) for row in self.layers]
            if any(angle is not None for angle in angles):
                series.append(Points(label=label, values=angles, spread=spread))
        names = [row.layer for row in self.layers]
        dots(axes, names, series, xlabel="degrees to the true one", title=f"rule {self.rule}", marked=RIGHT_ANGLE)
        scale_degrees(axes)


def _angle(mean: float | None, sd: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.1f}°" if sd is None else f"{mean:.1f}° ± {sd:.1f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _read(row: LayerAlignment, side: str, text: str) -> str:
    return _UNREADABLE if row.lost(side) else text


_UNREADABLE = Loud("unreadable")
RIGHT_ANGLE = 90.0, "chance"
"""The angle between independent directions, and what it is."""
_ANGLES = (
    ("gradient", "gradient", "gradient_angle"),
    ("error before", "delivered", "delivered_angle"),
    ("error behind", "received", "received_angle"),
)
"""What a picture shows: (name, side that may be unreadable, column)."""
_LEGEND = "angles in degrees, mean ± standard deviation over samples; before, behind: the derivative of the activation"
_COLUMNS = (
    ("layer", lambda row: row.layer),
    ("error before", lambda row: _read(row, "delivered", _angle(row.delivered_angle, row.delivered_angle_sd))),
    ("error behind", lambda row: _read(row, "received", _angle(row.received_angle, row.received_angle_sd))),
    ("gradient", lambda row: _read(row, "gradient", _angle(row.gradient_angle))),
    ("step", lambda row: _angle(row.displacement_angle)),
    ("|f|/|g|", lambda row: _number(row.taken_norm / row.gradient_norm if row.gradient_norm else None, ".2g")),
    ("⟨g,f⟩", lambda row: _number(row.descent, ".2e")),
    ("B to W", lambda row: _angle(row.weight_angle)),
    ("|B|/|W|", lambda row: _number(row.norm_ratio, ".2f")),
    ("same sign", lambda row: _number(row.sign_agreement, ".0%")),
    ("aligned", lambda row: _number(row.aligned_neurons, ".0%")),
    ("rank", lambda row: _number(row.effective_rank, ".1f")),
    ("growth", lambda row: _number(row.growth, ".2g")),
    ("loss change", lambda row: _read(row, "loss", _number(row.loss_change, "+.2e"))),
)
