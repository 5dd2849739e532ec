"""What happens on a Ray cluster, each in a process of its own: Ray leaves threads, handlers and settings behind."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

if os.environ.get("FALIGN_TYPECHECK"):
    from jaxtyping import install_import_hook

    install_import_hook("falign", "beartype.beartype")

from examples import decay, experiment, paper, report
from rich.console import Console

from falign.lab.config import ConfigError
from falign.lab.experiment import Experiment, Outcome, Setting, Task, _ray
from falign.lab.experiment._execution import Executor
from falign.lab.experiment._ray import RayExecutor
from falign.lab.experiment._reproduce import reproduce
from falign.lab.experiment._selection import Selection

OBJECTS = 10**8
DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10000,
    "health_check_failure_threshold": 2,
}
"""A dead node is found in seconds; Ray takes a quarter of a minute by default."""


def held(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Notes where it runs; on a cluster, nothing ends before a node was killed."""
    folder = os.environ.get("FALIGN_TEST_CLUSTER")
    if folder:
        note(Path(folder), tasks)
        wait_for((Path(folder) / "killed").exists)
    return [decay(task) for task in tasks]


def noted(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Notes where it runs."""
    note(Path(os.environ["FALIGN_TEST_CLUSTER"]), tasks)
    return [decay(task) for task in tasks]


def raises_at_three(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Raises for a block with seed three."""
    if any(task.seed == 3 for task in tasks):
        raise ZeroDivisionError("seed three")
    return [decay(task) for task in tasks]


def dies_once(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Kills its process the first time that it is called on a cluster."""
    died = Path(os.environ["FALIGN_TEST_CLUSTER"]) / "died"
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [decay(task) for task in tasks]


def note(folder: Path, tasks: Sequence[Task]) -> None:
    """Leave a file a try: the runs, the node, this process and its parent, which is the node's own."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    content = {"keys": [task.key for task in tasks], "node": node, "processes": [os.getpid(), os.getppid()]}
    name = f"{time.time_ns()}-{os.getpid()}"
    (folder / f"{name}.partial").write_text(json.dumps(content))
    (folder / f"{name}.partial").rename(folder / f"{name}.json")


def notes(folder: Path) -> list[dict]:
    """All tries, in order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def wait_for(done: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{done} after {seconds} s")
        time.sleep(0.05)


def brought(executor: Executor, out: Path, *experiments: Experiment) -> int:
    """All runs of experiments, by the real loop."""
    selection = Selection(papers=(paper(*experiments),), experiments=experiments)
    console = Console(file=sys.stderr)
    return reproduce(selection, "smoke", out=out, executor=executor, memory=2**30, console=console, write_report=report)


def one_by_one() -> Experiment:
    """Eight runs, each a block."""
    return experiment(held, seeds=4, at_most=1)


def faulty() -> tuple[Experiment, Experiment]:
    """Runs that raise, and one whose process is killed at its first try."""
    raises = experiment(raises_at_three, name="toy.raises", rates=(0.5,), seeds=4)
    return raises, experiment(dies_once, name="toy.dies", rates=(0.5,), seeds=2)


@contextmanager
def two_nodes() -> Iterator:
    """A cluster of two nodes, of one core each."""
    _ray.set_ray_switches()  # as if Ray was imported by the executor
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": OBJECTS}
    head = {**node, "include_dashboard": False, "_system_config": DETECTION}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster, cluster.add_node(**node)
    finally:
        cluster.shutdown()


def a_node_dies(out: Path) -> dict:
    """Kill one of two nodes while both have runs in flight; on what is left, runs that fail, then refusals."""
    folder = Path(os.environ["FALIGN_TEST_CLUSTER"])
    with two_nodes() as (cluster, node):

        def kill() -> None:
            wait_for(lambda: len({each["node"] for each in notes(folder)}) == 2)
            cluster.remove_node(node, allow_graceful=False)
            for each in notes(folder):  # its workers would die in a second, but may finish within it
                if each["node"] == node.node_id:
                    os.kill(each["processes"][0], signal.SIGKILL)
            (folder / "killed").touch()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        code = brought(RayExecutor(cluster.address, Setting()), out / "cluster", one_by_one(), *faulty())
        killer.join()
        found = {"code": code, "killed": node.node_id, "notes": notes(folder)}
        found["gpu"] = refused(RayExecutor(cluster.address, Setting(), gpus_per_run=1.0))
        _ray._installed = lambda: "0.0.0"
        found["version"] = refused(RayExecutor(cluster.address, Setting()))
    return found


def refused(executor: RayExecutor) -> str:
    """Why a cluster is not joined."""
    try:
        with executor:
            return "it was joined"
    except ConfigError as error:
        return str(error)


def heard(tasks: Sequence[Task], setting: Setting) -> list[Outcome]:
    """Notes where it runs, and the addresses at which this process and all others of its user's listen by now."""
    folder = Path(os.environ["FALIGN_TEST_CLUSTER"])
    note(folder, tasks)
    (folder / "listening").write_text(json.dumps(listening(os.getpgrp())))
    return [decay(task) for task in tasks]


def listening(group: int) -> dict[str, list[str]]:
    """{command of a process of the group, or of its session: the addresses at which it listens}."""
    sockets = {}
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                sockets[f"socket:[{inode}]"] = str(address_of(address.partition(":")[0]))
    found: dict[str, list[str]] = {}
    session = os.getsid(group)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(process.name)) == session:
                name = (process / "cmdline").read_text().replace("\0", " ")[-200:]
                for descriptor in (process / "fd").iterdir():
                    if (target := os.readlink(descriptor)) in sockets:
                        found.setdefault(name, []).append(sockets[target])
    return found


def address_of(digits: str) -> IPv4Address | IPv6Address:
    """An address as the system's table has it, four bytes at a time in this machine's order."""
    words = (bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8))
    found = ip_address(b"".join(words))
    return getattr(found, "ipv4_mapped", None) or found


ELSEWHERE = """
from falign.lab.experiment import Outcome

def run(*, seed, setting, rate, steps):
    return Outcome(records={"step": list(range(steps)), "x": [half(rate)] * steps})

def half(rate):
    return rate / 2
"""


def local(out: Path) -> dict:
    """A cluster of this machine's own, for a run, and for one of a module that its workers cannot import."""
    folder = out / "elsewhere"
    folder.mkdir()
    (folder / "module_elsewhere.py").write_text(ELSEWHERE)
    sys.path.insert(0, str(folder))
    own = import_module("module_elsewhere").run
    executor = RayExecutor("local", Setting(), modules=("module_elsewhere",))
    first = experiment(heard, seeds=1, memory=lambda tasks: 2**20)
    code = brought(executor, out / "local", first, experiment(own, name="toy.own", seeds=1, together=(), claims=()))
    folder = Path(os.environ["FALIGN_TEST_CLUSTER"])
    return {"code": code, "notes": notes(folder), "listening": json.loads((folder / "listening").read_text())}


SCENARIOS = {scenario.__name__: scenario for scenario in (a_node_dies, local)}
