"""Two gloo processes: DDP, DDP with compile, and FSDP2, against one process on the whole batch."""

import copy
import os
import socket
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import falign
from cases import RULES, TWINS, batch, build, gradients, loss_of, observes, relative, step
from forks import FORKSERVER

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")

PARTED = tuple(rule for rule in RULES if rule not in TWINS)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _in_two_processes(worker: Callable[..., None], answers: int, *given: Any) -> dict:
    """Run ``worker(rank, port, *given, queue)`` in two processes, and gather so many (key, value) from the queue."""
    queue, port = FORKSERVER.Queue(), _port()
    processes = [FORKSERVER.Process(target=worker, args=(rank, port, *given, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in range(answers))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return results


def _worker(rank: int, port: int, rules: tuple[str, ...], how: str, answers) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    try:
        for rule in rules:
            model = build("mlp", rule)
            x, y = batch("mlp")
            x, y = x[rank * 8 : rank * 8 + 8], y[rank * 8 : rank * 8 + 8]
            wrapped = DistributedDataParallel(model)
            if how == "compiled":
                torch._dynamo.reset()
                wrapped = torch.compile(wrapped, backend="aot_eager_decomp_partition")
            for _ in range(2):  # the second step sees what the first left
                model.zero_grad()
                step(model, x, y, wrapped)
            if rank == 0:
                answers.put((rule, {name: p.grad.numpy() for name, p in model.named_parameters()}))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["plain", pytest.param("compiled", marks=pytest.mark.compiled)])
def test_ddp(how):
    rules = PARTED if how == "plain" else ("fa", "kp", "dfa", "probe")
    results = _in_two_processes(_worker, len(rules), rules, how)
    x, y = batch("mlp")
    for rule in rules:
        model = build("mlp", rule)
        if observes(rule):  # each process moves B by its part, from that of the first process
            gradients(model, x[:8], y[:8])
            parts = [gradients(copy.deepcopy(model), x[half], y[half]) for half in (slice(8), slice(8, 16))]
            expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
        else:
            gradients(model, x, y)
            expected = gradients(model, x, y)
        assert relative(results[rule], expected) <= 1e-12, rule


def _measuring_worker(rank: int, port: int, answers) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = build("mlp", "fa")
        x, y = batch("mlp")
        x, y = x[rank * 8 : rank * 8 + 8], y[rank * 8 : rank * 8 + 8]
        alone = str(falign.measure.alignment(model, loss_of, x, y))
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        law = falign.measure.ConservationLaw(wrapped, optimizer, example=x)
        with falign.measure.Monitor(wrapped, every=1, optimizer=optimizer) as monitor:
            found = monitor.step(loss_of, x, y)
            step(model, x, y, wrapped)
            optimizer.step()
        residuals = {row.layer: row.residual for row in law.report().laws if row.status == "exact"}
        answers.put((rank, (alone, str(found), monitor.records[0]["displacement_norm"], residuals)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_measuring_behind_ddp():
    """Every rank measures its own batch, and sees what all did together; the law knows of no ranks."""
    results = _in_two_processes(_measuring_worker, 2)
    for alone, found, _, residuals in results.values():
        assert found == alone
        assert list(residuals) == ["2"]  # the others feed tanh
        assert residuals["2"] <= 1e-13
    assert results[0][1] != results[1][1]
    assert results[0][2] == results[1][2] > 0


class ByHand(nn.Module):
    """An LSTM, attention, a layer, and an output head that is the embedding's weight; some may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.rnn = nn.Embedding(7, 6), nn.LSTM(6, 6, batch_first=True)
        self.attention, self.layer = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)
        self.double()

    def forward(self, tokens: torch.Tensor, *, attend: bool = True) -> torch.Tensor:
        h = self.rnn(self.embed(tokens))[0]
        if attend:
            h = h + self.attention(h, h, h, need_weights=False)[0]
        return nn.functional.linear(torch.tanh(self.layer(h)), self.embed.weight)


LR, DECAY, STEPS = 0.5, 0.1, 3
CLIP = 0.05
#: {case: rule, options of DDP}; what a case does beyond that is in ``_train_by_hand``.
BY_HAND = {
    "fa": ("fa", {}),
    "fa, accumulated": ("fa", {}),
    "kp": ("kp", {}),
    "kp, accumulated": ("kp", {}),
    "kp, clipped": ("kp", {}),
    "kp, accumulated and clipped, views": ("kp", {"gradient_as_bucket_view": True}),
    "kp, twice": ("kp", {}),
    "kp, small buckets": ("kp", {"bucket_cap_mb": 1e-4}),
    "kp, static": ("kp", {"static_graph": True}),
    "kp, unused": ("kp", {"find_unused_parameters": True}),
    "kp, backpropagation": ("kp", {"find_unused_parameters": True}),
    "kp, sharded": ("kp", {}),
}


def _apart(model: nn.Module) -> dict[str, torch.Tensor]:
    """|W - B| of every learned or fixed B."""
    weights = dict(model.named_parameters())
    weights["layer"] = weights["layer.weight"]
    return {name: (weights[name].detach() - b).norm() for name, b in falign.feedback_state(model).items()}


def _by_hand_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(7, (2, 8, 5), generator=generator).unbind()) for _ in range(STEPS)]  # pyright: ignore


def _train_by_hand(case: str, rank: int | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train in one of two processes, or (rank None) alone on both halves; |W-B| at the end over that at the start."""
    rule, options = BY_HAND[case]
    (first, _), *_ = batches = _by_hand_batches()
    model: nn.Module = falign.convert(ByHand(), rule, example=first[:2])
    before = _apart(model)
    sharded = rank is not None and "sharded" in case
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    wrapped = model if rank is None or sharded else DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY, momentum=0.9 if "twice" in case else 0)
    kept = getattr(wrapped, "no_sync", nullcontext)

    def backward(x: torch.Tensor, y: torch.Tensor, weight: float, **options: bool) -> None:
        loss = nn.functional.cross_entropy(wrapped(x, **options).transpose(1, 2), y)
        (weight * loss).backward()

    for number, (x, y) in enumerate(batches):
        halves = [(x[rows], y[rows]) for rows in (slice(0, 4), slice(4, 8))]
        optimizer.zero_grad(set_to_none=number != 1)
        if "unused" in case:  # by one process of the two
            for at, half in enumerate(halves):
                if rank in (None, at):
                    backward(*half, 0.5 if rank is None else 1.0, attend=at == 0)
        elif rank is None:
            backward(x, y, 1.0)
            if "twice" in case:
                backward(x, y, 2.0)
        elif "accumulated" in case:
            x, y = halves[rank]
            with kept():
                backward(x[:2], y[:2], 0.5)
            backward(x[2:], y[2:], 0.5)
        else:
            backward(*halves[rank], 1.0)
            if "twice" in case:  # both are averaged
                backward(*halves[rank], 2.0)
        if "backpropagation" in case:
            with falign.backprop(model):
                backward(*((x, y) if rank is None else halves[rank]), 1.0)
        if "clipped" in case:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    if sharded:
        return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}, {}  # pyright: ignore
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters, {name: float(size / before[name]) for name, size in _apart(model).items()}


def _by_hand_worker(rank: int, port: int, answers) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    try:
        for case in BY_HAND:
            parameters, shrunk = _train_by_hand(case, rank)
            answers.put(((case, rank), ({name: value.numpy() for name, value in parameters.items()}, shrunk)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_ddp_of_parameters_that_are_multiplied_by_hand():
    """Learned feedback takes the averaged gradient of its weight, so W - B shrinks by 1 - ηλ a step on every rank."""
    results = _in_two_processes(_by_hand_worker, 2 * len(BY_HAND))
    for case, (rule, _) in BY_HAND.items():
        (one, shrunk), (other, _) = results[case, 0], results[case, 1]
        alone, alone_shrunk = _train_by_hand(case, None)
        assert one.keys() == other.keys() == alone.keys()
        assert all((one[name] == other[name]).all() for name in alone), case
        assert relative(one, alone) <= 1e-12, case
        assert ("rnn.feedback.weight_hh_l0.B" in alone) == (rule == "kp")
        if rule == "kp" and "twice" not in case and "backpropagation" not in case:
            exact = pytest.approx((1 - LR * DECAY) ** STEPS, rel=1e-12)
            assert len(alone_shrunk) == 6
            assert all(value == exact for value in (*shrunk.values(), *alone_shrunk.values())), case


def test_fixed_feedback_is_not_broadcast():
    """DDP would send every buffer at every forward; the feedback is the same on all ranks by its seed."""
    model = falign.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "fa")
    ignored = model._ddp_params_and_buffers_to_ignore
    assert ignored == ["0.feedback.B", "2.feedback.B"]
    falign.revert(model)
    assert not model._ddp_params_and_buffers_to_ignore
