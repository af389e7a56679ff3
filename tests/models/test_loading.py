"""Tests of the dtype that a model runs in."""

import pytest
import torch

from darwinlm.models import loading


@pytest.mark.parametrize(
    ("stored", "device", "fast", "served"),
    [
        ("bfloat16", "cpu", False, "float32"),
        ("bfloat16", "cpu", True, "bfloat16"),
        ("bfloat16", "cuda", False, "float32"),
        ("bfloat16", "cuda", True, "bfloat16"),
        ("float16", "cpu", True, "float32"),
        ("float16", "cuda", False, "float16"),
        ("float32", "cuda", True, "float32"),
    ],
)
def test_served_dtype(stored, device, fast, served, monkeypatch):
    found = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr(loading, "fast_dtype", lambda device: found)
    assert loading.served_dtype(getattr(torch, stored), torch.device(device)) == getattr(torch, served)
