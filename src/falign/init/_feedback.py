"""Feedback from the weights, once: at a given angle to them, or matched to what backpropagation has trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, radians, sin
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign._attached import Feedback
from falign._convert import feedback_state, load_feedback_state
from falign._show import Sheet, Shown
from falign._style import Points, dots, height_of
from falign._validation import describe, is_number, whole_between, whole_number
from falign._wiring import Wiring, converted, feedbacks, unwrapped, wiring_of
from falign.feedback import generator
from falign.init._jacobian import Jacobian, Measured, mean_jacobians
from falign.layers import kind_of, weight_of
from falign.measure._angles import angle
from falign.rules import Rule

_Model = TypeVar("_Model", bound=nn.Module)


def soft(model: _Model, *, angle: float | int = 45, example: Any = None, seed: int | None = None) -> _Model:
    """Put every feedback B at an angle to its weight W, once; |B| and the weights stay as they are.

    ``B ← |B| (cos θ · W/|W| + sin θ · U/|U|)``, U the part of a random matrix that is orthogonal to W, so that
    ``∠(B, W) = θ`` to rounding (all entries of a layer as one vector). From then on B is what the rule makes of it:
    fixed feedback stays, learned and moving feedback begins there. Under direct rules the mean Jacobian from the
    layer's input to the output stands for W (``match``).

    By the law, of fixed feedback: a layer's alignment begins at ``Σ_k V_k = |B| |W| cos θ``, and C is lower by as much.
    At θ = 0 neuron k has ``V_k = (|B|/|W|) |W[:, k]|²``, so it is aligned for ever if ``½|w_in|² + ½b² ≤ (|B|/|W|)
    |W[:, k]|²``. PyTorch's own weights do not meet that where a layer has less than half as many outputs as inputs:
    there alignment can be lost again (``aligned_forever`` tells; ``dominant`` makes sure).

    B is then no function of the seed of ``convert`` any more: keep ``falign.feedback_state`` with a checkpoint.

    Args:
        model: A converted model whose rule leaves B free.
        angle: θ in degrees, from 0 (B = W · |B|/|W|) over 90 to 180.
        example: An input, for direct rules: a batch of real data; one backward pass for each element of an output.
        seed: Of the random matrix, entries N(0, 1). None: the feedback that the model has now, so that only its angle
            changes, of whatever family it was drawn.

    Returns:
        The model.

    Raises:
        ValueError: The model is not converted, its rule does not leave B free, a direct rule has no example or one on
            which the model does not run, the angle is no number from 0 to 180, W or B is zero, or B is parallel to W.

    Source: one-time soft alignment, arXiv 2505.20892, known to us by its abstract.
    """
    if not (is_number(angle) and 0 <= angle <= 180):
        raise ValueError(f"angle is {describe(angle)}, expected degrees from 0 to 180")
    if seed is not None:
        seed = whole_number("seed", seed)
    inner = unwrapped(model)
    wiring = _free_wiring(inner)
    references = _weights(inner)
    if wiring.rule.wiring == "direct":
        if example is None:
            raise ValueError(
                f"rule {wiring.rule.name!r} delivers the output's error, so B is compared with the Jacobian from a "
                "layer's input to the output: pass example=x, a batch of the model's input"
            )
        jacobians = mean_jacobians(inner, wiring, example).jacobians
        references |= {key: jacobian.matrix for key, jacobian in jacobians.items()}
    parts = feedbacks(inner)
    turned = {
        key: _turned(_matrix(parts[key[0]], key[1], reference), reference.double(), angle, seed, key[0])
        for key, reference in references.items()
    }
    _put(inner, turned)
    return model


def _turned(feedback: Tensor, reference: Tensor, degrees: float | int, seed: int | None, name: str) -> Tensor:
    """Turn a feedback to an angle with a reference, in float64."""
    size, length = feedback.norm(), reference.norm()
    if not (size > 0 and length > 0):
        zero = "B is zero, and has no norm to keep" if length > 0 else "what B is to be near is zero"
        raise ValueError(f"layer {name!r}: {zero}, so the two have no angle")
    along, away = reference / length, feedback
    if seed is not None:
        random = generator(seed, name, "soft alignment")
        away = torch.randn(feedback.shape, generator=random, device="cpu", dtype=torch.float32).to(feedback)
    away = away / away.norm()
    for _ in range(2):  # once leaves a rounding error along W that matters where the two are nearly parallel
        away = away - (away * along).sum() * along
    rest = away.norm()
    if not 0 < degrees < 180:
        return size * along * (1 if degrees == 0 else -1)
    if not rest > 1e-6:
        raise ValueError(f"layer {name!r}: B is parallel to W, so it shows no other direction: give a seed=")
    return size * (cos(radians(degrees)) * along + sin(radians(degrees)) * away / rest)


@dataclass(frozen=True, kw_only=True)
class MatchRow:
    """One feedback that was matched.

    Attributes:
        layer: Name of the layer.
        output: Number of the output whose error it carries.
        rank: Of B.
        former_angle: Angle in degrees between the B that was replaced and the mean Jacobian J.
        truncated: ``|J - B| / |J|``, what was lost by a lower rank than J has.
        missed: ``√(Σ|g - e B|² / Σ|g|²)`` over the samples, g what backpropagation makes of an error e at the output:
            what no single matrix carries, and what the truncation lost. 0 where everything above is linear.
        weight_truncated: ``|W - W_r| / |W|``, W_r the best approximation of the layer's weight W of the rank r that
            factored feedback allows, the number of outputs; None where the layer has no weight of its own. B does not
            need it, and W stays whole: it is what methods that match W by products of feedback factors give up.
    """

    layer: str
    output: int
    rank: int
    former_angle: float
    truncated: float
    missed: float
    weight_truncated: float | None


@dataclass(frozen=True, kw_only=True)
class MatchReport(Shown):
    """Feedback that was matched to trained weights, a row a layer; prints as a table."""

    rows: tuple[MatchRow, ...]

    def _sheet(self) -> Sheet:
        several = any(row.output for row in self.rows)
        table = [["layer", *["output"] * several, "rank of B", "B before to J", "truncated", "missed", "W truncated"]]
        for row in self.rows:
            lost = "-" if row.weight_truncated is None else f"{row.weight_truncated:.1%}"
            numbers = f"{row.rank}", f"{row.former_angle:.1f}°", f"{row.truncated:.1%}", f"{row.missed:.1%}"
            table.append([row.layer, *[str(row.output)] * several, *numbers, lost])
        legend = (
            "truncated: |J - B|/|J|; missed: |g - e B|/|g|, g the true error of a sample; W truncated: |W - W_r|/|W|, "
            "r the number of outputs (W stays whole)"
        )
        return Sheet(table=table, notes=[legend])

    def _size(self) -> tuple[float, float]:
        return 7.0, height_of(len(self.rows))

    def _draw(self, axes: Any) -> None:
        names = [f"{row.layer}, output {row.output}" if row.output else row.layer for row in self.rows]
        columns = ("truncated", "truncated"), ("missed", "missed"), ("W truncated", "weight_truncated")
        series = [Points(label=label, values=[getattr(row, name) for row in self.rows]) for label, name in columns]
        dots(axes, names, series, xlabel="share that is lost", title="feedback matched to weights")


def match(model: nn.Module, *, example: Any, targets: Tensor | None = None, rank: int | None = None) -> MatchReport:
    """Match the feedback of a direct rule to weights that backpropagation has trained, to go on by the rule from there.

    ``B_l ← J_l``, the mean over the example of the Jacobian from the layer's input to the output: of all matrices the
    one whose ``e B_l`` is nearest to the true errors. Where everything above is linear J is the product of the weights,
    and the rule's gradients are the true ones; the output layer's B is W. B has at most as many independent rows as
    there are outputs, at no loss; with ``rank`` it is truncated to its largest singular values, at the loss that the
    report states. The weights stay as they are, and the model runs in the mode that it is in: for dropout and batch
    normalisation as in evaluation call ``model.eval()`` before, and ``model.train()`` after it.

    By the law the last hidden layer's neurons, of which B = W, begin with ``C = ½|w_in|² + ½b² - |W[:, k]|²``. Under
    backpropagation ``c = ½|w_in|² + ½b² - ½|W[:, k]|²`` stayed what it was, so that ``C = c - ½|W[:, k]|²``: a neuron
    whose output weights have grown to ``½|W[:, k]|² ≥ c`` is aligned for ever, all of a network that began small.

    B is then no function of the seed of ``convert`` any more: keep ``falign.feedback_state`` with a checkpoint. Of
    processes that train together all must be given the same example.

    Args:
        model: A model under a direct rule, trained before.
        example: A batch of its input, of the data that it was trained on; one backward pass for each element of a
            sample's output.
        targets: Those of the example: class indices, shape (batch,), or floating-point targets of the output's
            shape. With them the model must predict them better than the best constant does (cross-entropy,
            mean square).
        rank: The largest rank of a B. Default: the number of outputs.

    Returns:
        A row a feedback: what it carries, and what it loses.

    Raises:
        ValueError: The model is not converted, or not by a direct rule whose B is free; it does not run on the example;
            it is not trained: all weights of its layers are still as PyTorch draws them (of another distribution
            numbers alone do not tell), or it is no better than a constant on the targets; or rank is below 1.

    Source: after feedback-weight matching (ICLR 2026), known to us by a secondary note: there the weights are truncated
    to what products of feedback factors can hold, here the feedback is computed and the weights stay.
    """
    inner = unwrapped(model)
    wiring = _free_wiring(inner)
    rule = wiring.rule
    if rule.wiring != "direct":
        raise ValueError(
            f"match is for direct rules, the model's is {rule.name!r}, whose B has the shape of W: "
            "falign.init.soft(model, angle=0) puts it along the weights"
        )
    if rank is not None:
        whole_between("rank", rank, 1)
    _refuse_fresh(inner)
    measured = mean_jacobians(inner, wiring, example)
    if targets is not None:
        _refuse_constant(measured, targets)
    parts, rows = feedbacks(inner), []
    matched: dict[tuple[str, int], Tensor] = {
        key: weight if rank is None else _truncated(weight, rank) for key, weight in _weights(inner).items()
    }
    for (name, number), jacobian in measured.jacobians.items():
        matched[name, number] = jacobian.matrix if rank is None else _truncated(jacobian.matrix, rank)
        former = _matrix(parts[name], number, jacobian.matrix)
        rows.append(_row(inner, name, number, former, jacobian, matched[name, number]))
    _put(inner, matched)
    return MatchReport(rows=tuple(rows))


def _row(model: nn.Module, name: str, number: int, former: Tensor, jacobian: Jacobian, chosen: Tensor) -> MatchRow:
    size = float(jacobian.matrix.norm())
    truncated = float((jacobian.matrix - chosen).norm()) / size if size else 0.0
    # Σ|g|² = Σ|e J|² + Σ|g - e J|², and e has independent entries.
    missed = (jacobian.missed**2 + (1 - jacobian.missed**2) * truncated**2) ** 0.5
    layer = dict(model.named_modules()).get(name)
    lost = None
    if layer is not None and kind_of(layer) is not None and layer._parameters.get("weight") is not None:
        weight = weight_of(layer).double().flatten(1)
        lost = float((weight - _truncated(weight, len(chosen))).norm() / weight.norm().clamp_min(1e-300))
    return MatchRow(
        layer=name,
        output=number,
        rank=int(torch.linalg.matrix_rank(chosen.float())),
        former_angle=angle(former, jacobian.matrix),
        truncated=truncated,
        missed=missed,
        weight_truncated=lost,
    )


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    """Approximate a matrix best by one of a rank."""
    flat = matrix.flatten(1)
    if rank >= min(flat.shape):
        return matrix
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).view(matrix.shape)


# Whether B is free, and putting it where it belongs.


def _free_wiring(model: nn.Module) -> Wiring:
    """Give the wiring of a converted model whose rule leaves B free.

    Raises:
        ValueError: It is not converted, or a part of a converted model, or the rule leaves no choice of B.
    """
    converted(model)
    wiring = wiring_of(model)
    if wiring is None:
        raise ValueError("this is a part of a converted model: give the model that was given to falign.convert")
    rule = wiring.rule
    reason = (
        "has no feedback" if rule.wiring == "none"
        else "returns errors through the weights themselves" if rule.name == "bp"
        else "finds its feedback in training, from zero" if rule.wiring == "direct" and not rule.draws
        else "takes the signs of its feedback from the weights" if rule.magnitudes or not rule.draws
        else "draws its feedback anew in every pass" if rule.fresh
        else "hands back targets, which are no error to be aligned" if rule.targeted
        else ""
    )  # fmt: skip
    if reason or not feedbacks(model):
        raise ValueError(
            f"rule {rule.name!r} {reason or 'has no feedback here'}: its B cannot be chosen, use fa or dfa"
        )
    return wiring


def _weights(model: nn.Module) -> dict[tuple[str, int], Tensor]:
    """Map (name, number of the output) to the weight that a layerwise feedback stands for, of its shape."""
    weights: dict[tuple[str, int], Tensor] = {}
    for name, part in feedbacks(model).items():
        if part.parameter is not None:
            weights[name, part.first_end] = model.get_parameter(name).detach()
        elif part.wiring.rule.wiring == "layerwise":
            weights[name, part.first_end] = weight_of(model.get_submodule(name))
    return weights


def _matrix(part: Feedback, number: int, reference: Tensor) -> Float[Tensor, "..."]:
    """Give B as it carries errors, in float64."""
    if part.parameter is not None or part.wiring.rule.wiring == "layerwise":
        return part.feedback_matrix(reference).detach().double()
    return part.matrices()[number].detach().double() * part.gain


def _put(model: nn.Module, chosen: Mapping[tuple[str, int], Tensor]) -> None:
    """Make the feedback carry errors as these matrices do, exactly as far as its type holds them.

    Raises:
        ValueError: What the rule makes of a B is not what was chosen; then everything is as it was.
    """
    parts, before = feedbacks(model), feedback_state(model)
    state = dict(before)
    for (name, number), matrix in chosen.items():
        part = parts[name]
        learned = type(part.wiring.rule).learned_gradient is not Rule.learned_gradient
        kept = part.learned_gradient(matrix.to(part.matrix)) if learned else matrix  # R of orthogonal P: Pᵀ B
        state[name if number == part.first_end else f"{name}.{part.others[number][0]}"] = kept.to(part.matrix.dtype)
    load_feedback_state(model, state)
    for (name, number), matrix in chosen.items():
        part = parts[name]
        carried, least = _matrix(part, number, matrix), torch.finfo(part.matrix.dtype).eps
        if float((carried - matrix.double()).norm()) > 1e3 * least * float(matrix.double().norm()):
            load_feedback_state(model, before)
            raise ValueError(
                f"rule {part.wiring.rule.name!r} makes another matrix of the B that layer {name!r} is given: it cannot "
                "be chosen, use fa or dfa"
            )


# Whether a model is trained, as far as that can be told.


def _refuse_fresh(model: nn.Module) -> None:
    """Refuse a model all of whose layers have weights of PyTorch's initial distribution, U(-1/√fan_in, 1/√fan_in).

    The largest of many such numbers is so near the bound that any training carries it beyond, unless decay shrinks all;
    that shows in their mean square.

    Raises:
        ValueError: They have.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear or (isinstance(layer, nn.modules.conv._ConvNd) and kind_of(layer) is not None)
    ]
    if layers and all(_is_as_drawn(layer) for layer in layers):
        raise ValueError(
            "match is for a model that backpropagation has trained: all weights of this one are still as PyTorch draws "
            "them; train it or load its weights first, or begin with falign.init.soft"
        )


def _is_as_drawn(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    if weight is None or not weight.numel():
        return False
    bound = nn.init._calculate_fan_in_and_fan_out(weight)[0] ** -0.5
    within = float(weight.detach().abs().max()) <= bound * (1 + 2 * torch.finfo(weight.dtype).eps)
    power = float(weight.detach().double().square().mean()) * 3 / bound**2
    return within and abs(power - 1) < 6 * (0.8 / weight.numel()) ** 0.5  # the mean of 3u² has the variance 4/5 / n


def _refuse_constant(measured: Measured, targets: Any) -> None:
    """Refuse a model that predicts targets no better than the best constant.

    Raises:
        ValueError: It does so, or the targets do not fit to its output.
    """
    if len(measured.outputs) > 1:
        raise ValueError("targets= are for a model of one output, this one has several: leave them out")
    output = next(iter(measured.outputs.values())).double()
    targets = targets.detach().to(output.device) if isinstance(targets, Tensor) else targets
    if not isinstance(targets, Tensor) or not (
        targets.shape == output.shape or (output.dim() > 1 and targets.shape == output.shape[:-1])
    ):
        raise ValueError(
            f"targets are {describe(targets)}, expected class indices, or targets of the output's shape "
            f"{tuple(output.shape)}"
        )
    if targets.is_floating_point():
        what, wanted = "mean square", targets.double().view(output.shape)
        loss = float((output - wanted).square().mean())
        constant = float((wanted - wanted.mean(0)).square().mean())
    else:
        what = "cross-entropy"
        alone = output.dim() == 1 or output.shape[-1] == 1
        scores = torch.stack([torch.zeros_like(output), output], -1) if alone else output
        scores, classes = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1).long()
        if len(classes) != len(scores) or int(classes.min()) < 0 or int(classes.max()) >= scores.shape[1]:
            raise ValueError(f"targets are {describe(targets)}, expected class indices from 0 to {scores.shape[1] - 1}")
        shares = torch.bincount(classes).double() / len(classes)
        loss = float(nn.functional.cross_entropy(scores, classes))
        constant = float(torch.special.entr(shares).sum())
    if not loss < constant:
        raise ValueError(
            f"match is for a model that backpropagation has trained: on these targets its {what} is {loss:.3g}, and "
            f"the best constant has {constant:.3g}; train it or load its weights first"
        )
