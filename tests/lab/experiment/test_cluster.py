import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

pytest.importorskip("ray", reason='Ray is not installed: pip install "falign[ray]"')

from cluster_examples import brought, faulty, one_by_one, wait_for
from examples import module_path
from polars.testing import assert_frame_equal

from falign.lab import _options
from falign.lab.config import ConfigError
from falign.lab.experiment import Setting, _ray
from falign.lab.experiment._local import InThisProcess
from falign.lab.experiment._ray import RayExecutor, capacity
from falign.lab.experiment._store import Store

pytestmark = pytest.mark.xdist_group("cluster")  # what is made once for the module is made in one process

SCENARIO = """
import json, pathlib, sys, cluster_examples
print(json.dumps(cluster_examples.SCENARIOS[sys.argv[1]](pathlib.Path(sys.argv[2]))))
"""


def scenario(name, out, *, checked, seconds=150):
    """What a scenario found, in a process that is killed with all that it started if it takes too long."""
    folder = out / "notes"
    folder.mkdir()
    short = tempfile.mkdtemp(prefix="ray")  # the path of a socket may have 107 letters
    environment = {
        **os.environ,
        "PYTHONPATH": module_path(),  # nodes inherit it, so that they can import the experiments of the tests
        "FALIGN_TEST_CLUSTER": str(folder),
        "RAY_TMPDIR": short,
        "RAY_AUTH_MODE": "token",  # or Ray would write a token into the home folder
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    if not checked:  # annotations are checked in one scenario: it makes the import of falign slow
        environment.pop("FALIGN_TYPECHECK", None)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCENARIO, name, str(out)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        printed, said = process.communicate()
    finally:
        shutil.rmtree(short, ignore_errors=True)
    assert process.returncode == 0, f"{printed}\n{said}"
    return json.loads(printed.splitlines()[-1]), printed, said


def table(out, experiment):
    return Store(folder=out).results(experiment, "smoke").table.sort("rate", "seed", "step")


def gone(process):
    """Whether a process has ended, be it that nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.fixture(scope="module")
def death(tmp_path_factory):
    out = tmp_path_factory.mktemp("death")
    found, printed, said = scenario("a_node_dies", out, checked=True)
    return found, out, printed, said


def test_the_table_is_the_one_of_a_single_process_although_a_node_died(death, tmp_path):
    _, out, _, _ = death
    assert brought(InThisProcess(Setting()), tmp_path / "single", one_by_one()) == 0
    assert_frame_equal(table(out / "cluster", one_by_one()), table(tmp_path / "single", one_by_one()))


def test_runs_in_flight_on_the_dead_node_were_tried_again_on_the_other(death):
    found, _, _, _ = death
    tries = {}
    for note in found["notes"]:
        for key in note["keys"]:
            tries.setdefault(key, []).append(note["node"])
    assert sorted(tries) == sorted(task.key for task in one_by_one().tasks("smoke"))
    again = [nodes for nodes in tries.values() if found["killed"] in nodes]
    assert again  # nothing ended before the node died, so that these were at work on it
    assert all(nodes.index(found["killed"]) < len(nodes) - 1 and nodes[-1] != found["killed"] for nodes in again)


def test_an_exception_is_the_error_of_its_run_only(death):
    found, out, _, _ = death
    raises, dies = faulty()
    assert found["code"] == 1
    runs = Store(folder=out / "cluster").results(raises, "smoke").runs
    failed = runs.filter(runs["status"] == "failed")
    assert set(failed["seed"]) == {3}
    assert set(failed["message"]) == {"ZeroDivisionError: seed three"}
    assert set(Store(folder=out / "cluster").results(dies, "smoke").runs["status"]) == {"done"}


def test_what_no_node_has_is_refused_at_once(death):
    refusal = death[0]["gpu"]
    assert refusal.startswith("no node of the Ray cluster has the cores and GPUs for one run")
    assert "--gpus-per-run 1" in refusal
    assert "has 1 and 0" in refusal


def test_another_version_on_a_node_is_refused(death):
    assert death[0]["version"].startswith("falign is 0.0.0 here, but of the cluster's nodes ")


def test_ray_says_nothing_in_between(death):
    _, _, printed, said = death
    assert len(printed.splitlines()) == 1
    assert "raylet" not in said
    assert "Warning" not in said


def test_a_cluster_of_this_machine_alone_leaves_nothing_behind(death, tmp_path):
    found, printed, said = scenario("local", tmp_path, checked=False)
    assert (found["code"], len(printed.splitlines())) == (0, 1), said  # also of a module that no node has
    heard = found["listening"]
    assert len(heard) >= 3, "the node, its store of addresses, the process of the run"
    assert all(ip_address(address).is_loopback for addresses in heard.values() for address in addresses), heard
    for note in [*found["notes"], *death[0]["notes"]]:
        for process in note["processes"]:
            wait_for(partial(gone, process), 10)


def test_threads_are_the_cores_of_the_share(death):
    runs = Store(folder=death[1] / "cluster").results(one_by_one(), "smoke")
    assert {origin["threads"] for origin in runs.provenance} == {1}


@pytest.mark.parametrize("address", ["127.0.0.1:{free}", "ray://127.0.0.1:{free}"])
def test_an_address_where_nothing_answers(address, monkeypatch):
    monkeypatch.setattr(_options, "find_spec", lambda name: name)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        executor = RayExecutor(address.format(free=unheard.getsockname()[1]), Setting())
        assert executor.slots == 1
        with pytest.raises(ConfigError, match=r"where nothing answers \(.*refused\): start a cluster there"), executor:
            pass


def test_an_address_where_something_else_answers(monkeypatch):
    monkeypatch.setattr(_ray, "_JOIN", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        executor = RayExecutor(f"127.0.0.1:{other.getsockname()[1]}", Setting())
        with pytest.raises(ConfigError, match="within 2 s no Ray cluster there took this process"), executor:
            pass


@pytest.mark.parametrize("address", ["", "here", "host:", "host:0", "host:99999", "host:port", "http://host:1", ":1"])
def test_what_is_no_address(address):
    with pytest.raises(ConfigError, match="expected local, auto, HOST:PORT or ray://HOST:PORT"):
        RayExecutor(address, Setting())


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setattr(_options, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "falign\[ray\]"'):
        RayExecutor("local", Setting())
    monkeypatch.setattr(_options, "find_spec", lambda name: name if name == "ray" else None)
    with pytest.raises(ConfigError, match=r'pip install "ray\[client\]"'):
        RayExecutor("ray://host:10001", Setting())


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"cpus_per_run": 0.0}, "--cpus-per-run is 0, expected a part of 1"),
        ({"cpus_per_run": 1.5}, "--cpus-per-run is 1.5"),
        ({"gpus_per_run": -1.0}, "--gpus-per-run is -1"),
        ({"gpus_per_run": float("nan")}, "--gpus-per-run is nan"),
        ({"cpus_per_run": float("inf")}, "--cpus-per-run is inf"),
    ],
)
def test_what_ray_cannot_give_out(shares, message):
    with pytest.raises(ConfigError, match=message):
        RayExecutor("local", Setting(), **shares)


def test_a_local_cluster_that_others_can_reach_is_refused():
    _ray._check_alone([{"NodeManagerAddress": "127.0.0.1"}])
    with pytest.raises(ConfigError, match=r"--ray is local, but Ray listens on 192.0.2.7, where other machines can"):
        _ray._check_alone([{"NodeManagerAddress": "192.0.2.7"}])


def test_a_gpu_that_ray_is_not_asked_for():
    with pytest.raises(ConfigError, match="add --gpus-per-run 1"):
        RayExecutor("local", Setting(device="cuda:0"))


@pytest.mark.parametrize(
    ("cpus", "gpus", "room"),
    [
        (1.0, 0.0, 8),
        (3.0, 0.0, 2),
        (0.1, 0.0, 80),
        (16.0, 0.0, 0),
        (1.0, 1.0, 2),
        (1.0, 0.4, 5),  # two on each GPU; Ray lets the fifth wait, as no GPU is taken in two parts
        (1.0, 0.1, 8),
        (4.0, 0.5, 2),
        (1.0, 2.0, 1),
        (1.0, 3.0, 0),
    ],
)
def test_capacity_of_nodes(cpus, gpus, room):
    asked, node = {"CPU": cpus, "GPU": gpus}, {"Resources": {"CPU": 8.0, "GPU": 2.0}}
    assert capacity(asked, [node]) == room
    assert capacity(asked, [node, node]) >= 2 * room
    assert capacity(asked, [{"Resources": {}}]) == capacity(asked, []) == 0
