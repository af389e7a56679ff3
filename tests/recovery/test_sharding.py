"""Tests of sharding: devices of model and teacher, and two ranks against one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import halved
from recoveries import CPU, RANKS_JOBS, RANKS_RECIPE, STOP, train_in_float32

from darwinlm.recovery.objective import Objective
from darwinlm.recovery.sharding import shard

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from darwinlm.runtime import dist
from darwinlm.models.loading import load_dense
from darwinlm.database.store import Database
sys.path.insert(0, sys.argv[1])
from recoveries import RANKS_JOBS, train_in_float32
checkpoint, database, folder = sys.argv[2:]
dist.start()
dense = load_dense(checkpoint, "kv_group", torch.device("cpu"))
done = {
    name: train_in_float32(dense, Database(Path(database)), recipe, Path(folder) / name, stop_at)
    for name, (recipe, stop_at) in RANKS_JOBS.items()
}
if dist.rank() == 0:
    print(json.dumps(done))
dist.stop()
"""


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # the second has a tied head
@pytest.mark.parametrize("offload", [False, True])
def test_sharded_model_and_teacher_on_device(family, offload, pruned, monkeypatch):
    """Both start in CPU memory, and FSDP only moves what it shards: for the teacher, the layers."""
    dense, database = pruned(family, "kv_group")
    device, taught = torch.device("meta"), dense.load(CPU, torch.float32)
    trained = Objective(halved(dense, database, trainable=True), taught, 0.5)
    monkeypatch.setattr("darwinlm.recovery.sharding.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("darwinlm.recovery.sharding.fully_shard", lambda module, **_: module.to(device))
    shard(trained, taught, device, torch.float32, offload=offload)
    for model in (trained, taught):
        assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {device}


@pytest.mark.slow
def test_two_ranks_train_like_one_rank(checkpoint, pruned, tmp_path):
    dense, database = pruned("qwen3", "kv_group")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(Path(__file__).parents[1]), str(checkpoint("qwen3")), str(database.folder), str(tmp_path)]
    ended = subprocess.run([*command, str(tmp_path / "script.py"), *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    two = json.loads(ended.stdout.splitlines()[-1])
    one = train_in_float32(dense, database, RANKS_RECIPE, tmp_path / "one")
    assert len(one["losses"]) == 30
    same = [two["predictions"], two["fsdp_offload-whole"]]
    for sharding in ("none", "fsdp"):
        stopped = f"{sharding}-{STOP}"
        assert two[stopped]["share"] == pytest.approx(0.5 if sharding == "fsdp" else 1, abs=0.02)
        assert len(two[stopped]["losses"]) == STOP
        resumed = train_in_float32(dense, database, RANKS_JOBS[stopped][0], tmp_path / stopped)
        same += [resumed, two[f"{sharding}-whole"]]
    for other in same:
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert other["sum"] == pytest.approx(one["sum"], rel=1e-5)
    pieces = [path.name for path in (tmp_path / "predictions" / "text").iterdir()]
    assert sorted(pieces) == ["00000", "00001", "00002"]
