"""Libraries make buffers and states of the default type: here it is that of the comparison."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
