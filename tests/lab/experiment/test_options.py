"""Where and with how much memory it is computed: every option is meant, or refused in a sentence that names it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falign.lab._memory import GIB, available, cores
from falign.lab._options import ExecutionOptions
from falign.lab.config import ConfigError
from falign.lab.experiment._execution import Executor
from falign.lab.experiment._local import InThisProcess, Workers
from falign.lab.experiment._reproduce import make_executor, memory_limit


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"workers": 0}, "--workers is 0, expected at least 1"),
        ({"workers": -(10**30)}, "expected at least 1"),
        ({"workers": 10**9}, r"--workers is 1000000000, expected at most \d+ on this machine, which has \d+ cores"),
        ({"cpus_per_run": 1.0}, "--cpus-per-run is 1, but it is for --ray"),
        ({"gpus_per_run": math.nan}, "--gpus-per-run is nan, but it is for --ray"),
        ({"device": "cpu:3"}, "--device is 'cpu:3', expected cpu, cuda or cuda:N"),
        ({"device": "cuda:256"}, "--device is 'cuda:256', expected cpu, cuda or cuda:N"),
        ({"device": "cuda:" + "9" * 400}, "expected cpu, cuda or cuda:N"),
        ({"device": "\udcff"}, "expected cpu, cuda or cuda:N"),
        ({"device": "\0"}, "expected cpu, cuda or cuda:N"),
        ({"device": "meta"}, "--device is 'meta', expected cpu, cuda or cuda:N"),
        ({"data": Path("x" * 5000)}, "is not a folder, expected an existing one"),
        ({"data": Path("a\0b")}, "is not a folder, expected an existing one"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(given: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExecutionOptions(**given)


@pytest.mark.parametrize("cpus", [1e-9, 1e-300, 0.0, -1.0, math.nan, math.inf, 1.5])
def test_shares_that_ray_cannot_give_out(cpus: float) -> None:
    pytest.importorskip("ray", reason='Ray is not installed: pip install "falign[ray]"')
    for name in ("cpus_per_run", "gpus_per_run"):
        if (name, cpus) != ("gpus_per_run", 0.0):
            with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} is .*, expected a part of 1"):
                ExecutionOptions(ray="local", **{name: cpus})


@pytest.mark.parametrize("gib", [1e308, 1e-300, 0.0, -1.0, math.nan, math.inf, -math.inf, 2e9, 1e-7])
def test_memory_that_no_block_can_have(gib: float) -> None:
    with pytest.raises(ConfigError, match=r"--memory is .*, expected a positive number of GiB, from 1e-06 to 1e"):
        ExecutionOptions(memory=gib)


def test_memory_is_half_of_the_machines_by_default() -> None:
    assert memory_limit(ExecutionOptions()) == available() // 2
    assert memory_limit(ExecutionOptions(workers=4)) == available() // 8
    assert memory_limit(ExecutionOptions(workers=4, memory=0.5)) == GIB // 2


NUMBERS = st.none() | st.floats() | st.sampled_from([1.0, 0.5, 1e308, 1e-300, -0.0, 1e-9])
WORDS = st.text(max_size=8) | st.sampled_from(["cpu", "cuda", "cuda:0", "cuda:7", "local", "auto", "host:1", "ray://"])


@pytest.mark.parametrize("count", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_every_option_is_meant_or_refused_in_a_sentence(count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.none() | st.integers(), WORDS, st.none() | st.text(max_size=6), st.none() | WORDS, NUMBERS, NUMBERS, NUMBERS
    )
    def tried(
        workers: int | None,
        device: str,
        data: str | None,
        ray: str | None,
        cpus: float | None,
        gpus: float | None,
        gib: float | None,
    ) -> None:
        try:
            options = ExecutionOptions(
                workers=workers,
                device=device,
                data=None if data is None else Path(data),
                memory=gib,
                ray=ray,
                cpus_per_run=cpus,
                gpus_per_run=gpus,
            )
            executor, limit = make_executor(options), memory_limit(options)
        except ConfigError as error:
            refused = str(error)
        else:
            refused = None
            assert isinstance(executor, Executor)
            if ray is None:
                assert isinstance(executor, InThisProcess if workers in (None, 1) else Workers)
                assert 1 <= executor.slots <= max(32, 4 * cores())
            assert torch.device(device).type in ("cpu", "cuda")
            assert 0 < limit <= 10**9 * GIB
        if refused is not None:
            assert "--" in refused or "folder" in refused

    tried()
