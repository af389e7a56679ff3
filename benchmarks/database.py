"""Benchmark the database stage: solver against plain removal, time by phase, memory by depth.

    python benchmarks/database.py solver --shape 8b
    python benchmarks/database.py stage [MODEL]
    torchrun --nproc-per-node 2 benchmarks/database.py stage [MODEL]
    python benchmarks/database.py memory
    python benchmarks/database.py same FOLDER FOLDER

`solver`: both methods get the same output projection and Gram matrix, remove columns in greedy order, refit after every
removal and keep ten snapshots. The plain method follows the formulas: full matrices in float32, a rank-one update of
the inverse and of the weight for each removal. Where that would take hours, `--removals` stops both early, and the
ratio is of that part. `stage`: random token ids, which cost the same as text; `--out FOLDER` keeps the database.
`memory`: random weights of one shape. `same`: compare the kept units and the weights of two databases.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from removal import SHAPES, ours, output_error, plain, problem, wait
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from darwinlm.config.recipe import DatabaseRecipe
from darwinlm.database.build import build_database
from darwinlm.models.checkpoint import Checkpoint
from darwinlm.models.families import dense_config
from darwinlm.models.loading import DenseModel, load_dense
from darwinlm.models.sites import find_sites
from darwinlm.models.smollm2 import resolve
from darwinlm.runtime import dist
from darwinlm.runtime.memory import peak_memory_bytes
from darwinlm.runtime.progress import Phases

LEVELS = 10


def compare_solvers(shape: str, removals: int | None, seed: int, device: torch.device, repeats: int) -> None:
    rows, columns = SHAPES[shape]
    weight, gram = problem(rows, columns, seed, device)
    last = columns - removals if removals else 0
    sizes = sorted({max(1, last, round(columns - (columns - last) * i / LEVELS)) for i in range(1, LEVELS + 1)})[::-1]
    ours(weight[:, :256].clone(), gram[:256, :256].clone(), [128])  # the first call is slow
    best = min((ours(weight, gram, sizes) for _ in range(repeats)), key=lambda result: result.seconds)
    reference = plain(weight, gram, sizes)
    removed = f"{columns - min(sizes)} of {columns} columns removed, {len(sizes)} snapshots"
    print(f"d = {columns}, rows {rows}, {removed}, seed {seed}")
    ratio = reference.seconds / best.seconds
    print(f"plain {reference.seconds:.2f} s, ours {best.seconds:.2f} s: {ratio:.1f} times faster")
    same = differ = 0
    worst = 0.0
    for size in sizes:
        (kept, refitted), (kept_plain, refitted_plain) = best.snapshots[size], reference.snapshots[size]
        here = output_error(weight, gram, kept, refitted)
        there = output_error(weight, gram, kept_plain, refitted_plain)
        worst = max(worst, here / there - 1, key=abs)
        same += kept == kept_plain
        differ += len(set(kept) ^ set(kept_plain)) // 2
    print(f"kept columns identical at {same} of {len(sizes)} levels ({differ} columns differ in total)")
    print(f"true output error, ours against plain: at most {worst:+.4%} apart")


def time_stage(model: str, blocks: int, length: int, device: torch.device, seed: int, out: Path | None) -> None:
    dist.start()
    device = dist.local_device(device)
    dense = load_dense(resolve(model), "kv_group", device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, dense.config.vocab_size, (blocks, length), generator=generator)
    phases = Phases(lambda: wait(device))
    with tempfile.TemporaryDirectory() as folder:
        box = dist.gather(str(out) if out is not None else folder)
        start = time.perf_counter()
        database = build_database(dense, tokens, DatabaseRecipe(levels=LEVELS), Path(box[0]), phases)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in database.folder.iterdir())
        if dist.rank() == 0:
            print(f"{len(dense.sites)} sites, {blocks} x {length} tokens, {dist.world_size()} ranks: {seconds:.1f} s")
            print(", ".join(f"{name} {spent:.1f} s" for name, spent in phases.seconds.items()))
            print(f"on disk {size:,} bytes; peak memory {peak_memory_bytes() / 2**20:,.0f} MiB")
            if device.type == "cuda":
                print(f"peak device memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
        dist.stop()


def compare_databases(one: Path, other: Path) -> None:
    indices = [json.loads((folder / "index.json").read_text(encoding="utf-8"))["sites"] for folder in (one, other)]
    assert indices[0].keys() == indices[1].keys()
    kept = differ = compared = 0
    worst = 0.0
    for name in indices[0]:
        here, there = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        for units in (key for key in here if key.endswith(".kept")):
            weight = units.replace(".kept", ".output")
            kept += len(here[units])
            differ += len(set(here[units].tolist()) ^ set(there[units].tolist())) // 2
            if torch.equal(here[units], there[units]):
                compared += 1
                worst = max(worst, ((here[weight] - there[weight]).norm() / here[weight].norm()).item())
    print(f"{len(indices[0])} sites, {kept:,} kept units at all levels: {differ} of them differ")
    print(f"weights at the {compared} levels with the same units: relative difference at most {worst:.1e}")


def measure_memory(depths: list[int], seed: int) -> None:
    peaks = []
    for depth in depths:
        with tempfile.TemporaryDirectory() as folder:
            config = AutoConfig.for_model(
                "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=depth, num_attention_heads=16,
                num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=True, torch_dtype="bfloat16",
            )  # fmt: skip
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
                folder, max_shard_size="200MB"
            )
            script = "import sys; sys.path.insert(0, sys.argv[2]); import database; database.only_build(sys.argv[1])"
            run = [sys.executable, "-c", script, folder, str(Path(__file__).parent)]
            out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        peaks.append(int(out.split()[-1]))
        print(f"{depth} layers: peak memory {peaks[-1] / 2**20:,.0f} MiB", flush=True)
    print(f"the largest is {max(peaks) / min(peaks) - 1:.1%} above the smallest")


def only_build(folder: str) -> None:
    """Build a database of a random checkpoint without tokenizer, and print the peak memory of this process."""
    config = dense_config(AutoConfig.from_pretrained(folder))
    config._attn_implementation = "sdpa"
    dense = DenseModel(
        source=folder, checkpoint=Checkpoint(folder), config=config, sites=find_sites(config, "kv_group"),
        tokenizer=None, generation_config=None, device=torch.device("cpu"), dtype=torch.bfloat16, fingerprint="",
    )  # fmt: skip
    tokens = torch.randint(0, config.vocab_size, (16, 256))
    build_database(dense, tokens, DatabaseRecipe(levels=4), Path(folder) / "database")
    print(peak_memory_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    solver = commands.add_parser("solver", help="compare our solver with the plain method")
    solver.add_argument("--shape", choices=SHAPES, default="smollm2")
    solver.add_argument("--removals", type=int, help="stop both after this many columns")
    solver.add_argument("--repeats", type=int, default=3, help="runs of our solver; the fastest counts")
    stage = commands.add_parser("stage", help="time the whole stage on a model")
    stage.add_argument("model", nargs="?", default="smollm2")
    stage.add_argument("--blocks", type=int, default=32)
    stage.add_argument("--length", type=int, default=512)
    stage.add_argument("--out", type=Path, help="folder to keep the database in")
    memory = commands.add_parser("memory", help="measure peak memory for models of several depths")
    memory.add_argument("--depths", type=int, nargs="+", default=[4, 16, 48])
    same = commands.add_parser("same", help="compare two databases")
    same.add_argument("folders", type=Path, nargs=2)
    for command in (solver, stage, memory):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.command == "same":
        compare_databases(*arguments.folders)
        return
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"device": name, "machine": platform.machine(), "torch": torch.__version__}), flush=True)
    if arguments.command == "stage":
        if arguments.out is not None and arguments.out.exists():
            parser.error(f"{arguments.out} already exists: its contents would not be built")
        time_stage(arguments.model, arguments.blocks, arguments.length, device, arguments.seed, arguments.out)
        return
    if arguments.command == "memory":
        measure_memory(arguments.depths, arguments.seed)
        return
    with torch.no_grad():
        compare_solvers(arguments.shape, arguments.removals, arguments.seed, device, arguments.repeats)


if __name__ == "__main__":
    main()
