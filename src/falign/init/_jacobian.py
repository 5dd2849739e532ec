"""Mean Jacobians of a converted model: the feedback that carries direct errors as backpropagation does, on average."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign._attached import Feedback
from falign._convert import backprop
from falign._cuts import map_arguments
from falign._delivery import matched
from falign._outputs import pick
from falign._preserve import force_eager
from falign._survey import call, detached
from falign._validation import describe
from falign._wiring import Wiring, feedbacks, preserve_state
from falign.feedback import generator


@dataclass(kw_only=True, eq=False)
class Jacobian:
    """The matrix of one output's feedback to one cut input x that is nearest to the true errors there.

    Attributes:
        matrix: J (features of the output, features of x), the B of the least ``Σ|g - e B|²`` over samples (and shared
            positions), g being what backpropagation makes of errors e of independent entries at the output: the mean
            of ``∂output/∂x``.
        missed: ``√(Σ|g - e J|² / Σ|g|²)``, what no single matrix carries: 0 where everything above x is linear.
    """

    matrix: Float[Tensor, "outputs features"]
    missed: float


@dataclass(kw_only=True, eq=False)
class _Sums:
    products: Tensor  # Σ eᵀ g
    squares: Tensor  # Σ e² of each feature of the output
    power: Tensor  # Σ |g|²


@dataclass(kw_only=True, eq=False)
class Measured:
    """Jacobians, by (layer, number of the output), and the tensors at which errors begin, by that number."""

    jacobians: dict[tuple[str, int], Jacobian] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


def mean_jacobians(model: nn.Module, wiring: Wiring, example: Any) -> Measured:
    """Measure the mean Jacobian of every cut of a direct rule, in the mode in which the model is; nothing is left.

    One true backward pass for each element of a sample's output, of an error that is there alone, with a random sign
    a sample.

    Args:
        model: the model that was converted, unwrapped.
        wiring: its wiring.
        example: a batch of its input.

    Raises:
        ValueError: the model does not run on the example.
    """
    parts = {name: part for name, part in feedbacks(model).items() if part.parameter is None and not part.silent}
    measured, sums = Measured(), dict[tuple[str, int], _Sums]()
    with force_eager(), preserve_state(model), backprop(model), torch.enable_grad(), _tapped(model, parts) as inputs:
        ends = _outputs(model, wiring, example)
        flat = [(name, each, x) for name, calls in inputs.items() for each, x in enumerate(calls)]
        for number, at in ends.items():
            measured.outputs[number] = at.detach()
            signs = torch.randint(2, (len(at),), generator=generator(0, "", "signs of errors"), device="cpu") * 2 - 1
            for element in range(at[0].numel()):
                error = torch.zeros_like(at, memory_format=torch.contiguous_format)
                error.view(len(at), -1)[:, element] = signs.to(at)
                carried = torch.autograd.grad(at, [x for *_, x in flat], error, retain_graph=True, allow_unused=True)
                for (name, each, x), true in zip(flat, carried, strict=True):
                    if (matrix := parts[name].matrices().get(number)) is not None:
                        total = sums.setdefault((name, number), _zeros(matrix))
                        _add(total, error, torch.zeros_like(x) if true is None else true, parts[name], number, each)
    for key, total in sums.items():
        matrix = total.products / total.squares.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)
        kept = (total.squares.unsqueeze(1) * matrix.square()).sum() / total.power
        missed = float((1 - kept).clamp_min(0).sqrt()) if total.power > 0 else 0.0
        measured.jacobians[key] = Jacobian(matrix=matrix, missed=missed)
    return measured


def _zeros(matrix: Tensor) -> _Sums:
    wide = {"dtype": torch.float64, "device": matrix.device}
    return _Sums(
        products=torch.zeros(matrix.shape, **wide),
        squares=torch.zeros(len(matrix), **wide),
        power=torch.zeros((), **wide),
    )


def _add(total: _Sums, error: Tensor, true: Tensor, part: Feedback, number: int, each: int) -> None:
    """Add what one pass has brought to the input of one call."""
    shape = (total.products.shape[0], total.products.shape[1])
    rows, carried = matched(error.double(), true.double(), shape, part.routes()[number], call=each)
    total.products += rows.mT @ carried
    total.squares += rows.square().sum(0)
    total.power += true.double().square().sum()


def _outputs(model: nn.Module, wiring: Wiring, example: Any) -> dict[int, Tensor]:
    """Run the model, and give the tensors at which errors begin."""
    kept: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for end in wiring.ends:
            if (name := end.layer) is not None:
                keep = model.get_submodule(name).register_forward_hook(
                    lambda module, args, y, name=name: kept.update({name: y})
                )
                hooks.callback(keep.remove)
        try:
            result = call(model, detached(example))
        except Exception as error:
            raise ValueError(
                f"the model does not run on the example ({describe(example)}): {type(error).__name__}: {error}"
            ) from error
    ends = {
        number: pick(result, end.output) if end.layer is None else kept[end.layer]
        for number, end in enumerate(wiring.ends)
    }
    for at in ends.values():
        if not at.requires_grad or at.dim() == 0:
            raise ValueError("the model's output depends on none of what is cut, so there is no Jacobian to measure")
    return ends


@contextmanager
def _tapped(model: nn.Module, parts: dict[str, Feedback]) -> Iterator[dict[str, list[Tensor]]]:
    """Note the inputs of all cuts, a tensor a call, through which their own share of the error alone passes."""
    inputs: dict[str, list[Tensor]] = {}
    owners: dict[str, dict[str, str]] = {}  # owner -> {path of the argument: name of the feedback}
    for name, part in parts.items():
        owners.setdefault(name.removesuffix(part.slot) if part.slot else name, {})[part.path] = name

    def through(name: str, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        inputs.setdefault(name, []).append(x.view_as(x))
        return inputs[name][-1]

    def before(paths: dict[str, str]) -> Any:
        def replaced(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if "" in paths:
                return (through(paths[""], args[0]), *args[1:]), kwargs
            return map_arguments(args, kwargs, lambda path, x: through(paths[path], x) if path in paths else x)

        return replaced

    with ExitStack() as hooks:
        for owner, paths in owners.items():
            module = model.get_submodule(owner)
            hooks.callback(module.register_forward_pre_hook(before(paths), prepend=True, with_kwargs=True).remove)
        yield inputs
