"""Which neurons of a model are under the law of alignment, and which of them stay aligned."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from falign.measure.law.balance import Balance
from falign.measure.law.follow import Followed, follow
from falign.measure.law.forms import Form
from falign.measure.law.laws import find
from falign.measure.law.targets import Target
from falign.measure.untouched import unwrapped
from falign.rules import BatchwiseRandomSignFeedback
from falign.theory.inputs import told
from falign.wiring import converted


def aligned_forever(model: nn.Module, *, example: Any) -> dict[str, Bool[Tensor, " neurons"]]:
    """{layer: of each neuron whether the weights as they are now guarantee ``⟨B, w_out⟩ ≥ 0`` at all times}.

    In gradient flow, weights and biases all of one rate: where C ≤ 0, or where the feedback has the weights' signs.
    Steps of size η raise C by ½η²|∇|² each. Where feedback moves by itself (adafa) the weights cannot tell: False.

    Args:
        model: A converted model.
        example: An input of it.

    Returns:
        The layers under the law whose neurons feed another linear layer or convolution, in running order.

    Raises:
        ValueError: The model is not converted or does not run, or no neuron is under the law.

    Source: derived from the law.
    """
    return {name: _forever(balance) for name, balance in lawful(model, example)[0].items()}


def _forever(balance: Balance) -> Bool[Tensor, " neurons"]:
    if all(signed(target) for target in balance.targets):
        return torch.ones_like(balance.incoming(), dtype=torch.bool)
    if any(target.form is Form.MOVING for target in balance.targets):
        return torch.zeros_like(balance.incoming(), dtype=torch.bool)
    return balance.incoming() <= balance.outgoing()


def lawful(model: nn.Module, example: Any) -> tuple[dict[str, Balance], Followed]:
    """{layer: the law of its neurons} where one holds and speaks of alignment, and what the example showed."""
    converted(model)
    inner = unwrapped(model)
    followed = follow(inner, example)
    entries = find(inner, followed, torch.optim.SGD(inner.parameters(), lr=1.0))
    balances = {
        name: entry.balance
        for name, entry in entries.items()
        if entry.balance is not None and entry.law.holds_exactly and _speaks(entry.balance)
    }
    if not balances:
        reasons = [f"layer {told(name)}: {entry.law.reason}" for name, entry in entries.items() if entry.law.reason]
        listed = "; ".join(reasons) or "no layer feeds another"
        raise ValueError(
            f"no neuron of the model is under the conservation law ({listed}): nothing can be aligned by it"
        )
    return balances, followed


def _speaks(balance: Balance) -> bool:
    """Whether the law is about the alignment ⟨B, W⟩: not before a batch normalisation, after which |w| stays by itself.

    Nor where B is a function of W of which no integral is known.
    """
    forms = {target.form for target in balance.targets}
    return bool(forms) and not forms & {Form.NORMALISED, Form.PATH}


def signed(target: Target) -> bool:
    """Whether the error of a target returns with the signs of its weights."""
    brsf = target.part is not None and isinstance(target.part.wiring.rule, BatchwiseRandomSignFeedback)
    return brsf or target.form in (Form.SIGNS, Form.WEIGHTS)
