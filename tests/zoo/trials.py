"""A network × a rule: converted, run, compared with the definition, and reverted.

``python tests/zoo/trials.py table.csv [rules and words of names …]`` writes the table of all of them.
"""

import copy
import csv
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).parents[1]))

import library_networks
import made_networks
import torch
from definitions import Products, by_direct, is_parameter, is_whole, layerwise, matrices, weight_of
from entries import RULES, Entry, convert, gradients_of, relative, wanting
from torch import Tensor, nn

import falign

ENTRIES = (*made_networks.ENTRIES, *library_networks.ENTRIES)
TOLERANCE = 1e-9


def step(entry: Entry, net: nn.Module, x) -> tuple[dict[str, Tensor | None], Tensor, dict[str, str]]:
    """(gradients, loss, parameters that took part in a product of the backward) of a converted network."""
    watch = Products((n, p) for n, p in net.named_parameters() if "feedback" not in n.split("."))
    with watch:
        loss = entry.run(net, x)
        watch.backward = True
        loss.backward()
    return gradients_of(net, x), loss.detach(), watch.found


def defined(entry: Entry, rule: str, feedback: dict[str, Tensor], x) -> tuple[dict[str, Tensor | None], Tensor]:
    """(gradients, loss) by definition; of learned feedback too, under the names of the weights it stands for."""
    net, _ = entry.build()
    if falign.ALL_RULES[rule].wiring == "direct":
        gradients, loss = by_direct(net, entry, feedback, x)
        return gradients_of(net, x), loss
    carriers = matrices(rule, net, feedback)
    learned = {}
    if rule == "kp":  # weights that are computed are no parameters, so what they receive is asked for
        for name, matrix in carriers.items():
            if not isinstance(weight_of(net, name), nn.Parameter):
                learned[name] = matrix.clone().requires_grad_()
    _, loss, mode = layerwise(net, lambda net: entry.run(net, x), carriers, learned)
    carried = {n: how for n, how in mode.carried.items() if "parametrizations" not in n}  # the weight's own gradient
    assert carried == {}, f"without feedback: {carried}"
    gradients = gradients_of(net, x)
    if rule == "kp":
        for name in carriers:
            weight = weight_of(net, name)
            received = learned[name].grad if name in learned else weight.grad if weight.requires_grad else None
            gradients[f"feedback of {name}"] = received
    return gradients, loss


def feedback_gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {f"feedback of {name}": part.B.grad for name, part in falign._wiring.feedbacks(net).items()}


def compared(entry: Entry, rule: str) -> float:
    """The largest distance of a gradient from its definition; everything else is asserted."""
    net, x = entry.build()
    names = list(net.state_dict())
    convert(entry, net, x, rule)
    if rule in ("fa", "usf", "dfa"):
        assert list(net.state_dict()) == names, "other names in the state"
    feedback = falign.feedback_state(net)
    assert not set(entry.activities) & set(feedback), "feedback of an activity"
    gains = [name for name in feedback if is_parameter(net, name) and net.get_parameter(name).dim() < 2]
    assert gains == list(entry.vectors), "feedback of a gain"
    before = copy.deepcopy(x)
    inputs = wanting(x, entry)
    came, loss, transported = step(entry, net, inputs)
    if rule == "kp":
        came |= feedback_gradients(net)
    inputs = wanting(x, entry)
    expected, value = defined(entry, rule, feedback, inputs)
    assert torch.allclose(loss, value, rtol=1e-12, atol=0), "another loss"
    error, where = relative(came, expected)
    assert error <= TOLERANCE, f"{where}: {error:.1e}"
    # Inside a module that a direct rule cuts as a whole errors are backpropagated.
    whole = tuple(f"{name}." for name in feedback if rule == "dfa" and is_whole(net, name))
    # Nor is there an error on the way from a weight's gradient to what the weight is made of.
    transported = [n for n in transported if not n.startswith(whole) and "parametrizations" not in n]
    assert not transported, f"transport {transported}"
    torch.manual_seed(3)
    found = falign.transport(net, before, entry.loss)
    assert all(name.startswith(whole) for name in found), f"falign.transport {dict(found)}"
    reverted(entry, net, x, names)
    return error


def reverted(entry: Entry, net: nn.Module, x, names: list[str]) -> None:
    """The network afterwards is the plain one."""
    falign.revert(net)
    assert list(net.state_dict()) == names, "reverted, other names in the state"
    net.zero_grad()
    inputs = wanting(x, entry)
    came, loss, _ = step(entry, net, inputs)
    plain, _ = entry.build()
    for name, buffer in plain.named_buffers():
        if buffer.shape == net.get_buffer(name).shape:  # states of neurons are made anew
            buffer.copy_(net.get_buffer(name))
    inputs = wanting(x, entry)
    expected, value, _ = step(entry, plain, inputs)
    assert torch.equal(loss, value), "reverted, another loss"
    assert came.keys() == expected.keys()
    for name, gradient in expected.items():
        got = came[name]
        assert (got is None and gradient is None) or torch.equal(got, gradient), f"reverted, {name}"


def missing(entry: Entry) -> bool:
    """Whether the library of a network is not installed."""
    return entry.family in library_networks.LIBRARIES and library_networks.library(entry.family) is None


def outcome(entry: Entry, rule: str) -> tuple[str, str]:
    """("agrees", error), ("refused", its last line) or ("wrong", what)."""
    try:
        return "agrees", f"{compared(entry, rule):.0e}"
    except (falign.ConversionError, RuntimeError) as refusal:
        return "refused", str(refusal).splitlines()[-1].removeprefix("- ")
    except Exception as fault:
        return "wrong", f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"


def main(path: str, *words: str) -> None:
    """Write the table; of the rules among the words, and of the networks that have one of the others in their name."""
    rules = [rule for rule in RULES if rule in words] or RULES
    words = tuple(word for word in words if word not in RULES)
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("family", "network", "rule", "outcome", "largest relative error, or why"))
        for entry in ENTRIES:
            if missing(entry) or (words and not any(word in f"{entry.family} {entry.name}" for word in words)):
                continue
            for rule in rules:
                table.writerow((entry.family, entry.name, rule, *outcome(entry, rule)))
                file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
