"""Compare a pruned model in llama.cpp with transformers, and measure its speed.

    python benchmarks/export.py proof --evaluation FILE              SmolLM2 (the `demo` extra), cut by hand
    python benchmarks/export.py proof --evaluation FILE --run RUN    from the run's database, at the same size; some
                                                                     layers lose attention, MLP or both
    python benchmarks/export.py proof --evaluation FILE --model DIR  any pruned model
    python benchmarks/export.py speed --model DIR                    or --run RUN, or neither

`proof` exports to GGUF in every dtype that can be made here and runs each file in llama.cpp (`pip install gguf
xllamacpp`; K-quants need `llama-quantize` too). It prints the largest logit difference over the largest logit, and the
positions with the same most likely token, on the first block of the evaluation text; whether the token ids of a text
that is hard to tokenize are the same; and perplexity on all blocks, next to transformers in float32 and bfloat16. It
fails if the f32 file is not the same model. FILE may also be given as DARWINLM_DATA.

`speed` times prefill and decoding of the dense and the pruned model alternately with `llama-bench` (on the PATH), and
compares the median speedup with the ratio of FLOPs (prefill) and of bytes read (decoding).
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFReader

import darwinlm
from darwinlm.config.exports import installed
from darwinlm.database.store import Database
from darwinlm.engines.llama_cpp import PACKAGE, Engine, ask, threads
from darwinlm.export.gguf_tokenizer import load_tokenizer
from darwinlm.export.hf import export_hf
from darwinlm.export.proof import TEXT, compare, logits_of
from darwinlm.export.shapes import layer_shapes
from darwinlm.export.targets import DTYPES, export_model
from darwinlm.models.cutting import Cut, build_model
from darwinlm.models.loading import load_dense
from darwinlm.models.pruned import find_model
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import parameter_budget
from darwinlm.run.directory import RunDirectory
from darwinlm.runtime.files import read_json
from darwinlm.search.allocation import cheapest_plan

HEADS = {4: 0, 9: 0, 12: 2, 15: 1, 20: 2, 29: 0}
"""Kept KV heads by layer; three elsewhere."""
WIDTHS = {7: 0, 9: 0, 11: 512, 13: 1024, 21: 768, 26: 256}
"""Kept MLP channels by layer; 1280 of 1536 elsewhere."""
BLOCK = 512
"""Tokens per block."""


def dense_by_hand(folder: Path) -> Path:
    """Save unpruned SmolLM2 in the format of a pruned model."""
    dense = load_dense(resolve("smollm2"), "kv_group", torch.device("cpu"))
    export_hf(build_model(dense.config, dense.sites, dense.weights, {}), dense, {}, "", folder)
    return folder


def cut_by_hand(folder: Path) -> Path:
    """Save SmolLM2 with the first units of each site (`HEADS`, `WIDTHS`), not refitted and not useful."""
    dense = load_dense(resolve("smollm2"), "kv_group", torch.device("cpu"))
    cuts = {}
    for site in dense.sites:
        units = HEADS.get(site.layer, 3) if site.kind == "attention" else WIDTHS.get(site.layer, 1280)
        if units < site.num_units:
            columns = dense.weights[f"{site.output}.weight"][:, : units * site.columns_per_unit]
            cuts[site.name] = Cut(tuple(range(units)), columns.contiguous() if units else None)
    model = build_model(dense.config, dense.sites, dense.weights, cuts)
    export_hf(model, dense, {"heads": HEADS, "widths": WIDTHS}, "", folder)
    return folder


def cut_from(run: Path, folder: Path) -> Path:
    """Save the run's model pruned to the run's size by another plan, without training.

    By the database's output errors, the two cheapest attentions are removed, the two cheapest MLPs of other layers, and
    both sites of one layer; the first layer is excluded. The rest is the plan of least total error.
    """
    recipe = RunDirectory.recipe_of(run)
    dense = load_dense(resolve(recipe.model), recipe.database.granularity, torch.device("cpu"))
    database = Database(run / "database")
    space = database.space(dense.sites)
    gone: dict[str, set[int]] = {"attention": set(), "mlp": set()}
    for kind, others in (("attention", "mlp"), ("mlp", "attention")):
        sites = [site for site in space.sites if site.kind == kind and site.layer > 0]
        for site in sorted(sites, key=lambda site: site.errors[-1]):
            if len(gone[kind]) < 2 and site.layer not in gone[others]:
                gone[kind].add(site.layer)
    both = min(gone["attention"], key=lambda layer: space.sites[2 * layer + 1].errors[-1])
    gone["mlp"].add(both)

    def cost(site, level):
        removed = level == len(site.units) - 1
        return site.errors[level] if removed == (site.layer in gone[site.kind]) else math.inf

    size = read_json(run / "search" / "best_plan.json")["parameters"]
    plan = cheapest_plan(space, parameter_budget(size, space), cost)
    assert plan is not None
    print(f"without attention: layers {sorted(gone['attention'])}, without MLP: {sorted(gone['mlp'])}", flush=True)
    cuts = database.cuts(dense.sites, plan.levels, dense.device)
    model = build_model(dense.config, dense.sites, dense.weights, cuts)
    export_hf(model, dense, plan.to_dict(space), "", folder)
    return folder


def perplexity(logits_of_block: Callable[[list[int]], np.ndarray], blocks: list[list[int]]) -> float:
    losses = []
    for tokens in blocks:
        logits_TV = torch.from_numpy(logits_of_block(tokens)[:-1])
        losses.append(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(tokens[1:])).item())
    return math.exp(statistics.mean(losses))


def prove(source: Path, scratch: Path, arguments: argparse.Namespace) -> bool:
    """Return whether the f32 file is the same model."""
    folder = find_model(source)
    tokenizer, model = load_tokenizer(folder), darwinlm.load(folder, dtype=torch.float32)
    text = Path(arguments.evaluation).read_text(encoding="utf-8")[: 40 * arguments.tokens]
    tokens = tokenizer(text).input_ids[: arguments.tokens]
    blocks = [tokens[start : start + BLOCK] for start in range(0, len(tokens), BLOCK)]
    expected_TV = logits_of(model, blocks[0])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(tokens)} tokens in blocks of {BLOCK}")
    print(f"transformers float32: perplexity {perplexity(partial(logits_of, model), blocks):.4f}", flush=True)
    model.to(torch.bfloat16)
    print(f"transformers bfloat16: perplexity {perplexity(partial(logits_of, model), blocks):.4f}", flush=True)
    same_model = True
    for dtype in arguments.dtypes:
        try:
            exported = export_model(folder, "gguf", scratch / f"{dtype}.gguf", dtype)
        except darwinlm.UserError as error:
            print(f"{dtype}: {error}", flush=True)
            continue
        answer = ask(exported.path, blocks[0], [TEXT])
        proof = compare(expected_TV, answer.logits_TV, installed(PACKAGE) or "")
        if dtype == "f32":
            same_model = proof.difference < 1e-3 and proof.agreeing >= 0.999 * proof.positions
        engine = Engine(exported.path)
        found = perplexity(engine.logits, blocks)
        engine.close()
        same_ids = "the same" if answer.token_ids[0] == tokenizer(TEXT).input_ids else "different"
        print(
            f"{dtype}: {exported.path.stat().st_size / 1e6:.1f} MB ({_kinds(exported.path)}), {proof}, perplexity "
            f"{found:.4f}; {same_ids} token ids of the hard text",
            flush=True,
        )
        exported.path.unlink()
    return same_model


def _kinds(file: Path) -> str:
    """Return the shares of weights by storage type."""
    sizes: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    total = sum(sizes.values())
    return ", ".join(f"{100 * size / total:.0f}% {kind}" for kind, size in sizes.items() if size > total / 200)


def speed(source: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    program = shutil.which("llama-bench")
    if program is None:
        sys.exit("llama-bench is not on the PATH")
    folders = {"dense": dense_by_hand(scratch / "dense"), "pruned": find_model(source)}
    for dtype in arguments.dtypes:
        files = {
            name: export_model(folder, "gguf", scratch / f"{name}-{dtype}.gguf", dtype).path
            for name, folder in folders.items()
        }
        ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
        speeds: dict[str, list[float]] = {f"{name} {test}": [] for name in files for test in ratios}
        for turn in range(arguments.turns + 1):
            # The order alternates, so that a machine that slows down favors neither.
            for name in list(files) if turn % 2 else reversed(list(files)):
                found = _bench(program, files[name], arguments)
                if turn > 0:
                    for test, rate in found.items():
                        speeds[f"{name} {test}"].append(rate)
        for test, ratio in ratios.items():
            pairs = zip(speeds[f"pruned {test}"], speeds[f"dense {test}"], strict=True)
            ratio += [pruned / dense for pruned, dense in pairs]
        ideal = {
            "prefill": _flops(files["dense"], folders["dense"], arguments.prompt)
            / _flops(files["pruned"], folders["pruned"], arguments.prompt),
            "decode": _bytes_read(files["dense"], folders["dense"], arguments.new)
            / _bytes_read(files["pruned"], folders["pruned"], arguments.new),
        }
        for test, ratio in ratios.items():
            dense, pruned = (statistics.median(speeds[f"{name} {test}"]) for name in ("dense", "pruned"))
            what = "FLOPs" if test == "prefill" else "bytes read"
            print(
                f"{dtype} {test}: dense {dense:.1f}, pruned {pruned:.1f} tokens/s; ratio "
                f"{statistics.median(ratio):.2f}, {min(ratio):.2f} to {max(ratio):.2f} in {len(ratio)} turns; "
                f"ratio of {what} {ideal[test]:.2f}",
                flush=True,
            )
        for file in files.values():
            file.unlink()


def _bench(program: str, file: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second of prefill, and of decoding from an empty context."""
    sizes = ["-p", str(arguments.prompt), "-n", str(arguments.new), "-t", str(threads()), "-r", "1", "-o", "json"]
    done = subprocess.run([program, "-m", str(file), *sizes], capture_output=True, check=True)
    return {"decode" if test["n_gen"] else "prefill": test["avg_ts"] for test in json.loads(done.stdout)}


def _flops(file: Path, folder: Path, tokens: int) -> int:
    """Return the FLOPs of a prompt: two per layer weight and token, attention, and the head for the last token."""
    layers = [t for t in GGUFReader(file).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    config = darwinlm.load(folder).config
    heads = sum(shape.heads for shape in layer_shapes(config))
    pairs = tokens * (tokens + 1) // 2
    head = 2 * config.vocab_size * config.hidden_size
    return 2 * tokens * sum(int(t.n_elements) for t in layers) + 4 * config.head_dim * heads * pairs + head


def _bytes_read(file: Path, folder: Path, tokens: int) -> int:
    """Return the bytes read per token: all weights (a tied head once), and half of the KV cache of `tokens` in
    float16."""
    reader, config = GGUFReader(file), darwinlm.load(folder).config
    untied = any(tensor.name == "output.weight" for tensor in reader.tensors)
    weights = sum(int(t.n_bytes) for t in reader.tensors if not (untied and t.name == "token_embd.weight"))
    kv_heads = sum(shape.kv_heads for shape in layer_shapes(config))
    return weights + 2 * 2 * config.head_dim * kv_heads * tokens // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    proof, timing = commands.add_parser("proof"), commands.add_parser("speed")
    for command in (proof, timing):
        which = command.add_mutually_exclusive_group()
        which.add_argument("--model", type=Path, help="run directory or folder of a pruned model")
        which.add_argument("--run", type=Path, help="run directory; another plan is cut from its database")
    proof.add_argument("--evaluation", default=os.environ.get("DARWINLM_DATA"), help="text file for evaluation")
    proof.add_argument("--tokens", type=int, default=16 * BLOCK)
    proof.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    timing.add_argument("--dtypes", nargs="+", default=["q8_0"], choices=list(DTYPES))
    timing.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    timing.add_argument("--new", type=int, default=64, help="generated tokens")
    timing.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.command == "proof" and arguments.evaluation is None:
        parser.error("give --evaluation FILE, or set DARWINLM_DATA")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    facts = {"machine": platform.machine(), "threads": threads(), "torch": torch.__version__}
    print(json.dumps(facts | {"engine": installed(PACKAGE)}), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if arguments.run is not None:
            source = cut_from(arguments.run, place / "model")
        else:
            source = arguments.model or cut_by_hand(place / "model")
        if arguments.command == "speed":
            speed(source, place, arguments)
        elif not prove(source, place, arguments):
            sys.exit("the f32 file is not the same model")


if __name__ == "__main__":
    main()
