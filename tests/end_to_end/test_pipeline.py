"""Tests of the whole pipeline on a tiny model: outputs of a run, and equal results after crashes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import SETTINGS, TARGET, files_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import darwinlm
from darwinlm import cli
from darwinlm.commands.recover import recover_again
from darwinlm.config.loading import load_recipe
from darwinlm.models.loading import load_dense
from darwinlm.pipeline import prune
from darwinlm.recovery import stage as recovery_stage
from darwinlm.recovery import training
from darwinlm.run import prepare
from darwinlm.run.lock import RunLock
from darwinlm.runtime import dist, progress

pytestmark = pytest.mark.slow


def test_run_meets_target_and_writes_metrics(run):
    finished, _ = run
    rows = {row["name"]: row for row in finished.metrics["rows"]}
    assert list(rows) == ["dense", "uniform", "found", "recovered"]
    dense = rows["dense"]["parameters"]
    for name in ("uniform", "found", "recovered"):
        assert rows[name]["parameters"] <= TARGET * dense
        assert rows[name]["kl"] > 0
        assert rows[name]["kv_cache_bytes_per_token"] <= rows["dense"]["kv_cache_bytes_per_token"]
    assert rows["dense"]["kl"] == 0
    assert all(row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 for row in rows.values())
    assert finished.metrics["request"] == {"batch_size": 1, "prompt_tokens": 8, "new_tokens": 2, "repeats": 3}
    assert set(finished.metrics["stages"]) == {"corpus", "database", "search", "recovery", "evaluation", "export"}
    assert finished.metrics["environment"]["torch"] == torch.__version__
    model = finished.load()
    assert sum(parameter.numel() for parameter in model.parameters()) == rows["recovered"]["parameters"]
    plan = json.loads((finished.model_path / "plan.json").read_text())
    assert plan["parameters"] == rows["recovered"]["parameters"]
    assert plan == json.loads((finished.path / "search" / "best_plan.json").read_text())


def test_model_card_without_local_paths(run):
    finished, settings = run
    card = (finished.model_path / "README.md").read_text()
    assert f"{finished.metrics['rows'][-1]['parameters']:,}" in card
    assert "batch 1, 8 prompt and 2 new tokens, median of 3." in card
    assert "sequence_length: 16" in card
    assert "trust_remote_code=True" in card
    assert str(Path(settings["data.source"]).parent) not in card


def test_search_history_keeps_best_score(run):
    finished, _ = run
    lines = [json.loads(line) for line in (finished.path / "search" / "history.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [0, 1, 2]
    assert all(line["score"] == min(line["scores"]) for line in lines)


def test_family_of_sizes_shares_database(run, checkpoint, tmp_path):
    _, settings = run
    settings = {**settings, "search.generations": 1, "recovery.tokens": 0}
    family = prune(checkpoint("qwen3"), target="0.6,0.8", out=tmp_path / "family", settings=settings)
    rows = family.metrics["rows"]
    assert [row["name"] for row in rows] == ["dense", "0.8", "0.6"]
    for row in rows[1:]:
        assert row["parameters"] <= float(row["name"]) * rows[0]["parameters"]
        model = darwinlm.load(tmp_path / "family" / "sizes" / row["name"] / "model")
        assert sum(parameter.numel() for parameter in model.parameters()) == row["parameters"]
    stages = family.metrics["stages"]
    assert {"database", "0.8: search", "0.6: search", "0.6: export"} <= set(stages)
    before = files_of(tmp_path / "family")
    prune(checkpoint("qwen3"), target="0.6,0.8", out=tmp_path / "family", settings=settings)
    assert files_of(tmp_path / "family") == before

    first, second = (tmp_path / "family" / "sizes" / name / "evaluation" / "measured.json" for name in ("0.8", "0.6"))
    first.unlink()
    measured = second.read_bytes()
    prune(checkpoint("qwen3"), target="0.6,0.8", out=tmp_path / "family", settings=settings)
    assert first.exists() and second.read_bytes() == measured


@pytest.mark.parametrize(
    ("name", "family"), [("llama2_7b_2.7b", "llama"), ("llama3.1_8b_4.6b", "llama"), ("qwen2.5_14b_8.4b", "qwen2")]
)
def test_paper_recipe_runs_on_tiny_model(name, family, run, checkpoint, tmp_path):
    _, settings = run
    kept = ("search.survivors", "search.offspring", "search.learning_rate")
    small = {key: value for key, value in settings.items() if key not in kept}
    small |= {"search.generations": 1, "search.trial_tokens": [16, 32, 48, 64], "search.score_tokens": [16, 32, 48, 64]}
    small |= {"recovery.tokens": "0.256K", "recovery.batch_size": 4, "recovery.evaluations": 2}
    finished = prune(checkpoint(family), target=TARGET, out=tmp_path / "run", recipe=name, settings=small)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["database"]["granularity"] == "query_head"
    assert recipe["recovery"]["text"] == "stream"
    dense, recovered = finished.metrics["rows"][0], finished.metrics["rows"][-1]
    assert recovered["name"] == "recovered" and recovered["parameters"] <= TARGET * dense["parameters"]


def test_run_with_several_limits(run, checkpoint, tmp_path):
    _, settings = run
    settings = {**settings, "recovery.tokens": 0}
    target = "params=0.8,kv_cache=0.5,latency=0.99"
    finished = prune(checkpoint("qwen3"), target=target, out=tmp_path / "run", settings=settings)
    dense, found = (next(row for row in finished.metrics["rows"] if row["name"] == name) for name in ("dense", "found"))
    assert found["parameters"] <= 0.8 * dense["parameters"]
    assert found["kv_cache_bytes_per_token"] <= 0.5 * dense["kv_cache_bytes_per_token"]
    limits = {limit["name"]: limit for limit in finished.metrics["limits"]}
    assert limits["params"]["found"] == found["parameters"]
    assert limits["kv_cache"]["found"] == found["kv_cache_bytes_per_token"]
    assert limits["latency"]["found"] <= 0.99 * limits["latency"]["dense"]
    assert set(limits["latency"]["measured"]) == {"dense", "found"}


def test_same_command_again_does_nothing(run, checkpoint):
    finished, settings = run
    before = {file: file.stat().st_mtime_ns for file in finished.path.rglob("*") if file.is_file()}
    again = prune(checkpoint("qwen3"), target=TARGET, out=finished.path, settings=settings)
    assert again.metrics == finished.metrics
    with pytest.raises(darwinlm.UserError, match=r"another recipe \(search.offspring: 3 -> 4\)"):
        prune(checkpoint("qwen3"), target=TARGET, out=finished.path, settings={**settings, "search.offspring": 4})
    assert before == {file: file.stat().st_mtime_ns for file in finished.path.rglob("*") if file.is_file()}


def test_recover_command_resumes_run(run, tmp_path, capsys, monkeypatch):
    finished, _ = run
    out = shutil.copytree(finished.path, tmp_path / "run")
    before = files_of(out)
    shutil.rmtree(out / "model")
    # Skip what the command sets up for a process of its own.
    monkeypatch.setattr(progress, "set_up", lambda **arguments: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *arguments: None)
    assert cli.exit_code(["recover", str(out), "--quiet"]) == 0
    assert "recovered" in capsys.readouterr().out
    assert files_of(out) == before


@pytest.mark.parametrize("extra", [{"lora_rank": 2}, {"teacher_top_k": 8, "teacher_dtype": "int8"}])
def test_recover_again_trains_same_plan(extra, run, tmp_path, monkeypatch):
    finished, _ = run
    # Whether such a short training improves such a small model depends on the rounding of the hardware.
    monkeypatch.setattr(training, "best_of", lambda evaluations: evaluations[-1])
    out = tmp_path / "run"
    shutil.copytree(finished.path, out)
    again = recover_again(out, {"recovery.tokens": "0.128K", **{f"recovery.{name}": extra[name] for name in extra}})
    losses = json.loads((out / "recovery" / "losses.json").read_text())
    assert (len(losses["loss"]), losses["evaluations"][-1]["step"]) == (4, 4)
    assert again.metrics["rows"][:3] != finished.metrics["rows"][:3]  # speeds, measured again
    assert [row["kl"] for row in again.metrics["rows"][:3]] == [row["kl"] for row in finished.metrics["rows"][:3]]
    assert again.metrics["rows"][3]["kl"] != finished.metrics["rows"][3]["kl"]
    before, after = files_of(finished.path), files_of(out)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"recovery/losses.json", "recovery/weights.safetensors", "model/model.safetensors"}
    assert "tokens: 128" in (out / "recipe.yaml").read_text()
    assert recover_again(out).metrics == again.metrics
    with pytest.raises(darwinlm.UserError, match=r"recover cannot change search.offspring: 3 -> 4; start a new run"):
        recover_again(out, {"search.offspring": 4})
    with pytest.raises(darwinlm.UserError, match="is not a DarwinLM run"):
        recover_again(tmp_path)
    assert files_of(out) == after


LOST_RANK = """
import os, signal, sys
from darwinlm.cli import main
from darwinlm.recovery.trainer import RecoveryTrainer
steps = []
step = RecoveryTrainer.training_step
def killed(*arguments):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
RecoveryTrainer.training_step = killed
main()
"""


def test_two_sharded_ranks_resume_after_kill(run, checkpoint, tmp_path):
    finished, settings = run
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["prune", str(checkpoint("qwen3")), "--target", str(TARGET), "--out", str(tmp_path / "run"), "--quiet"]
    for key, value in {**settings, "recovery.sharding": "fsdp"}.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    (tmp_path / "lost.py").write_text(LOST_RANK)
    lost = subprocess.run([*launcher, str(tmp_path / "lost.py"), *command], capture_output=True, text=True)
    assert "Signal 9 (SIGKILL)" in lost.stderr, lost.stderr
    # The launcher, which prints its own traceback, may end rank 0 before it notices that rank 1 is gone.
    ours = [line for line in lost.stderr.splitlines() if "another rank has stopped" in line or "Interrupted;" in line]
    assert len(ours) <= 1 and "[rank0]: Traceback" not in lost.stderr, lost.stderr
    done = subprocess.run([*launcher, "-m", "darwinlm", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    plans = [json.loads((path / "model" / "plan.json").read_text()) for path in (tmp_path / "run", finished.path)]
    assert plans[0] == plans[1]
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        here, there = model(tokens).logits, finished.load()(tokens).logits
    # Both trained in bfloat16 where the hardware is fast with it, and summed in a different order.
    assert (here - there).abs().max() < 0.02 * there.abs().max()


def test_ranks_report_stopped_rank_in_one_line(run, checkpoint):
    finished, settings = run
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "darwinlm"]
    command += ["prune", str(checkpoint("qwen3")), "--target", str(TARGET), "--out", str(finished.path), "--quiet"]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    with RunLock(finished.path) as lock:
        lock.take()
        refused = subprocess.run(command, capture_output=True, text=True)
    assert "is in use by process" in refused.stderr, refused.stderr
    assert "[rank1]: Traceback" not in refused.stderr, refused.stderr


def test_recovery_files_removed_after_barrier(run, tmp_path, monkeypatch):
    """The last files that they read are the best weights, at the end of `recover`."""
    finished, _ = run
    shutil.copytree(finished.path, tmp_path / "run")
    events = []
    for module, name in ((recovery_stage, "recover"), (dist, "barrier"), (recovery_stage, "forget_recovery")):
        function = getattr(module, name)

        def noted(*arguments, name=name, function=function, **more):
            found = function(*arguments, **more)
            events.append(name)
            return found

        monkeypatch.setattr(module, name, noted)
    recover_again(tmp_path / "run", {"recovery.learning_rate": 1e-3})
    assert events[events.index("recover") :][:3] == ["recover", "barrier", "forget_recovery"]


class Crash(BaseException):
    """Simulated crash; not an Exception, so that nothing catches it."""


@pytest.mark.parametrize("nth", range(1, 31, 4))
def test_run_resumes_after_crash_at_any_file(nth, run, checkpoint, tmp_path, monkeypatch):
    finished, settings = run
    count = 0
    replace = os.replace

    def crash_at_nth(source, destination):
        nonlocal count
        count += 1
        if count == nth:
            raise Crash
        replace(source, destination)

    monkeypatch.setattr(os, "replace", crash_at_nth)
    with pytest.raises(Crash):
        prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings=settings)
    resumed = prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings=settings)
    assert files_of(resumed.path) == files_of(finished.path)


def test_run_resumes_after_crash_before_corpus_is_recorded(run, checkpoint, tmp_path, monkeypatch):
    finished, settings = run
    replace = os.replace

    def crash_at_the_note(source, destination):
        if (tmp_path / "run" / "corpus.safetensors").exists():
            raise Crash
        replace(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash_at_the_note)
        with pytest.raises(Crash):
            prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings=settings)
    assert (tmp_path / "run" / "corpus.safetensors").exists()
    prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings=settings)
    assert files_of(tmp_path / "run") == files_of(finished.path)


def test_clock_jumps_change_nothing(run, checkpoint, tmp_path, monkeypatch):
    finished, settings = run
    now, jumps = time.time, itertools.cycle([0, 1e8, -1e8, 3_600, -7_200])
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings=settings)
    assert files_of(tmp_path / "run") == files_of(finished.path)
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert all(0 <= stage["seconds"] < 10_000 for stage in stages.values())


def test_generate_text_fills_splits(checkpoint):
    dense = load_dense(str(checkpoint("qwen3")), "kv_group", torch.device("cpu"))
    recipe = load_recipe("quick", {"model": "m", "target": TARGET, **SETTINGS})
    corpus = prepare.generate_text(dense, recipe)
    assert {name: text.input_ids_BT.numel() for name, text in corpus.splits.items()} == {
        "calibration": 256,
        "train": 128,
        "validation": 64,
        "test": 64,
    }
    again = prepare.generate_text(dense, recipe)
    for name, text in corpus.splits.items():
        assert torch.equal(text.input_ids_BT, again.splits[name].input_ids_BT)


KILLED = """
import os, signal, sys
part, nth = sys.argv[1], int(sys.argv[2])
replace = os.replace
def kill_at_nth(source, destination):
    global nth
    replace(source, destination)
    nth -= part in str(destination)
    if nth == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill_at_nth
from darwinlm.cli import main
sys.argv = ["darwinlm", *sys.argv[3:]]
main()
"""


def test_run_resumes_after_sigkill(run, checkpoint, tmp_path):
    finished, settings = run
    command = ["prune", str(checkpoint("qwen3")), "--target", str(TARGET), "--out", str(tmp_path / "run"), "--quiet"]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]

    def start(*killed_at):
        return subprocess.run([sys.executable, "-c", KILLED, *killed_at, *command], capture_output=True, text=True)

    assert start("database/index.json", "3").returncode == -signal.SIGKILL
    assert start("search/state.json", "2").returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    last = start("nothing", "1")
    assert last.returncode == 0, last.stderr
    assert "recovered" in last.stdout
    assert files_of(tmp_path / "run") == files_of(finished.path)


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background processes
numbers, places = [getattr(signal, name) for name in sys.argv[1].split(",")], sys.argv[2].split(",")
replace = os.replace
def interrupt(source, destination):
    replace(source, destination)
    if places and places[0] in str(destination):
        places.pop(0)
        os.kill(os.getpid(), numbers.pop(0))
os.replace = interrupt
from darwinlm.cli import main
sys.argv = ["darwinlm", *sys.argv[3:]]
main()
"""


@pytest.mark.parametrize(
    ("numbers", "places"),
    [
        ("SIGTERM", "search/state.json"),
        ("SIGINT", "database/index.json"),
        # The second signal arrives during the handling of the first: the manifest is written at exit.
        ("SIGINT,SIGINT", "search/state.json,manifest.json"),
    ],
)
def test_signals_end_run_with_130(numbers, places, run, checkpoint, tmp_path):
    finished, settings = run
    command = ["prune", str(checkpoint("qwen3")), "--target", str(TARGET), "--out", str(tmp_path / "run")]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, numbers, places, *command], capture_output=True, text=True
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == cli._KEPT
    assert "Traceback" not in done.stderr
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert stages["corpus"]["done"]
    assert not (tmp_path / "run" / "model").exists()
    prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings=settings)
    assert files_of(tmp_path / "run") == files_of(finished.path)


TWICE = """
import os, signal, sys, time
from darwinlm import cli
first, second = [getattr(signal, name) for name in sys.argv[1:]]
def work(*arguments, **named):
    try:
        os.kill(os.getpid(), first)
        time.sleep(60)
    finally:
        print("putting in order", flush=True)
        os.kill(os.getpid(), second)
        time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.app = work
sys.exit(cli.exit_code([]))
"""


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_second_signal_ends_at_once(first, second):
    done = subprocess.run([sys.executable, "-c", TWICE, first, second], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "putting in order\n", f"\n{cli._KEPT}\n")


def test_another_model_in_same_run_refused(run, checkpoint, tmp_path):
    finished, settings = run
    with pytest.raises(darwinlm.UserError, match="is a run with another recipe"):
        prune(checkpoint("llama"), target=TARGET, out=finished.path, settings=settings)


def test_removed_units_absent_from_tensors(run):
    finished, _ = run
    tensors = load_file(finished.model_path / "model.safetensors")
    plan = json.loads((finished.model_path / "plan.json").read_text())
    for site, units in plan["units"].items():
        _, layer, kind = site.split(".")
        prefix = f"model.layers.{layer}."
        if kind == "mlp":
            name = prefix + "mlp.down_proj.weight"
            assert (tensors[name].shape[1] if name in tensors else 0) == units
        else:
            name = prefix + "self_attn.k_proj.weight"
            assert (tensors[name].shape[0] // 16 if name in tensors else 0) == units


def test_load_model_of_run(run):
    finished, _ = run
    model = darwinlm.load(finished.path)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(10).unsqueeze(0)).logits).all()
