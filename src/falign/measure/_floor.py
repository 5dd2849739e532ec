"""Tell angles between gradients from angles between the rounding errors of gradients.

A gradient is readable if it comes out the same when every operation rounds otherwise. A batch is therefore read a
second time, with noise of one unit roundoff on what every module puts out, with the loss taken in float64, and times a
number that is no power of two, so that every product on the way back rounds otherwise as well. From the two readings
(f, g) and (f', g') of the gradient taken and the true one follows the cosine without its rounding errors, which are
independent in the two: ::

    cos∠ = ½ (⟨f, g'⟩ + ⟨f', g⟩) / √(⟨f, f'⟩ ⟨g, g'⟩)

An angle cannot be read where this one is more than ``LIMIT`` degrees from the one measured, where f or g agrees with
its own second reading by a cosine below one half (there is more noise in it than signal), or where it is zero in one
reading and not in the other.

The second reading costs as much as the first, so it is made only where rounding may matter. A gradient is a sum of
products of errors e and inputs x, each rounded by u: where |g| > 100 u |e|max |x|, with the largest error behind the
layer, and the largest activation before it in place of x, it is made of what these numbers hold, and one of a healthy
network in float32 is so by some orders of magnitude. ::

    suspicious: u · max(|e|max · |x|, |e| · |x|max) > |g| / 100, or the same with f

Source: stochastic arithmetic, Vignes 1993 (the CESTAC method), with one random sample and the noise at modules.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import acos, degrees, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from falign._cuts import find_blocks
from falign._wiring import wirings
from falign.feedback import generator
from falign.layers import Layer, kind_of, weight_of
from falign.measure._angles import Products
from falign.measure._passes import Loss, Passes, Place, in_double, linear_maps, walk_back

LIMIT = 3.0
"""Degrees by which rounding may turn an angle that is shown."""
_MARGIN = 1e-2
"""Share of a gradient that its rounding errors can have at most where it is not read a second time."""
_AGREED = 0.5
"""Cosine of the two readings of a gradient of which one half is noise."""
_RANGE = 1e18
"""Activations whose squares, which normalisations sum, come near the end of float32."""
_FACTORS = (1.37 * 2**10, 1.37)
"""Loss of the second reading over that of the first; the first one also lifts what underflowed, unless it overflows."""
_SAMPLES = 64
"""So many samples of an error are enough to tell whether it can be read."""
_TF32 = 2.0**-10


def unit_roundoff(passes: Passes) -> float:
    """Give u, half the distance of 1 from the next number, of the shortest type in the passes."""
    eps = max((sizes.eps for sizes in passes.sizes.values()), default=0.0)
    if any(g.is_cuda and g.dtype == torch.float32 for g in passes.true.values()) and _tf32():
        eps = max(eps, _TF32)
    return (eps or torch.finfo(torch.float32).eps) / 2


def roundoff_here(parameters: Iterable[Tensor]) -> float:
    """Give u of passes through these parameters at this place: of their type, or of autocast's or TF32 in its stead."""
    eps = 0.0
    for parameter in parameters:
        kind, own = parameter.device.type, torch.finfo(parameter.dtype).eps
        if parameter.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            own = max(own, torch.finfo(torch.get_autocast_dtype(kind)).eps)
        eps = max(eps, own, _TF32 if parameter.is_cuda and parameter.dtype == torch.float32 and _tf32() else 0.0)
    return (eps or torch.finfo(torch.float32).eps) / 2


def _tf32() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # PyTorch refuses this question where ``fp32_precision`` was set
        return True


def overflows(passes: Passes) -> bool:
    """Tell whether an activation is so large that the sum of its squares overflows, as in a normalisation."""
    return any(
        not sizes.wide and sizes.elements and not max(sizes.x, sizes.z) / sizes.elements < _RANGE**2
        for sizes in (*passes.sizes.values(), *passes.blocks.values())
    )


def suspicious(passes: Passes, slopes: Mapping[str, Products]) -> bool:
    """Tell whether rounding may show in a gradient, by a bound that needs no second reading.

    Args:
        passes: The batch, walked back.
        slopes: {row: products of the gradient taken and the true one}.
    """
    u, layers = unit_roundoff(passes), [name for name in passes.order if name in passes.sizes]
    if u > torch.finfo(torch.float32).eps and any(min(slope.one, slope.other) == 0 for slope in slopes.values()):
        return True  # it may have underflowed
    everything = (*passes.sizes.values(), *passes.blocks.values())
    entry = max((sqrt(max(s.x, s.z) / s.elements) for s in everything if s.elements), default=0.0)
    largest = [0.0, 0.0]
    for name in reversed(layers):
        sizes, slope = passes.sizes[name], slopes.get(name, Products())
        errors, norms = (sqrt(sizes.taken), sqrt(sizes.true)), (sqrt(slope.one), sqrt(slope.other))
        largest = [max(pair) for pair in zip(largest, errors, strict=True)]
        x, most = sqrt(sizes.x), entry * sqrt(sizes.elements)
        for top, error, norm in zip(largest, errors, norms, strict=True):
            if u * max(top * x, error * most) > _MARGIN * norm:
                return True
    # Of a matrix that is multiplied by hand neither its input nor its error is known: take the largest ones.
    size = entry * sqrt(max((sizes.elements for sizes in everything), default=0))
    others = (slope for name, slope in slopes.items() if name not in passes.sizes)
    return any(
        u * top * size > _MARGIN * sqrt(norm)
        for slope in others
        for top, norm in zip(largest, (slope.one, slope.other), strict=True)
    )


@dataclass(eq=False)
class Reading:
    """Both gradients of a batch, and the errors of its first samples.

    Attributes:
        taken: {parameter: gradient by the rule}.
        true: {parameter: gradient by backpropagation}.
        errors: {place: error by the rule}.
        true_errors: {place: true error}.
    """

    taken: dict[str, Tensor] = field(default_factory=dict)
    true: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[Place, Tensor] = field(default_factory=dict)
    true_errors: dict[Place, Tensor] = field(default_factory=dict)

    def finite(self) -> bool:
        """Tell whether all gradients are numbers."""
        return all(bool(torch.isfinite(g).all()) for g in (*self.taken.values(), *self.true.values()))


def read_twice(model: nn.Module, loss_fn: Loss, x: Any, y: Any, u: float) -> tuple[Reading, Reading]:
    """Read a batch as it is, and a second time with other rounding errors.

    Args:
        model: A converted model.
        loss_fn: (model output, y) -> scalar.
        x: The batch.
        y: Its targets.
        u: Unit roundoff of the passes.

    Returns:
        Both readings; all of the second is larger by one factor.
    """

    def read(factor: float | None) -> Reading:
        reading = Reading()

        def keep(errors: dict[Place, Tensor]) -> Callable[[Place, Tensor], None]:
            return lambda place, error: errors.__setitem__(place, error.detach()[:_SAMPLES].clone())

        wide = in_double(loss_fn)
        judged = loss_fn if factor is None else lambda output, y: wide(output, y) * factor
        *_, reading.taken, reading.true = walk_back(
            model, judged, x, y, keep(reading.errors), keep(reading.true_errors)
        )
        return reading

    first, second = read(None), None
    with rounded_otherwise(model, u):
        for factor in _FACTORS:
            try:
                second = read(factor)
            except ValueError:  # the loss overflowed
                continue
            if second.finite():
                break
    return first, second or Reading()


@contextmanager
def rounded_otherwise(model: nn.Module, u: float) -> Iterator[None]:
    """Add noise of a relative size u to what the modules of a model put out.

    A sum of n products is off by about u √n times one of them, whatever the sum is: at linear maps and convolutions the
    noise of all elements is u · rms(x) · rms(W) · √fan-in. Elsewhere an element's noise is u times the element. Half of
    it is of each sample alone, which does not cancel where errors of samples do, and half is common to all samples:
    those that are alike are rounded alike.
    """
    maps, blocks = linear_maps(model), find_blocks(model)
    if not all(end.seen for wiring in wirings(model) for end in wiring.ends):
        blocks = {}  # the model has to return the very tensor that its last layer made
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            inside = any(key != "feedback" for key, _ in module.named_children())
            if module is model or "feedback" in name.split(".") or (inside and name not in blocks):
                continue
            hook = _noise(name, maps.get(name), u)
            # In front of the deliveries: what they hand on has to be the tensor that the model goes on with.
            hooks.callback(module.register_forward_hook(hook, prepend=True).remove)
        yield


def _noise(name: str, layer: Layer | None, u: float) -> Callable[[nn.Module, tuple, Any], Any]:
    def after(module: nn.Module, args: tuple, y: Any) -> Any:
        if type(y) is tuple and y:
            first = after(module, args, y[0])
            return None if first is None else (first, *y[1:])
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.is_nested:
            return None
        # The same in every call: activation checkpointing has to find again what it recomputes.
        own = generator(0, name, "rounding errors")
        noise = torch.randn(y.shape, generator=own, dtype=torch.float32)
        if y.dim() > 1:  # samples that are alike are rounded alike: their errors add up
            noise += torch.randn((1, *y.shape[1:]), generator=own, dtype=torch.float32)
        noise = noise.to(y.device, y.dtype)
        if layer is not None and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            kind = kind_of(layer)
            assert kind is not None
            size = _rms(args[0].detach()) * _rms(weight_of(layer)) * kind.fan_in(layer) ** 0.5
            if isfinite(size):
                return y + noise * (u * size)
        return y + y.detach() * noise * u

    return after


def _rms(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) / max(1, tensor.numel()) ** 0.5


def unreadable(own: Products, true: Products, crossed: Products, back: Products, measured: Products) -> bool:
    """Tell from two readings whether the angle between f and g rests on rounding.

    Args:
        own: Products of f and f'.
        true: Products of g and g'.
        crossed: Products of f and g'.
        back: Products of f' and g.
        measured: Products of f and g.
    """
    if own.cosine is None or true.cosine is None:
        return any((a > 0) != (b > 0) for a, b in ((own.one, own.other), (true.one, true.other)))
    if min(own.cosine, true.cosine) < _AGREED or measured.cosine is None:
        return True
    scale = sqrt(own.inner) * sqrt(true.inner)
    cosine = max(-1.0, min(1.0, (crossed.inner + back.inner) / 2 / scale))
    return abs(degrees(acos(cosine)) - degrees(acos(measured.cosine))) > LIMIT


def unreadable_errors(first: Reading, second: Reading) -> dict[str, set[str]]:
    """Give {layer: sides at which the mean angle of its errors rests on rounding}."""
    calls: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for place in first.errors.keys() & first.true_errors.keys():
        side, layer, _ = place
        vectors = [
            which[place].reshape(len(which[place]), -1).double() if place in which else None
            for which in (first.errors, second.errors, first.true_errors, second.true_errors)
        ]
        if any(v is None or v.shape != vectors[0].shape for v in vectors):  # pyright: ignore[reportOptionalMemberAccess]
            continue
        f, f_again, g, g_again = (v for v in vectors if v is not None)
        calls.setdefault((layer, side), []).append(_turned(f, f_again, g, g_again))
    turned: dict[str, set[str]] = {}
    for (layer, side), parts in calls.items():
        angles, lost = (torch.cat(column) for column in zip(*parts, strict=True))
        angles = angles[~angles.isnan()]
        if bool(angles.mean().abs() > LIMIT) if len(angles) else bool(lost.any()):
            turned.setdefault(layer, set()).add(side)
    return turned


def _turned(f: Tensor, f_again: Tensor, g: Tensor, g_again: Tensor) -> tuple[Tensor, Tensor]:
    """Give, for each sample, by how many degrees rounding turns the angle, and whether an error underflowed.

    Where there is no angle that is nan, and 90 where an error is noise.
    """
    own, true, measured = _cosines(f, f_again), _cosines(g, g_again), _cosines(f, g)
    crossed = (_cosines(f, g_again) + _cosines(f_again, g)) / 2 / (own * true).clamp(min=1e-30).sqrt()
    angle = torch.rad2deg(crossed.clamp(-1, 1).acos() - measured.clamp(-1, 1).acos())
    angle = torch.where(~measured.isnan() & ~((own >= _AGREED) & (true >= _AGREED)), 90.0, angle)
    lost = ((f == 0).all(1) & (f_again != 0).any(1)) | ((g == 0).all(1) & (g_again != 0).any(1))
    return angle, lost


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    sizes = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return torch.where(sizes > 0, (a * b).sum(1) / sizes, torch.nan)


def join(sides: Iterable[str]) -> str | None:
    """Join the names of what cannot be read, in a fixed order; None where everything can."""
    lost = set(sides)
    return ", ".join(side for side in ("delivered", "received", "gradient", "loss") if side in lost) or None
