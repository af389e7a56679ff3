"""Tests of memory errors: one line, before the run if the need is known, otherwise with the stage."""

import gc
import re
import resource
import subprocess
import sys
import weakref

import numpy
import psutil
import pytest
import torch
from helpers import SETTINGS, TARGET

from darwinlm.cli import exit_code
from darwinlm.config.stage import Stage
from darwinlm.database.store import Database
from darwinlm.errors import UserError
from darwinlm.models.checkpoint import Checkpoint
from darwinlm.pipeline import prune
from darwinlm.recovery import stage as recovery_stage
from darwinlm.runtime import memory
from darwinlm.runtime.memory import available_memory, check_room, naming_memory_faults

GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is free."
)
NCCL = (
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA library failed.\nLast error:\nCuda failure 2 'out of memory'"
)
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError(GPU), r"GPU out of memory \(Tried to allocate 2.50 GiB\)"),
        (torch.distributed.DistBackendError(NCCL), r"GPU out of memory \(DistBackendError\)"),
        (RuntimeError("CUDA error: out of memory"), r"GPU out of memory \(RuntimeError\)"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "GPU out of memory",
        ),
        (RuntimeError(CPU_ALLOCATOR), r"out of memory \(tried to allocate 4000000000000 bytes\)"),
        (MemoryError(), r"out of memory \(MemoryError\)"),
        (OSError(12, "Cannot allocate memory"), r"out of memory \(OSError\)"),
        (Exception("Error while deserializing header: I/O error: x (os error 12)"), "out of memory"),
    ],
)
def test_naming_memory_faults(error, message):
    lower = "set search.offload=cpu, lower search.batch_size or data.sequence_length"
    remedy = f"run the same command on a larger machine, or {lower} in a new"
    with (
        pytest.raises(UserError, match=f"^0.8: search: {message}.*; {remedy}"),
        naming_memory_faults(Stage("search", size="0.8")),
    ):
        raise error


def test_naming_memory_faults_of_libraries():
    for allocate in (lambda: torch.empty(2**50), lambda: numpy.empty(2**50), lambda: bytearray(2**60)):
        with pytest.raises(UserError, match=r"out of memory"), naming_memory_faults("database"):
            allocate()


def test_naming_memory_faults_passes_other_errors():
    with pytest.raises(RuntimeError, match="shapes"), naming_memory_faults("database"):
        raise RuntimeError("shapes do not match")
    with pytest.raises(UserError, match=r"^mine$"), naming_memory_faults("database"):
        raise UserError("mine")


def test_available_memory(tmp_path, monkeypatch):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=1000))
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert available_memory() == 1000
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("500\n")
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.stat").write_text("anon 150\nfile 250\nshmem 50\n")
    assert available_memory() == 500 - 400 + 200
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() == 1000
    # The job of a batch system is in a nested group, and the limit may be on a parent group.
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/system.slice/job_1/step_0\n")
    job = tmp_path / "system.slice" / "job_1"
    (job / "step_0").mkdir(parents=True)
    for group, most in ((job / "step_0", "max"), (job, "300")):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text("100\n")
        (group / "memory.stat").write_text("file 30\nshmem 10\n")
    assert available_memory() == 300 - 100 + 20
    (job / "step_0" / "memory.max").write_text("150")
    assert available_memory() == 150 - 100 + 20
    (job / "memory.current").write_text("290\n")
    assert available_memory() == 300 - 290 + 20
    for group in (job / "step_0", job):
        (group / "memory.max").write_text("max\n")
    assert available_memory() == 1000
    # Control groups version 1, in a container, where the group's own path is not visible.
    (tmp_path / "own").write_text("4:cpu,memory:/docker/12ab\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("600\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("500\n")
    (tmp_path / "memory" / "memory.stat").write_text("cache 1\nshmem 1\ntotal_cache 90\ntotal_shmem 20\n")
    assert available_memory() == 600 - 500 + 70
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_memory() == 1000
    mine = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (mine // 2, resource.RLIM_INFINITY))
    assert available_memory() == 0


def test_model_larger_than_memory_refused(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000)
    message = r"model '.+' in float32 takes 0.0 GiB, but only 0.0 GiB of memory are free; free some, or use a larger"
    with pytest.raises(UserError, match=message):
        prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings={**SETTINGS, "data.source": str(text)})
    assert not (tmp_path / "run").exists()
    check_room(100_000, torch.device("cpu"), "x")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["database", "search", "recovery", "evaluation"])
def test_stage_out_of_memory_then_resume(stage, checkpoint, text, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise torch.OutOfMemoryError(GPU)

    name = {
        "database": "run.prepare.build_database",
        "search": "search.stage.search_plan",
        "recovery": "recovery.stage.recover",
        "evaluation": "evaluation.stage.measure",
    }
    arguments = {"target": TARGET, "out": tmp_path / "run", "settings": {**SETTINGS, "data.source": str(text)}}
    with monkeypatch.context() as patched:
        patched.setattr(f"darwinlm.{name[stage]}", fail)
        with pytest.raises(UserError, match=f"^{stage}: GPU out of memory .*; run the same command on"):
            prune(checkpoint("qwen3"), **arguments)
    prune(checkpoint("qwen3"), **arguments)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("refit_tokens", [0, 32])
@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_dense_model_freed_during_recovery(refit_tokens, distillation, checkpoint, text, tmp_path, monkeypatch):
    read = []

    def watch(owner, name):
        right = getattr(owner, name)

        def watched(*arguments, **named):
            found = right(*arguments, **named)
            tensors = found.values() if isinstance(found, dict) else [found.output_weight]
            read.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors if tensor is not None)
            return found

        monkeypatch.setattr(owner, name, watched)

    def train(model, teacher, *arguments, **named):
        gc.collect()
        held = [model] if teacher is None else [model, teacher]
        known = {p.untyped_storage().data_ptr() for one in held for p in (*one.parameters(), *one.buffers())}
        left = [storage() for storage in read]
        assert read and not [one for one in left if one is not None and one.data_ptr() not in known]
        raise UserError("trained")

    watch(Checkpoint, "read")
    watch(Database, "cut")
    monkeypatch.setattr(recovery_stage, "recover", train)
    settings = {"recovery.refit_tokens": refit_tokens, "recovery.distillation": distillation, "search.generations": 0}
    with pytest.raises(UserError, match="trained"):
        prune(
            checkpoint("qwen3"),
            target=TARGET,
            out=tmp_path / "run",
            settings={**SETTINGS, "data.source": str(text), **settings},
        )


LIMITED = """
import resource, sys
import psutil
from darwinlm.run import prepare
from darwinlm.cli import main

def check_room(size, device, what, check=prepare.check_room):
    # Enough for Python and PyTorch, but not for a model of 1 GiB.
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1))
    check(2**30, device, what)

prepare.check_room = check_room
sys.argv = ["darwinlm", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_memory_limit_error_one_line(checkpoint, text, tmp_path):
    command = [
        "prune",
        str(checkpoint("llama")),
        "--target",
        "0.8",
        "--out",
        str(tmp_path / "run"),
        "--data",
        str(text),
        "--set",
        "data.sequence_length=64",
    ]
    done = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"error: model .+ in float32 takes 1\.0 GiB, but only 0\.[45] GiB of memory are free; .+\n", done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_out_of_memory_outside_stages_one_line(monkeypatch, tmp_path, capsys):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr("darwinlm.config.loading.load_recipe", fail)
    assert exit_code(["prune", "model", "--target", "0.8", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: out of memory; free some")
