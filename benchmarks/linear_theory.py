"""Speed of the linear theories, as ratios to what a PyTorch user would write, measured in the same run.

The reference is a loop over one run, or one mode, at a time: two parameters in float64, feedback alignment by a custom
autograd function, SGD by hand. A mode is such a network with one input, one hidden neuron and one output. The loop is
timed on some steps; its cost a step does not change, so what all steps of all runs would take is that times their
number. The simulators are timed whole, on as many threads. Before, both are seen to reach the same numbers.
Repetitions, quartiles and "fastest" are those of ``benchmarks/two_layer.py``; of a random start a tenth of the steps
is timed. ``python benchmarks/linear_theory.py --help`` lists what can be chosen.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from falign.theory import deep_linear, factorisation
from two_layer import row, times

RUNS, N, R, STEPS = 200, 100, 20, 5_000
MODES, MODE_STEPS = 10_000, 10_000


class _Feedback(torch.autograd.Function):
    """``ZW`` whose error returns to W through B."""

    @staticmethod
    def forward(ctx, Z: Tensor, W: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(W, B)
        return Z @ W

    @staticmethod
    def backward(ctx, e: Tensor) -> tuple[Tensor, Tensor, None]:
        W, B = ctx.saved_tensors
        return e @ W.mT, B @ e, None


class Loop:
    """One run, as a user would write it."""

    def __init__(self, Y: Tensor, B: Tensor, Z: Tensor, W: Tensor, rate: float) -> None:
        self.Y, self.B, self.rate = Y, B, rate
        self.Z, self.W = torch.nn.Parameter(Z.clone()), torch.nn.Parameter(W.clone())

    def step(self) -> None:
        """One step."""
        loss = (self.Y - _Feedback.apply(self.Z, self.W, self.B)).square().sum() / 2
        loss.backward()
        with torch.no_grad():
            for part in (self.Z, self.W):
                part.sub_(part.grad, alpha=self.rate)
                part.grad = None


def agree(loop: Loop, steps: int, Z: Tensor, W: Tensor) -> None:
    """Stop unless the loop arrives where the simulator did."""
    for _ in range(steps):
        loop.step()
    torch.testing.assert_close(loop.Z.detach(), Z, rtol=0, atol=1e-10)
    torch.testing.assert_close(loop.W.detach(), W, rtol=0, atol=1e-10)


def factorise(start: Callable, steps: int, repetitions: int, wanted: tuple[str, str]) -> list[dict]:
    """200 draws of B at n = m = 100, r = 20; seconds and ratio are for 5,000 steps."""
    Y = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B = factorisation.feedback(N, R, seeds=range(RUNS))
    state = start(Y, B)
    rate = float(factorisation.sufficient_rate("fa", Y, B, state).min())

    def whole(count: int = steps) -> factorisation.Trajectory:
        return factorisation.gradient_descent("fa", Y, B, state, rate=rate, steps=count, names=["error"])

    end = whole(50).end
    agree(Loop(Y, B[1], state.Z[1], state.W[1], rate), 50, end.Z[1], end.W[1])
    loop = Loop(Y, B[0], state.Z[0], state.W[0], rate)
    found = times({"loop": (loop.step, 100), "whole": (whole, 1)}, repetitions)
    name = f"factorisation, {RUNS} draws, {start.__name__} start"
    return [
        row(f"{name}: seconds", found["whole"], [1.0] * repetitions, wanted[0], STEPS / steps),
        row(f"{name}: loop / block", found["loop"], found["whole"], wanted[1], RUNS * steps),
    ]


def modes(repetitions: int) -> list[dict]:
    """10,000 modes × 10,000 steps from zero."""
    target = torch.logspace(-2, 0, MODES, dtype=torch.float64)
    zeros = torch.zeros_like(target)
    start, rate = deep_linear.modes(target, [zeros, zeros], rule="fa"), 0.1
    ones = torch.ones(1, 1, dtype=torch.float64)

    def whole(count: int = MODE_STEPS) -> deep_linear.ModeTrajectory:
        return deep_linear.gradient_descent(start, rate=rate, steps=count)

    W, Z = whole(50).weights[-1, :, -1]
    agree(Loop(ones, ones, 0 * ones, 0 * ones, rate), 50, Z.reshape(1, 1), W.reshape(1, 1))
    loop = Loop(ones, ones, 0 * ones, 0 * ones, rate)
    found = times({"loop": (loop.step, 300), "whole": (whole, 1)}, repetitions)
    return [
        row("modes, 10,000 x 10,000 steps: seconds", found["whole"], [1.0] * repetitions, "<= 2"),
        row("modes, 10,000 x 10,000 steps: loop / block", found["loop"], found["whole"], ">= 100", MODES * MODE_STEPS),
    ]


def normal(Y: Tensor, B: Tensor) -> factorisation.State:
    """A small random start."""
    return factorisation.normal(Y, B, seeds=range(RUNS), scale=0.1)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [
        *modes(chosen.repetitions),
        *factorise(factorisation.zero, STEPS, chosen.repetitions, ("<= 60", ">= 5")),
        *factorise(normal, STEPS // 10, chosen.repetitions, ("<= 60", ">= 5")),
    ]
    for one in rows:
        print("{what:56} {ratio:10.2f} [{low:.2f}, {high:.2f}] fastest {fastest:.2f}, wanted {wanted}".format(**one))
    if chosen.out:
        where = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {chosen.threads} threads"
        chosen.out.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
