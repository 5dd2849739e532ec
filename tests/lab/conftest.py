"""Fixtures of tests that train."""

from collections.abc import Iterator

import pytest
import torch
from kills import Nursery, Verdicts


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small two threads only wait for each other; and the numbers depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Forks processes of the command."""
    with Nursery(tmp_path_factory.mktemp("said")) as opened:
        yield opened


@pytest.fixture
def verdicts(request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """Counts the cases of a test, and says how many there were at its end."""
    counted = Verdicts(request.node.name)
    yield counted
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\n{counted}")
    if counted.wrong:
        pytest.fail("\n".join([str(counted), *counted.wrong]), pytrace=False)
