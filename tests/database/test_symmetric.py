import pytest
import torch

from darwinlm.database.symmetric import add_symmetric, mirror


@pytest.mark.parametrize("size", [3, 5, 13])
def test_add_symmetric_for_any_strip_size(size, monkeypatch):
    monkeypatch.setattr("darwinlm.database.symmetric._LEAST", 5)
    x = torch.randn(20, size, generator=torch.Generator().manual_seed(0))
    start = torch.eye(size)
    found = start.clone()
    add_symmetric(found, x[:12].T, x[:12])
    add_symmetric(found, x[12:].T, x[12:], alpha=-2)
    mirror(found)
    torch.testing.assert_close(found, start + x[:12].T @ x[:12] - 2 * x[12:].T @ x[12:])
    torch.testing.assert_close(found, found.T)
