"""Compare expert pruning criteria for mixture-of-experts models at equal parameters, before and after recovery.

    python benchmarks/experts.py --family qwen3_moe --targets 0.75 0.6 --seeds 0 1 2

A small mixture (16 experts in each of 4 layers, 2 per token) is trained for some minutes on this project's own files,
byte by byte, English and Python, and the specialization of its experts is printed. Then the same number of experts is
removed from every layer, attention is kept, and KL to the dense model is measured on held-out text:

- `random`;
- `frequency`: remove the experts that get the fewest tokens;
- `REAP`: remove those with the smallest mean gated norm over their tokens (arXiv 2510.13999);
- `REAP, refitted`: the same, with the other experts refitted as ours are;
- `ours, no refit`: remove one at a time, always the one that changes the layer's output least when its tokens are
  rerouted;
- `ours`: the same, with the other experts refitted;
- `channels, magnitude`: keep all experts, and remove the channels with the smallest product of norms of their three
  rows;
- `channels, ours`: remove the channels that the second-order method chooses in each expert, and refit the others;
- `ours, searched`: numbers of experts per layer, and of heads, from a short descent on ours, within the same budget.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from darwinlm.config.recipe import DatabaseRecipe, RecoveryRecipe, SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.database.expert_channels import prune_expert_channels
from darwinlm.database.experts import Routed, refit_experts, removal_order
from darwinlm.database.grams import ExpertStatistics, walk_blocks
from darwinlm.database.store import Database
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import Cut, build_model, output_columns
from darwinlm.models.experts import Experts
from darwinlm.models.loading import DenseModel, load_dense
from darwinlm.models.sites import sites_needed
from darwinlm.plan import Budget, parameter_budget
from darwinlm.recovery.training import recover
from darwinlm.search.allocation import sparing_plans
from darwinlm.search.stage import descend

_LENGTH, _DAMPING = 128, 0.01
_SIZES = {
    "vocab_size": 259, "hidden_size": 96, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 512,
    "num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257, "tie_word_embeddings": True,
    "output_router_logits": True, "router_aux_loss_coef": 0.1,
}  # fmt: skip
METHODS = (
    *("random", "frequency", "REAP", "REAP, refitted", "ours, no refit", "ours"),
    *("channels, magnitude", "channels, ours", "ours, searched"),
)


def read_blocks() -> tuple[Tensor, Tensor]:
    """Return the bytes of this project (blocks * tokens), and whether each block is Python (else it is English)."""
    root, blocks, kinds = Path(__file__).parents[1], [], []
    for python, patterns in ((False, ("*.md", "docs/*.md")), (True, ("src/**/*.py", "tests/**/*.py"))):
        text = b"\n".join(file.read_bytes() for pattern in patterns for file in sorted(root.glob(pattern)))
        part_BT = torch.tensor(list(text[: len(text) // _LENGTH * _LENGTH])).view(-1, _LENGTH)
        blocks.append(part_BT)
        kinds.append(torch.full((len(part_BT),), python))
    return torch.cat(blocks), torch.cat(kinds)


def trained(family: str, blocks_BT: Tensor, steps: int, seed: int, folder: Path) -> DenseModel:
    """Train a mixture of the family on `blocks_BT`, with the family's own load-balancing loss."""
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
    print(f"seed {seed}: {model.num_parameters():,} parameters, loss {loss.item():.3f} per byte", flush=True)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return load_dense(str(folder), "kv_group", torch.device("cpu"))


@torch.no_grad()
def show_specialization(
    dense: DenseModel, walked: dict[str, ExpertStatistics], blocks_BT: Tensor, python_B: Tensor, seed: int
) -> None:
    """Print for each layer: tokens per expert, the share of Python in them, mutual information of expert and byte."""
    python_N = python_B.repeat_interleave(blocks_BT.shape[1])
    for site in dense.sites:
        if not site.routed:
            continue
        experts, statistics_of = Experts.of(dense.config, site, dense.weights), walked[site.name]
        goes_NE = experts.gates(experts.logits(statistics_of.inputs_ND)) > 0
        share_E = goes_NE.float().mean(0) / site.routed
        of_python_E = (goes_NE & python_N[:, None]).float().sum(0) / goes_NE.float().sum(0).clamp_min(1)
        bytes_N = blocks_BT.flatten()
        joint_EV = torch.stack([torch.bincount(bytes_N[goes_NE[:, e]], minlength=256) for e in range(len(share_E))])
        joint_EV = joint_EV.double() / joint_EV.sum()
        apart = joint_EV.sum(1, keepdim=True) * joint_EV.sum(0, keepdim=True)
        told = float(torch.special.xlogy(joint_EV, joint_EV / apart.clamp_min(1e-30)).sum() / torch.tensor(2.0).log())
        print(
            f"seed {seed}: {site.name}: experts get {share_E.min():.1%} to {share_E.max():.1%} of the tokens; of these "
            f"{of_python_E.min():.0%} to {of_python_E.max():.0%} are Python ({python_N.float().mean():.0%} of all); "
            f"mutual information of expert and byte: {told:.2f} bits",
            flush=True,
        )


@torch.no_grad()
def cuts_of(
    method: str, dense: DenseModel, walked: dict[str, ExpertStatistics], count: int, seed: int
) -> dict[str, Cut]:
    """Return the cuts of `method` that keep `count` experts in every layer."""
    found = {}
    generator = torch.Generator().manual_seed(seed)
    for site in dense.sites:
        if not site.routed:
            continue
        experts, known = Experts.of(dense.config, site, dense.weights), walked[site.name]
        x_ND, weights_N = known.inputs_ND, 1 / known.norms_N
        logits_NE = experts.logits(x_ND)
        gates_NE = experts.gates(logits_NE)
        if method == "random":
            score_E = torch.rand(site.num_units, generator=generator)
        elif method == "frequency":
            score_E = (gates_NE > 0).float().sum(0)
        elif method.startswith("REAP"):
            norms_NE = torch.stack([experts.output(e, x_ND).norm(dim=1) for e in range(site.num_units)], 1)
            score_E = (gates_NE * norms_NE).sum(0) / (gates_NE > 0).sum(0).clamp_min(1)
        else:
            order = removal_order(experts, x_ND, logits_NE, weights_N, site.num_units - count)
            score_E = torch.tensor([float(e not in order) for e in range(site.num_units)])
        kept = tuple(sorted(score_E.topk(count).indices.tolist()))
        weight = output_columns(site, experts.down_EDI, kept)
        if method in ("REAP, refitted", "ours"):
            routed = Routed.of(experts, known, site.name)
            weight, _ = refit_experts(experts.some(kept), routed, logits_NE[:, list(kept)], _DAMPING)
        found[site.name] = Cut(kept, experts.as_stored(weight))
    return found


@torch.no_grad()
def channel_cuts(method: str, dense: DenseModel, walked: dict[str, ExpertStatistics], width: int) -> dict[str, Cut]:
    """Return the cuts that keep all experts of every layer, with `width` channels each."""
    found = {}
    for site in dense.sites:
        if not site.experts:
            continue
        experts = Experts.of(dense.config, site, dense.weights)
        if method.endswith("magnitude"):
            gate_EI, up_EI = experts.gate_up_EJD.norm(dim=2).chunk(2, dim=1)
            score_EI = gate_EI * up_EI * experts.down_EDI.norm(dim=1)
            channels_EK = score_EI.topk(width, dim=1).indices.sort(dim=1).values
            weight_EDK = experts.narrowed(channels_EK).down_EDI
        else:
            (one,), _ = prune_expert_channels(
                experts, walked[site.name], sizes=(width,), damping=_DAMPING, name=site.name
            )
            assert one.channels_EK is not None
            channels_EK, weight_EDK = one.channels_EK, one.weight_OK
        found[site.name] = Cut(tuple(range(width)), experts.as_stored(weight_EDK), channels=channels_EK)
    return found


def searched_cuts(
    dense: DenseModel, corpus: Corpus, parameters: int, seed: int, scratch: Path
) -> tuple[dict[str, Cut], Sequence[int]]:
    """Return the cuts found by a short descent within `parameters`, and the number of units at each site."""
    folder = scratch / "database"
    if not (folder / "index.json").exists():
        build_database(dense, corpus.splits["calibration"].input_ids_BT, DatabaseRecipe(levels=8), folder)
    database = Database(folder, kept=sites_needed(dense.config, dense.sites))
    space = database.space(dense.sites)
    budget = parameter_budget(parameters / dense.parameters, space)
    # Sizes are coarse in such a small model: allow plans below the budget.
    budget = Budget(limits=tuple(replace(limit, minimum=0) for limit in budget.limits))
    recipe = SearchRecipe(descent_rounds=3, sensitivity_tokens=4096)
    starts = sparing_plans(space, budget)
    plan, _ = descend(dense, database, corpus, budget, recipe, starts, seed, scratch / f"descent-{parameters}.json")
    units = [site.units[level] for site, level in zip(space.sites, plan.levels, strict=True)]
    return database.cuts(dense.sites, plan.levels, dense.device), units


def compare(seed: int, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return KL by method and target, before and after recovery."""
    blocks_BT, python_B = read_blocks()
    order = torch.randperm(len(blocks_BT), generator=torch.Generator().manual_seed(seed))
    blocks_BT, python_B = blocks_BT[order], python_B[order]
    judged_BT, score_BT, blocks_BT, python_B = blocks_BT[:96], blocks_BT[96:160], blocks_BT[160:], python_B[160:]
    text_BT = blocks_BT[:256]
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        dense = trained(arguments.family, blocks_BT, arguments.steps, seed, place / "dense")
        narrow = load_dense(str(place / "dense"), "kv_group", dense.device, expert_unit="channels")
        judge = DenseReference(dense.model, judged_BT)
        splits = {"calibration": text_BT, "train": blocks_BT[256:1024], "validation": score_BT}
        corpus = Corpus({split: Tokens.unmasked(ids_BT.int()) for split, ids_BT in splits.items()})
        walk = walk_blocks(dense, corpus.splits["calibration"].input_ids_BT, batch_size=16, scratch=place)
        walked = {site.name: known for site, known in walk if isinstance(known, ExpertStatistics)}
        show_specialization(dense, walked, text_BT, python_B[:256], seed)
        for target in arguments.targets:
            mixtures = [site for site in dense.sites if site.routed]
            one = sum(dense.shapes[f"{site.output}"][1] * 3 * site.columns_per_unit for site in mixtures)
            one += len(mixtures) * dense.config.hidden_size
            count = mixtures[0].num_units - round((1 - target) * dense.parameters / one)
            cuts: dict[str, Cut] = {}
            for method in METHODS:
                if method == "ours, searched":
                    size = dense.parameters - (mixtures[0].num_units - count) * one
                    cuts, units = searched_cuts(dense, corpus, size, seed, place)
                    print(f"seed {seed}, {target}: {method}: units {units}", flush=True)
                elif method.startswith("channels"):
                    # The same number of parameters, rounded to one channel of every expert.
                    width = mixtures[0].columns_per_unit
                    channel = 3 * dense.config.hidden_size * mixtures[0].num_units
                    gone = (mixtures[0].num_units - count) * one / len(mixtures)
                    cuts = channel_cuts(method, narrow, walked, width - round(gone / channel))
                else:
                    cuts = cuts_of(method, dense, walked, count, seed)
                sites = (narrow if method.startswith("channels") else dense).sites
                model = build_model(dense.config, sites, dense.weights, cuts, trainable=True)
                parameters, before = model.num_parameters(), judge.compare(model).kl
                with tempfile.TemporaryDirectory() as folder:
                    model, _ = recover(
                        model, dense.model, corpus.splits["train"], corpus.splits["validation"],
                        RecoveryRecipe(tokens=arguments.recovery_tokens), seed=seed, folder=Path(folder),
                        device=dense.device,
                    )  # fmt: skip
                after = judge.compare(model).kl
                found[f"{target}: {method}"] = before, after
                print(
                    f"seed {seed}, {target}: {method}: {parameters / dense.parameters:.3f} of the parameters, KL "
                    f"{before:.4f}, recovered {after:.4f}",
                    flush=True,
                )
    return found


def main() -> None:
    """Compare the methods and print means over seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--recovery-tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    told = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps(told | vars(arguments)), flush=True)
    rows = [compare(seed, arguments) for seed in arguments.seeds]
    for name in rows[0]:
        shown = []
        for values in zip(*(row[name] for row in rows), strict=True):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        print(f"{name}: KL {shown[0]}, recovered {shown[1]}", flush=True)


if __name__ == "__main__":
    main()
