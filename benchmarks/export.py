"""What a pruned model computes in other engines, beside transformers.

    python benchmarks/export.py --evaluation FILE                    SmolLM2 (the `demo` extra), cut by hand
    python benchmarks/export.py --evaluation FILE --model RUN        any pruned model

Exports to GGUF in every dtype and runs each file in llama.cpp (`pip install gguf xllamacpp`) on the first tokens of the
evaluation text, all positions of each block: the largest logit difference over the largest logit, positions with the
same most likely token, perplexity; and the ids of a nasty text. FILE may also be given as DARWINLM_DATA.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch

import darwinlm
from darwinlm.adapters.cutting import Cut, build_model
from darwinlm.adapters.loading import load_dense
from darwinlm.demo import resolve
from darwinlm.export.gguf import FILE_TYPES
from darwinlm.export.gguf_tokenizer import load_tokenizer
from darwinlm.export.hf import export_hf, find_model
from darwinlm.export.llama_cpp import ask, engine_version
from darwinlm.export.proof import TEXT, compare, logits_of
from darwinlm.export.targets import export_model

HEADS = {4: 0, 9: 0, 12: 2, 15: 1, 20: 2, 29: 0}
"""KV heads left, by layer; of three elsewhere."""
WIDTHS = {7: 0, 9: 0, 11: 512, 13: 1024, 21: 768, 26: 256}
"""MLP channels left, by layer; 1280 of 1536 elsewhere."""


def cut_by_hand(folder: Path) -> Path:
    """SmolLM2 with the first units of each site, so many as above: nothing is refitted, and it makes no sense."""
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


def perplexity(logits_TV: np.ndarray, tokens: list[int]) -> float:
    losses = torch.nn.functional.cross_entropy(torch.from_numpy(logits_TV[:-1]), torch.tensor(tokens[1:]))
    return float(losses.exp())


def measure(source: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    folder = find_model(source)
    tokenizer, model = load_tokenizer(folder), darwinlm.load(folder, dtype=torch.float32)
    tokens = tokenizer(Path(arguments.evaluation).read_text(encoding="utf-8")[: 40 * arguments.tokens]).input_ids
    tokens = tokens[: arguments.tokens]
    expected_TV = logits_of(model, tokens)
    print(f"transformers float32: perplexity {perplexity(expected_TV, tokens):.4f} on {len(tokens)} tokens")
    for dtype in arguments.dtypes:
        exported = export_model(folder, "gguf", scratch / f"{dtype}.gguf", dtype)
        answer = ask(exported.path, tokens, [TEXT])
        proof = compare(expected_TV, answer.logits_TV, engine_version() or "")
        size = exported.path.stat().st_size
        same = "the same" if answer.token_ids[0] == tokenizer(TEXT).input_ids else "other"
        print(
            f"{dtype}: {size / 1e6:.1f} MB, {proof}, perplexity {perplexity(answer.logits_TV, tokens):.4f}; {same} ids "
            f"of the nasty text ({len(answer.token_ids[0])} tokens)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a run or a pruned model's folder; without it, SmolLM2 cut by hand")
    parser.add_argument("--evaluation", default=os.environ.get("DARWINLM_DATA"), help="a text file")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", default=list(FILE_TYPES), choices=list(FILE_TYPES))
    arguments = parser.parse_args()
    if arguments.evaluation is None:
        parser.error("give --evaluation FILE, or set DARWINLM_DATA")
    facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(facts | {"engine": engine_version()}), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments.model or cut_by_hand(Path(scratch) / "model"), Path(scratch), arguments)


if __name__ == "__main__":
    main()
