"""Tests of errors on several ranks: they are reported once, and lost ranks are named."""

from datetime import timedelta

import pytest
from torch import distributed

from darwinlm.errors import UserError
from darwinlm.runtime import dist


@pytest.mark.parametrize(
    "missing", [{"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"MASTER_ADDR": None}, {"MASTER_PORT": "1"}]
)
def test_should_report_without_store(missing, monkeypatch):
    found = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    monkeypatch.setattr(dist, "_ASKING", timedelta(milliseconds=10))
    for name, value in (found | missing).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert dist.should_report("x")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38308"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30ms for recv operation"), True),
        (RuntimeError("Gloo connectFullMesh failed with"), True),
        (distributed.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//1"), True),
        (distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (distributed.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"), True),
        (distributed.DistBackendError("NCCL communicator was aborted on rank 0."), True),
        (distributed.DistBackendError("ncclInvalidUsage: Duplicate GPU detected: rank 0 and rank 1"), False),
        (distributed.DistBackendError("ncclUnhandledCudaError: Cuda failure 2 'out of memory'"), False),
        (RuntimeError("Input tensor data type is not supported for NCCL process group: ComplexHalf"), False),
        (RuntimeError("Backend gloo does not support reduce_scatter"), False),
    ],
)
def test_naming_lost_ranks(error, lost, monkeypatch):
    said = set()
    for rank in (0, 2):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        for ranks in (1, 3):
            monkeypatch.setattr(dist, "world_size", lambda ranks=ranks: ranks)
            with pytest.raises((UserError, type(error))) as caught, dist.naming_lost_ranks():
                raise error
            assert isinstance(caught.value, UserError) == (lost and ranks > 1)
            said.add(str(caught.value))
    assert len(said) == 1 + lost
