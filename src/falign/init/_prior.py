"""The output's bias from the frequencies of the classes."""

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign._preserve import force_eager
from falign._survey import call
from falign._validation import dense_tensor, describe, non_negative, real_tensor
from falign._wiring import preserve_state, unwrapped
from falign.measure._passes import linear_maps

_Model = TypeVar("_Model", bound=nn.Module)


def prior_bias(
    model: _Model,
    labels: Any = None,
    *,
    counts: Any = None,
    smoothing: float | int = 1,
    layer: str | None = None,
    example: Any = None,
) -> _Model:
    """Set the output layer's bias to the log-odds of the classes, so that the first error has no common part to learn.

    K outputs (a softmax, cross-entropy): ``b_k = log p_k``; one output, or several that are answers of their own
    (logistic): ``b = log p / (1 - p)``. p is smoothed after Laplace, ``p_k = (n_k + s) / (n + s K)``, so that no class
    that the sample lacks has an infinite bias. With output weights of zero (``small``) the output is then the prior,
    and the error's mean over the sample is zero where s is. Otherwise that mean moves all hidden neurons alike before
    anything else is learned, which direct feedback hands to every layer at once.

    The weights stay as they are, and with them every neuron's C: the output's bias is into no neuron that has one.

    Args:
        model: A model, converted or not, that ends in a linear layer or convolution with a bias.
        labels: Class indices of any shape; -100 is left out, as cross-entropy does. For one output 0 and 1. Answers
            of their own: floating-point or truth values (samples, outputs) of 0 and 1.
        counts: In place of labels how many there are of each class, a number an output; of one output (of no, of yes).
        smoothing: s, added to each count.
        layer: Name of the output layer. Default: of the linear layers and convolutions the one that runs last on the
            example, without one the last in the model's own order.
        example: An input of the model.

    Returns:
        The model.

    Raises:
        ValueError: There is no such layer, it has no bias, labels or counts do not fit to its outputs or are no
            numbers of samples, or a class that none has is not smoothed.

    Source: DFA-Stall, 2026 (with the centred error, ``falign.transforms.Centred``); common practice for rare classes
    under backpropagation.
    """
    if (labels is None) == (counts is None):
        raise ValueError("prior_bias takes either labels or counts=, expected exactly one of the two")
    non_negative("smoothing", smoothing)
    name, bias = _output_bias(unwrapped(model), layer, example)
    outputs = bias.numel()
    if counts is None:
        yes, no, classes = _counted(labels, outputs)
    else:
        yes, no, classes = _given(counts, outputs)
    if bool(((yes if classes else torch.minimum(yes, no)) + smoothing <= 0).any()):
        raise ValueError("a class has no sample at all, and log 0 is no bias: give a smoothing above 0")
    yes, no = yes + smoothing, no + smoothing
    values = (yes / yes.sum()).log() if classes else (yes / no).log()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the bias of layer {name!r} would not be finite: counts and smoothing differ by too much")
    with torch.no_grad():
        bias.copy_(values)
    return model


def _output_bias(model: nn.Module, layer: str | None, example: Any) -> tuple[str, Tensor]:
    """Find the output layer, and give its name and bias."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is {describe(model)}, expected a torch.nn.Module")
    maps = linear_maps(model)
    if not maps:
        raise ValueError("the model has no linear layer or convolution whose bias could be set")
    if layer is None:
        layer = list(maps)[-1] if example is None else _last(model, example)
    elif not isinstance(layer, str) or layer not in maps:
        listed = ", ".join(map(repr, list(maps)[-5:]))
        raise ValueError(f"layer is {describe(layer)}, expected the name of a linear layer or convolution ({listed})")
    bias = maps[layer]._parameters.get("bias")
    if bias is None:
        raise ValueError(f"layer {layer!r} has no bias to set: make it with bias=True, or name another in layer=")
    return layer, bias


def _last(model: nn.Module, example: Any) -> str:
    ran: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
        for name, layer in linear_maps(model).items()
    ]
    try:
        with force_eager(), torch.no_grad(), preserve_state(model):
            call(model, example)
    except Exception as error:
        raise ValueError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise ValueError("no linear layer or convolution runs on the example: name the output layer in layer=")
    return ran[-1]


_Counts = tuple[Float[Tensor, " outputs"], Float[Tensor, " outputs"], bool]
"""Samples with a yes, and with a no, of each output, and whether the outputs are classes of which each has one."""


def _counted(labels: Any, outputs: int) -> _Counts:
    labels = dense_tensor("labels", labels)[0].detach().cpu()
    answers = labels.is_floating_point() or labels.dtype is torch.bool
    if labels.is_complex() or labels.numel() == 0:
        raise ValueError(f"labels are {describe(labels)}, expected class indices")
    if answers or outputs == 1:
        table = labels.reshape(-1, outputs) if labels.shape[-1:] == (outputs,) or outputs == 1 else None
        kept = None if table is None else table[table != -100].reshape(-1, outputs) if outputs == 1 else table
        if kept is None or not len(kept) or not bool(((kept == 0) | (kept == 1)).all()):
            raise ValueError(
                f"labels are {describe(labels)}, expected 0 and 1 for "
                + (
                    "the one output"
                    if outputs == 1
                    else f"{outputs} outputs each (samples, {outputs}), or class indices"
                )
            )
        yes = kept.double().sum(0)
        return yes, len(kept) - yes, False
    kept = labels[labels != -100].reshape(-1)
    if not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= outputs:
        came = f"from {int(kept.min())} to {int(kept.max())}" if len(kept) else "all -100"
        raise ValueError(f"labels are {came}, expected class indices from 0 to {outputs - 1}, one an output")
    yes = torch.bincount(kept.long(), minlength=outputs).double()
    return yes, yes.sum() - yes, True


def _given(counts: Any, outputs: int) -> _Counts:
    expected = max(outputs, 2)
    values = real_tensor("counts", counts).double()
    if values.shape != (expected,) or not bool((torch.isfinite(values) & (values >= 0)).all()):
        what = "the samples of each class" if outputs > 1 else "the samples of no and of yes"
        raise ValueError(f"counts are {describe(counts)}, expected {expected} numbers of at least 0: {what}")
    if float(values.sum()) <= 0:
        raise ValueError("counts are all 0, expected samples of some class")
    return (values, values.sum() - values, True) if outputs > 1 else (values[1:], values[:1], False)
