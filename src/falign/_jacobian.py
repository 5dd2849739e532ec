"""The mean Jacobian from every cut of a direct rule to the output, by forward-mode passes with random tangents."""

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from falign._attached import Feedback
from falign._convert import backprop
from falign._delivery import matched, project
from falign._expand import Expanded
from falign._outputs import pick
from falign._survey import call
from falign._validation import whole_number
from falign._wiring import Wiring, converted, preserve_state, wiring_of
from falign.rules import Rule


def mean_jacobian(
    model: nn.Module, x: Any, *, passes: int = 1, generator: torch.Generator | None = None
) -> dict[str, dict[int, Tensor]]:
    """Estimate the Jacobian of the outputs by the cut inputs, meant over a batch, without a backward pass.

    Every cut input z_l gets a tangent p_l ~ N(0, 1) of its own; a forward-mode pass gives the output's tangent
    ``u = Σ_l J_l p_l``, and ``mean(u p_lᵀ)`` is ``E[J_l]`` on average, since tangents of several cuts are independent.
    What is said of B holds of positions and calls: it is the matrix that B would be.

    Args:
        model: converted to a direct rule, the model that was given to ``convert``.
        x: a batch, as ``convert`` takes an example.
        passes: over which the mean is taken, each with other tangents.
        generator: of the tangents, on the inputs' device; PyTorch's own by default.

    Returns:
        {name of the cut: {number of the output: (outputs, features)}}.

    Raises:
        ValueError: the model is not converted to a direct rule.
        RuntimeError: an operation has no forward-mode derivative; it is named.

    Source: Bacho and Chu 2024 (low-variance forward gradients), eq. 8.
    """
    wiring = _direct_wiring(model)
    draw = _Normal(generator)
    sums: dict[str, dict[int, Tensor]] = {}
    for _ in range(passes):
        tangents: list[tuple[Feedback, int, Tensor]] = []

        def perturb(part: Feedback, z: Tensor, tangents: list = tangents) -> Tensor:
            value, before = forward_ad.unpack_dual(z)
            tangent = draw(value)
            tangents.append((part, _call_number(wiring, part), tangent))
            return forward_ad.make_dual(value, tangent if before is None else before + tangent)

        with _forward_mode(model, wiring, x, perturb) as outputs:
            for number, output in outputs.items():
                change = forward_ad.unpack_dual(output).tangent
                if change is None:  # no tangent has reached this output
                    continue
                for part, at, tangent in tangents:
                    _add_product(sums, part, number, change, tangent, at, passes)
    return sums


def input_products(
    model: nn.Module, x: Any, *, passes: int = 1, generator: torch.Generator | None = None
) -> dict[str, dict[int, Tensor]]:
    """Estimate what the first layer's feedback F becomes on its way forward, meant over a batch: ``F E[∂x_l/∂x_1]ᵀ``.

    The input x_1 of the layer that runs first gets the tangent ``p F``, p ~ N(0, 1) of the output's shape; a
    forward-mode pass gives the tangent t_l at every other cut, and ``mean(pᵀ t_l)`` is that product on average.

    Args:
        model: converted to a direct rule.
        x: a batch.
        passes: over which the mean is taken.
        generator: of p.

    Returns:
        {name of a cut that the tangent reaches: {number of the output: (outputs, features)}}.

    Raises:
        ValueError: the model is not converted to a direct rule.
        RuntimeError: an operation has no forward-mode derivative; it is named.
    """
    wiring = _direct_wiring(model)
    draw = _Normal(generator)
    with _forward_mode(model, wiring, x, lambda part, z: z) as outputs:
        shapes = {number: forward_ad.unpack_dual(output).primal for number, output in outputs.items()}
    sums: dict[str, dict[int, Tensor]] = {}
    for _ in range(passes):
        errors = {number: draw(output) for number, output in shapes.items()}
        first: list[Feedback] = []

        def perturb(part: Feedback, z: Tensor, errors: dict = errors, first: list = first) -> Tensor:
            value, before = forward_ad.unpack_dual(z)
            at = _call_number(wiring, part)
            if not first:
                first.append(part)
                matrices, routes = part.matrices(), part.routes()
                sent = [
                    project(errors[number], matrix, tuple(value.shape), routes[number], call=at)
                    for number, matrix in matrices.items()
                ]
                return forward_ad.make_dual(value, torch.stack(sent).sum(0).to(value.dtype))
            if before is not None and part is not first[0]:
                for number in part.routes():
                    _add_product(sums, part, number, errors[number], before, at, passes)
            return z

        with _forward_mode(model, wiring, x, perturb):
            pass
    return sums


def _direct_wiring(model: nn.Module) -> Wiring:
    wiring = wiring_of(model)
    if wiring is None:
        converted(model)
        raise ValueError("this is a part or a wrapper of a converted model: give the one given to falign.convert")
    if wiring.rule.wiring != "direct":
        raise ValueError(f"rule {wiring.rule.name!r} delivers no output's error: the Jacobian is that of direct rules")
    return wiring


def _call_number(wiring: Wiring, part: Feedback) -> int:
    """Count the calls of a layer before this one, in the running forward."""
    runs = wiring.state.runs
    return max(runs[-1].calls.get(part.name, 1) - 1, 0) if runs else 0


def _add_product(
    sums: dict[str, dict[int, Tensor]], part: Feedback, number: int, output: Tensor, x: Tensor, call: int, passes: int
) -> None:
    """Add the mean product of a tangent at an output with one at a cut."""
    if number in part.routes():
        u, p = matched(output, x, (part.sizes[number][0], part.sizes[number][1]), part.routes()[number], call=call)
        own = sums.setdefault(part.name, {})
        own[number] = own.get(number, 0) + u.mT @ p / (len(u) * passes)


@contextmanager
def _forward_mode(
    model: nn.Module, wiring: Wiring, x: Any, perturb: Callable[[Feedback, Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Run a model in forward mode, within whose level its outputs can be looked at, by their numbers.

    Args:
        model: converted to a direct rule.
        wiring: its wiring.
        x: a batch.
        perturb: makes of a cut input one with a tangent.
    """
    ends: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(end.layer).register_forward_hook(
            lambda module, args, y, name=end.layer: ends.update({name: y}), prepend=True
        )
        for end in wiring.ends
        if end.layer is not None
    ]
    # Attention and recurrent modules run their products one by one only where a graph is recorded.
    expanded = any(isinstance(module, Expanded) for module in model.modules())
    recording = torch.enable_grad() if expanded else torch.no_grad()
    try:
        with warnings.catch_warnings(), preserve_state(model), backprop(model), recording, forward_ad.dual_level():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what PyTorch itself loads for forward mode
            wiring.state.tangents = perturb
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no forward mode
                result = call(model, x)
            yield {
                number: pick(result, end.output) if end.layer is None else ends[end.layer]
                for number, end in enumerate(wiring.ends)
            }
    except (NotImplementedError, RuntimeError) as error:
        if "forward" in str(error).lower():
            raise RuntimeError(
                f"the Jacobian needs forward-mode derivatives of all operations{_place(error)}: {error}"
            ) from error
        raise
    finally:
        wiring.state.tangents = None
        for handle in handles:
            handle.remove()


def _place(error: Exception) -> str:
    """Name what raised by the user's line, which PyTorch does not do for a ``torch.autograd.Function``."""
    frames = [
        frame
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__", "")).startswith(("torch", "falign"))
    ]
    if not frames:
        return ""
    last = traceback.extract_stack(frames[-1], limit=1)[0]
    return f" ({last.line})" if last.line else f" (line {last.lineno} of {last.name})"


def feedback_cosines(
    model: nn.Module, x: Any, *, passes: int = 20, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Measure cos∠(B, E[J]) of every cut of a direct rule, by forward-mode passes: without a backward pass.

    The estimate of E[J] is noisy, and noise lowers a cosine. ``cos = ⟨B, Ĵ⟩ / (|B| √⟨Ĵ₁, Ĵ₂⟩)`` corrects for it, with
    Ĵ₁ and Ĵ₂ of two halves of the passes, whose noise is independent; 0 where their product is not positive.

    Args:
        model: converted to a direct rule.
        x: a batch, as ``convert`` takes an example.
        passes: at least 2; more passes, less noise.
        generator: of the tangents.

    Returns:
        {name of the cut: cosine}, of several outputs over all entries of their B; it may pass ±1 by what noise is left.

    Raises:
        ValueError: the model is not converted to a direct rule, or passes are too few.
        RuntimeError: an operation has no forward-mode derivative.
    """
    if whole_number("passes", passes) < 2:
        raise ValueError(f"passes is {passes}, expected 2 or more: noise is told from the Jacobian by two estimates")
    draw = _Normal(generator)
    halves = [
        mean_jacobian(model, x, passes=count, generator=draw.of(next(model.parameters()).device))
        for count in (passes // 2, passes - passes // 2)
    ]
    parts = {part.name: part for part in model.modules() if isinstance(part, Feedback)}
    cosines = {}
    for name, first in halves[0].items():
        second, matrices = halves[1][name], parts[name].matrices()
        along = sum(float((matrices[end].detach() * (first[end] + second[end])).sum()) / 2 for end in first)
        size = sum(float(matrices[end].detach().square().sum()) for end in first) ** 0.5
        length = sum(float((first[end] * second[end]).sum()) for end in first)
        cosines[name] = along / (size * length**0.5) if length > 0 and size > 0 else 0.0
    return cosines


class _Normal:
    """Tangents N(0, 1): of a generator, or of one a device that PyTorch's own has seeded.

    A measurement puts PyTorch's generators back where they were, and would draw the same tangents in every pass.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.seed = int(torch.randint(2**62, (), device="cpu")) if generator is None else 0
        self.made: dict[torch.device, torch.Generator] = {}

    def of(self, device: torch.device) -> torch.Generator:
        """Give the generator of a device."""
        if self.generator is not None:
            return self.generator
        if device not in self.made:
            self.made[device] = torch.Generator(device).manual_seed(self.seed)
        return self.made[device]

    def __call__(self, value: Tensor) -> Tensor:
        """Draw a tangent of a value's shape, dtype and device."""
        return torch.randn(value.shape, generator=self.of(value.device), dtype=value.dtype, device=value.device)


def follow(model: nn.Module, x: Any, *, passes: int = 1, generator: torch.Generator | None = None) -> nn.Module:
    """Let the feedback of a direct rule follow its network by forward-mode passes: ``fdfa``, ``grape``, ``afa``.

    Args:
        model: converted to a rule that follows.
        x: a batch of the training.
        passes: forward-mode passes of which the mean is followed.
        generator: of the tangents. Processes that train together pass generators of one seed and the same batch, or
            their feedback differs.

    Returns:
        The model.

    Raises:
        ValueError: the model is not converted, or its rule does not follow.
        RuntimeError: an operation has no forward-mode derivative.
    """
    rules = {wiring.rule.name: wiring.rule for wiring in converted(model)}
    if not all(type(rule).follow is not Rule.follow for rule in rules.values()):
        raise ValueError(
            f"follow is for rules fdfa, grape and afa, the model is converted to {', '.join(map(repr, rules))}"
        )
    of_input = any(rule.follows_input for rule in rules.values())
    jacobians = (input_products if of_input else mean_jacobian)(model, x, passes=passes, generator=generator)
    with torch.no_grad():
        for part in (part for part in model.modules() if isinstance(part, Feedback) and part.name in jacobians):
            for number, jacobian in jacobians[part.name].items():
                matrix = part.matrices()[number]
                matrix.copy_(part.wiring.rule.follow(matrix, jacobian.to(matrix.dtype)))
    return model
