"""Strict settings: annotations are checked where FALIGN_TYPECHECK is set; threads are few, seeds are fixed."""

import os
from pathlib import Path

import pytest

if os.environ.get("FALIGN_TYPECHECK"):
    from jaxtyping import install_import_hook

    install_import_hook("falign", "beartype.beartype")

import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    return


@pytest.fixture
def data_folder() -> Path:
    """The folder with the real data sets, or skip."""
    folder = os.environ.get("FALIGN_DATA")
    if not folder:
        pytest.skip("FALIGN_DATA names no folder with the real data sets")
    return Path(folder)
