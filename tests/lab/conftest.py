"""Fixtures of tests that train."""

from collections.abc import Iterator

import pytest
import torch

from falign.lab import ending


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small two threads only wait for each other; and the numbers depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have tests of their own, and elsewhere they would be most of the time."""
    monkeypatch.setattr(ending, "draw", lambda *_: None)
