"""Two gloo processes: DDP, DDP with compile, and FSDP2, against one process on the whole batch."""

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import falign
from cases import RULES, batch, build, gradients, loss_of, relative, step

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = _port()
    workers = [context.Process(target=_worker, args=(rank, port, RULES, how, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(answers.get(timeout=120) for _ in RULES)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for rule in RULES:
        model = build("mlp", rule)
        gradients(model, *batch("mlp"))
        assert relative(results[rule], gradients(model, *batch("mlp"))) <= 1e-12, rule


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
    context = torch.multiprocessing.get_context("spawn")
    answers, port = context.Queue(), _port()
    workers = [context.Process(target=_measuring_worker, args=(rank, port, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(answers.get(timeout=120) for _ in range(2))
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for alone, found, _, residuals in results.values():
        assert found == alone
        assert list(residuals) == ["2"]  # the others feed tanh
        assert residuals["2"] <= 1e-13
    assert results[0][1] != results[1][1]
    assert results[0][2] == results[1][2] > 0


def test_fixed_feedback_is_not_broadcast():
    """DDP would send every buffer at every forward; the feedback is the same on all ranks by its seed."""
    model = falign.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "fa")
    ignored = model._ddp_params_and_buffers_to_ignore
    assert ignored == ["0.feedback.B", "2.feedback.B"]
    falign.revert(model)
    assert not model._ddp_params_and_buffers_to_ignore
