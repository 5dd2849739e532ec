"""Strict settings: annotations are checked where FALIGN_TYPECHECK is set; threads are few, seeds are fixed."""

import os
from pathlib import Path
from zlib import crc32

import pytest

if os.environ.get("FALIGN_TYPECHECK"):
    from jaxtyping import install_import_hook

    install_import_hook("falign", "beartype.beartype")

import torch

from cases import CORE, TWINS


@pytest.fixture(autouse=True, scope="session")
def _cache_of_their_own(tmp_path_factory):
    """Tests leave nothing in the user's cache; matplotlib keeps its own, which takes seconds to make."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(user / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    return


WHOLE = ("test_oracle.py", "test_transport.py")
"""Files in which every rule meets every case."""
_SEEN: dict[tuple[Path, str], list[str]] = {}
"""Networks that a test has met so far."""
_MANY: set[tuple[Path, str]] = set()
"""Tests with cases, of which the first has been collected."""
ONE_IN = 8
"""Of the cases of a test the first is run under checked annotations, and about one in so many of the others."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Choose the suite of a case: checked, unchecked or slow."""
    _choose_checked(item)
    _choose_slow(item)


def _test_of(item: pytest.Item) -> tuple[Path, str]:
    """The test that an item is a case of."""
    return item.path, getattr(item, "originalname", item.name)


def _choose_checked(item: pytest.Item) -> None:
    """Leave most cases of a test to the unchecked suite: checking annotations takes up to three times the rest.

    Tests of a group share what one process has made, and stay together.
    """
    if not hasattr(item, "callspec") or item.get_closest_marker("xdist_group"):
        return
    test = _test_of(item)
    if test in _MANY and crc32(item.nodeid.encode()) % ONE_IN:
        item.add_marker(pytest.mark.unchecked)
    _MANY.add(test)


def _choose_slow(item: pytest.Item) -> None:
    """Leave to the slow suite: rules that are twins on all networks but a test's first, others but its first two."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    network = next((str(parameters[name]) for name in ("case", "make", "model") if name in parameters), None)
    if network is None or "rule" not in parameters or item.path.name in WHOLE:
        return
    seen = _SEEN.setdefault(_test_of(item), [])
    if network not in seen:
        seen.append(network)
    rule = parameters["rule"] if isinstance(parameters["rule"], str) else ""
    if seen.index(network) >= (1 if rule in TWINS else len(seen) if rule in CORE else 2):
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tell ``--dist loadgroup`` the groups: pytest-xdist 3.8 writes them where pytest 9.2 no longer reads them.

    See https://github.com/pytest-dev/pytest-xdist/issues/1386. Without them, every process makes what a group's tests
    share, such as the runs of a paper.
    """
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        groups = sorted({mark.args[0] for mark in item.iter_markers("xdist_group")})
        suffix = f"@{'_'.join(groups)}"
        if groups and not item.nodeid.endswith(suffix):
            item._id = type(item.id).parse(item.nodeid + suffix)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def data_folder() -> Path:
    """The folder with the real data sets, or skip."""
    folder = os.environ.get("FALIGN_DATA")
    if not folder:
        pytest.skip("FALIGN_DATA names no folder with the real data sets")
    return Path(folder)
