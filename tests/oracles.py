"""An independent oracle: small networks and every rule's gradients in NumPy float64, written out, no autograd.

A network is a list of steps. ``gradients`` runs it forward, keeps what each step saw, and walks back. The error
returns through a layer by that layer's map transposed, taken with the feedback in place of the weight; or, direct,
each layer's input receives ``e @ B``.
"""

from dataclasses import dataclass, field
from math import gcd

import numpy as np

DIRECT = ("dfa", "drtp", "eprop", "dkp", "probe", "fdfa", "grape", "ebd", "ldfa", "afa")
Array = np.ndarray


@dataclass
class Step:
    """One step: ``kind`` with the name of its layer, and what it needs besides."""

    kind: str
    name: str = ""
    options: dict = field(default_factory=dict)
    inside: list["Step"] = field(default_factory=list)


def conv_windows(x: Array, kernel, stride, padding, dilation):
    """Yield (offset index, strided view) of zero-padded x for every kernel offset."""
    padded = np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding])
    sizes = [(padded.shape[2 + a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(2)]
    for u in range(kernel[0]):
        for v in range(kernel[1]):
            rows = slice(u * dilation[0], u * dilation[0] + stride[0] * (sizes[0] - 1) + 1, stride[0])
            columns = slice(v * dilation[1], v * dilation[1] + stride[1] * (sizes[1] - 1) + 1, stride[1])
            yield (u, v), padded, rows, columns


def conv(x: Array, w: Array, stride, padding, dilation, groups) -> Array:
    out = 0
    n, c = x.shape[:2]
    for (u, v), padded, rows, columns in conv_windows(x, w.shape[2:], stride, padding, dilation):
        part = padded[:, :, rows, columns]
        part = part.reshape(n, groups, c // groups, *part.shape[2:])
        weight = w[:, :, u, v].reshape(groups, -1, c // groups)
        out = out + np.einsum("ngchw,goc->ngohw", part, weight).reshape(n, w.shape[0], *part.shape[3:])
    return out


def conv_input_error(e: Array, b: Array, x: Array, stride, padding, dilation, groups) -> Array:
    n, c = x.shape[:2]
    result = np.pad(np.zeros_like(x), [(0, 0), (0, 0)] + [(p, p) for p in padding])
    grouped = e.reshape(n, groups, -1, *e.shape[2:])
    for (u, v), _, rows, columns in conv_windows(x, b.shape[2:], stride, padding, dilation):
        weight = b[:, :, u, v].reshape(groups, -1, c // groups)
        result[:, :, rows, columns] += np.einsum("ngohw,goc->ngchw", grouped, weight).reshape(n, c, *e.shape[2:])
    h, w = x.shape[2:]
    return result[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]


def conv_weight_gradient(e: Array, x: Array, shape, stride, padding, dilation, groups) -> Array:
    n, c = x.shape[:2]
    gradient = np.zeros(shape)
    grouped = e.reshape(n, groups, -1, *e.shape[2:])
    for (u, v), padded, rows, columns in conv_windows(x, shape[2:], stride, padding, dilation):
        part = padded[:, :, rows, columns].reshape(n, groups, c // groups, *e.shape[2:])
        gradient[:, :, u, v] = np.einsum("ngohw,ngchw->goc", grouped, part).reshape(shape[0], c // groups)
    return gradient


def forward(steps: list[Step], x: Array, weights: dict[str, Array], saved: dict) -> Array:
    for step in steps:
        saved[id(step)] = x
        if step.kind == "linear":
            x = x @ weights[step.name + ".weight"].T + weights.get(step.name + ".bias", 0)
        elif step.kind == "conv":
            bias = weights.get(step.name + ".bias")
            x = conv(x, weights[step.name + ".weight"], **step.options)
            x = x if bias is None else x + bias[:, None, None]
        elif step.kind == "embedding":
            x = weights[step.name + ".weight"][x]
        elif step.kind == "relu":
            x = np.maximum(x, 0)
        elif step.kind == "tanh":
            x = np.tanh(x)
        elif step.kind == "flatten":
            x = x.reshape(len(x), -1)
        elif step.kind == "mix":
            x = np.einsum("ts,nsd->ntd", step.options["matrix"], x)
        elif step.kind == "residual":
            x = x + forward(step.inside, x, weights, saved)
    return x


def backward(steps, e, weights, saved, carry, gradients):
    for step in reversed(steps):
        x = saved[id(step)]
        if step.kind in ("linear", "conv"):
            weight = weights[step.name + ".weight"]
            if step.kind == "linear":
                gradients[step.name + ".weight"] = np.einsum(
                    "no,ni->oi", e.reshape(-1, e.shape[-1]), x.reshape(-1, x.shape[-1])
                )
                axes = tuple(range(e.ndim - 1))
            else:
                gradients[step.name + ".weight"] = conv_weight_gradient(e, x, weight.shape, **step.options)
                axes = (0, 2, 3)
            if step.name + ".bias" in weights:
                gradients[step.name + ".bias"] = e.sum(axes)
            e = carry(step, e, x)
        elif step.kind == "embedding":
            gradient = np.zeros_like(weights[step.name + ".weight"])
            np.add.at(gradient, x, e)
            gradients[step.name + ".weight"] = gradient
        elif step.kind == "relu":
            e = e * (x > 0)
        elif step.kind == "tanh":
            e = e * (1 - np.tanh(x) ** 2)
        elif step.kind == "flatten":
            e = e.reshape(x.shape)
        elif step.kind == "mix":
            e = np.einsum("ts,ntd->nsd", step.options["matrix"], e)
        elif step.kind == "residual":
            e = e + backward(step.inside, e, weights, saved, carry, gradients)
    return e


def softmax(z: Array) -> Array:
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def gradients(
    rule: str,
    steps: list[Step],
    x: Array,
    y: Array,
    weights: dict[str, Array],
    feedback: dict[str, Array],
    passes: int = 1,
    errors: dict[str, tuple[Array, Array]] | None = None,
) -> dict[str, Array]:
    """All gradients of the mean cross-entropy under a rule, by parameter name.

    ``feedback`` holds what ``falign.feedback_state`` gave before the pass; ``passes`` counts the training passes up
    to and including this one; ``errors`` receives the error at every layer's output and the one it hands to its input.
    """
    saved: dict = {}
    output = forward(steps, x, weights, saved)
    hot = np.eye(output.shape[-1])[y]
    count = y.size
    error = (softmax(output) - hot) / count

    learned: dict[str, Array] = {}

    def layerwise(step: Step, e: Array, x: Array) -> Array:
        weight = weights[step.name + ".weight"]
        if rule == "pfa":
            matrix = turned(feedback, step.name, feedback[step.name])
        else:
            matrix = effective(rule, weight, feedback.get(step.name), passes)
        if step.kind == "linear":
            return e @ matrix
        return conv_input_error(e, matrix, x, **step.options)

    def direct(step: Step, e: Array, x: Array) -> Array:
        sent = -hot / count if rule == "drtp" else error
        matrix = feedback[step.name]
        if rule == "ldfa":
            heard = feedback[step.name + ".P"]
            heard = oja(heard, sent.reshape(-1, heard.shape[1]), 0.01)
            learned[step.name] = heard @ sent.reshape(-1, heard.shape[1]).T @ x.reshape(-1, matrix.shape[1])
            matrix = heard.T @ matrix
        if rule == "probe":
            matrix = probe(matrix, output.reshape(-1, matrix.shape[0]), x.reshape(-1, matrix.shape[1]))
        if rule == "ebd":
            matrix = broadcast(matrix, sent.reshape(-1, matrix.shape[0]), x.reshape(-1, matrix.shape[1]))
        if rule == "dkp":
            learned[step.name] = sent.reshape(-1, matrix.shape[0]).T @ x.reshape(-1, matrix.shape[1])
        handed = (sent.reshape(-1, matrix.shape[0]) @ matrix).reshape(x.shape)
        return confined(handed, x) if rule == "probe" else handed

    def carry(step: Step, e: Array, x: Array) -> Array:
        handed = (direct if rule in DIRECT else layerwise)(step, e, x)
        if errors is not None:
            errors[step.name] = e, handed
        return handed

    result: dict[str, Array] = {}
    backward(steps, error, weights, saved, carry, result)
    if rule == "kp":
        learned = {name: result[name + ".weight"] for name in feedback}
    if rule == "pfa":
        names = [name for name in feedback if name + ".weight" in result]
        learned = {name: turned(feedback, name, result[name + ".weight"], back=True) for name in names}
    if rule in ("frozen", "shallow"):
        last = _layers(steps)[-1 if rule == "frozen" else -2 :]
        result = {name: gradient for name, gradient in result.items() if name.rpartition(".")[0] in last}
    return result | {f"{name}.feedback.B": gradient for name, gradient in learned.items()}


def probe(matrix: Array, f: Array, x: Array, rate: float = 0.2, ridge: float = 0.1, rows: int = 64) -> Array:
    """One step of the affine projection algorithm towards the regression of f on x, both less their means."""
    if len(f) > rows:
        chosen = [index * len(f) // rows for index in range(rows)]
        f, x = f[chosen], x[chosen]
    f, x = f - f.mean(0), x - x.mean(0)
    size = np.mean(np.sum(x**2, axis=1))
    return matrix + rate * (f - x @ matrix.T).T @ np.linalg.inv(x @ x.T + ridge * size * np.eye(len(x))) @ x


def confined(e: Array, x: Array, limit: float = 1.0) -> Array:
    """An error at x with as much of its norm along x, outwards, as x has of its mean square above the limit."""
    above = max(0.0, 1 - limit / np.mean(x**2)) if np.any(x) else 0.0
    return e + above * np.sqrt(np.sum(e**2)) * x / np.sqrt(np.sum(x**2)) if above else e


def broadcast(matrix: Array, e: Array, x: Array, forgetting: float = 0.99999, sign: int = 1) -> Array:
    """The running mean of x with the error, of root mean square 1 over the samples that have one."""
    rows = np.any(e != 0, axis=1)
    e, x = e[rows], x[rows]
    e = e / np.sqrt(np.mean(np.sum(e**2, axis=1)))
    return forgetting * matrix + (1 - forgetting) * sign * np.mean(e[:, :, None] * x[:, None, :], axis=0)


def oja(p: Array, e: Array, rate: float) -> Array:
    """P + rate · mean(y eᵀ - y yᵀ P), sample by sample, e of root mean square 1."""
    e = e[np.any(e != 0, axis=1)]
    e = e / np.sqrt(np.mean(np.sum(e**2, axis=1)))
    step = np.zeros_like(p)
    for row in e:
        y = p @ row
        step += np.outer(y, row) - np.outer(y, y) @ p
    return p + rate * step / len(e)


def _layers(steps: list[Step]) -> list[str]:
    """Names of the layers with weights, in the order in which they run."""
    names: list[str] = []
    for step in steps:
        names += [step.name] if step.kind in ("linear", "conv") else []
        names += _layers(step.inside)
    return names


def turned(feedback: dict[str, Array], name: str, matrix: Array, *, back: bool = False) -> Array:
    """P times a matrix (or Pᵀ), P block-diagonal along the first axis."""
    blocks = [*feedback[name + ".P"], *feedback[name + ".rest"]]
    whole, start = np.zeros((matrix.shape[0],) * 2), 0
    for block in blocks:
        stop = start + block.shape[0]
        whole[start:stop, start:stop] = block
        start = stop
    return np.tensordot(whole.T if back else whole, matrix, 1)


def effective(rule: str, weight: Array, stored: Array | None, passes: int, rate: float = 0.01) -> Array:
    """The matrix that carries the error, by each rule's definition."""
    if rule in ("bp", "frozen", "shallow"):
        return weight
    assert stored is not None
    if rule in ("fa", "kp", "wm"):
        return stored
    if rule in ("usf", "frsf"):
        return stored * np.sign(weight)
    if rule == "brsf":
        size = weight.size
        stride = max(1, round(size * 0.6180339887498949))
        while gcd(stride, size) > 1:
            stride += 1
        return np.roll(stored.reshape(-1), -(passes * stride % size)).reshape(weight.shape) * np.sign(weight)
    if rule == "adafa":
        return (1 - rate) * stored + rate * weight
    if getattr(rule, "name", "") == "mixed":
        return (1 - rule.mix) * stored + rule.mix * weight
    raise AssertionError(rule)
