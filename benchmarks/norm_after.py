"""Compare pruning with and without a correction for the norm after attention and MLP.

    python benchmarks/norm_after.py --families olmo2 gemma3_text --seeds 0 1 2

Families with such norms are Gemma 2 and 3, OLMo 2 and 3, GLM-4 and EXAONE 4. A small model of the family is trained for
some seconds on this project's own documentation, byte by byte, and pruned to `--target` with two databases: `corrected`
weights an error in an output projection by the effect of the norm after it, as databases do; `plain` ignores the norm.
KL to the dense model is measured on held-out text, for uniform sizes, for the plan of least error, and for the plan of
a short descent; no recovery.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from darwinlm.config.recipe import DatabaseRecipe, SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.models.families import Family
from darwinlm.models.loading import DenseModel, load_dense
from darwinlm.plan import Plan, parameter_budget
from darwinlm.search.allocation import error_plan, sparing_plans, uniform_plan
from darwinlm.search.stage import descend

_LENGTH = 128
_SIZES = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 258, "bos_token_id": 256,
    "eos_token_id": 257, "tie_word_embeddings": True,
}  # fmt: skip


def read_blocks() -> Tensor:
    """Return the bytes of the documentation (blocks * tokens)."""
    root = Path(__file__).parents[1]
    text = b"\n".join(file.read_bytes() for file in sorted([*root.glob("*.md"), *root.glob("docs/*.md")]))
    return torch.tensor(list(text[: len(text) // _LENGTH * _LENGTH])).view(-1, _LENGTH)


def trained(family: str, blocks_BT: Tensor, steps: int, seed: int, folder: Path) -> DenseModel:
    """Train a model of the family on `blocks_BT`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        batch_BT = blocks_BT[torch.randint(len(blocks_BT), (16,))]
        loss = model(batch_BT, labels=batch_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{family}, seed {seed}: loss {loss.item():.3f} per byte after {steps} steps", flush=True)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return load_dense(str(folder), "kv_group", torch.device("cpu"))


@contextmanager
def error_of(kind: str) -> Iterator[None]:
    """Make databases correct for the norm, or ignore it."""
    right = Family.norm_after
    if kind == "plain":
        Family.norm_after = lambda self, kind: ""  # type: ignore[method-assign]
    try:
        yield
    finally:
        Family.norm_after = right  # type: ignore[method-assign]


def compare(family: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return KL by kind of error and of plan."""
    blocks_BT = read_blocks()
    order = torch.randperm(len(blocks_BT), generator=torch.Generator().manual_seed(seed))
    blocks_BT = blocks_BT[order]
    judged_BT, score_BT, blocks_BT = blocks_BT[:64], blocks_BT[64:128], blocks_BT[128:]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        dense = trained(family, blocks_BT, arguments.steps, seed, Path(scratch) / "dense")
        judge = DenseReference(dense.model, judged_BT)
        splits = {"calibration": blocks_BT[:256], "train": blocks_BT[256:320], "validation": score_BT}
        corpus = Corpus({split: Tokens.unmasked(ids_BT.int()) for split, ids_BT in splits.items()})
        for kind in ("corrected", "plain"):
            with error_of(kind):
                database = build_database(
                    dense, corpus.splits["calibration"].input_ids_BT, DatabaseRecipe(levels=9), Path(scratch) / kind
                )
            space = database.space(dense.sites)
            budget = parameter_budget(arguments.target, space)
            plans: dict[str, Plan | None] = {
                "uniform sizes": uniform_plan(space, budget),
                "least error": error_plan(space, budget),
            }
            recipe = SearchRecipe(descent_rounds=3, sensitivity_tokens=4096)
            starts = sparing_plans(space, budget)
            plans["descent"], _ = descend(
                dense, database, corpus, budget, recipe, starts, seed, Path(scratch) / f"{kind}.json"
            )
            for name, plan in plans.items():
                if plan is not None:
                    cuts = database.cuts(dense.sites, plan.levels, dense.device)
                    found[f"{kind}, {name}"] = judge.compare(
                        build_model(dense.config, dense.sites, dense.weights, cuts)
                    ).kl
    print(f"{family}, seed {seed}: " + "; ".join(f"{name} {kl:.4f}" for name, kl in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", default=["olmo2", "gemma3_text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    told = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps(told | vars(arguments)), flush=True)
    for family in arguments.families:
        rows = [compare(family, seed, arguments) for seed in arguments.seeds]
        for name in rows[0]:
            values = [row[name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{family}: {name}: KL {statistics.mean(values):.4f} ± {spread:.4f}", flush=True)


if __name__ == "__main__":
    main()
