"""Steps of a training on a GPU, recorded once an epoch as a CUDA graph and replayed, in a fraction of the time.

Small networks leave a GPU idle while Python prepares the next kernel. A step without Python between its kernels is the
same kernels on the same numbers. That it is the same step is not assumed: the first two replays are compared with the
same two steps without a graph, from the same state, and where they differ, or where a step cannot be recorded, the
training goes on without.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from falign.lab._batches import Images
from falign.lab._learner import Learner

_WARM = 3
"""Steps before the first recording, by which everything is made that is made only once."""
_AGREED = 1e-4
"""Largest difference of a tensor after two steps with and without a graph, relative to its norm."""


class Steps:
    """Makes the steps of a training, and sums its losses on the device.

    Args:
        learner: The network with its optimizer.
        images: The training images.
        batch: Images of a batch; smaller ones are not replayed.
        graphs: Whether to record; without effect where the device is no GPU.

    Attributes:
        total: Sum of all losses, a scalar: not finite once one was not.
        recorded: Whether steps are replayed.
    """

    def __init__(self, learner: Learner, images: Images, batch: int, *, graphs: bool = True) -> None:
        self._learner, self._images = learner, images
        device = images.labels.device
        self.total = torch.zeros((), device=device)
        self._wanted = graphs and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._index = torch.zeros(batch, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._compared = False
        self._waiting: list[tuple[Tensor, int]] = []

    @property
    def recorded(self) -> bool:
        """True once replays have been compared and agreed."""
        return self._wanted and self._compared

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The context of a training: its steps run on a stream of their own, as recording asks."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch's learning rate, which a recorded step has in it: it is recorded anew."""
        self._flush()
        self._learner.begin_epoch(epoch)
        self._graph = None

    def make(self, batch: Tensor, done: int) -> None:
        """Make a step.

        Args:
            batch: Positions of its images, ``(batch,)``.
            done: Steps done before this one.
        """
        if not self._wanted or done < _WARM or len(batch) != len(self._index) or not self._is_plain(done):
            self._flush()
            self._step(batch, done)
        elif not self._compared:
            self._waiting.append((batch, done))
            if len(self._waiting) == 2:
                self._compare()
        else:
            if self._graph is None and not self._record(done):
                self._step(batch, done)
                return
            self._replay(batch)

    def finish(self) -> None:
        """Make the steps that were put off."""
        self._flush()

    def _is_plain(self, done: int) -> bool:
        """Tell whether a step is one like most: nothing is learned between steps in front of it, and it is by rule."""
        config = self._learner.config
        between = any(every and done % every == 0 for every in (config.mirror_every, config.follow_every))
        return not between and not (config.calibrate and (done + 1) % config.calibrate == 0)

    def _step(self, batch: Tensor, done: int) -> None:
        loss, _ = self._learner.propagate(*self._images.take(batch), done)
        self._learner.update(done)
        self.total.add_(loss)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for batch, done in waiting:
            self._step(batch, done)

    def _record(self, done: int) -> bool:
        """Record a plain step; nothing is computed. False, and never again, if it cannot be."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step(self._index, done)
        except RuntimeError:  # an operation that waits for the device, or copies from the CPU
            torch.cuda.synchronize()
            self._wanted, self._graph = False, None
            return False
        self._graph = graph
        return True

    def _replay(self, batch: Tensor) -> None:
        assert self._graph is not None
        self._index.copy_(batch)
        self._graph.replay()

    def _compare(self) -> None:
        """Make the two steps that wait without a graph and with it, from the same state, and keep what the former did.

        Where both agree, the state after the replays is that after the steps, so that training goes on from either.
        """
        waiting, self._waiting = self._waiting, []
        before = self._copied()
        for batch, done in waiting:
            self._step(batch, done)
        after = self._copied()
        if len(after) != len(before):  # something got its first momentum only now
            self._wanted = False
            return
        self._put_back(before)
        if not self._record(waiting[0][1]):
            self._put_back(after)
            return
        for batch, _ in waiting:
            self._replay(batch)
        self._compared = self._wanted = all(map(_agree, self._state(), after))
        self._put_back(after)

    def _state(self) -> list[Tensor]:
        learner = self._learner
        moments = [
            value for state in learner.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        return [*learner.model.parameters(), *learner.model.buffers(), *moments, self.total]

    def _copied(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._state()]

    def _put_back(self, kept: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._state(), kept, strict=True):
                tensor.copy_(value)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same but for rounding; both not finite is the same, too."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    difference, size = (one - other).detach().double().norm(), other.detach().double().norm()
    return not bool(torch.isfinite(size)) or bool(difference <= _AGREED * size + 1e-12)
