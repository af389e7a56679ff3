"""Train and evaluate the rows of `data_efficiency.py`, one per pruned model, with intermediate results saved."""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import flap
import learnt_masks
import slicegpt
import torch
import torch_pruner
from calibrated import Calibrated
from compare import best, judge_blocks, ours
from curve_training import DenseStates, Settings, Trainee, autocast
from efficiency_report import GRID, read_rows, write_plots, write_table
from even_widths import by_activations
from forms import facts_of, revive, tensors_of
from safetensors.torch import load_file, save_file
from second_order import by_second_order
from torch import Tensor
from whole_layers import by_influence

from darwinlm.config.loading import load_recipe
from darwinlm.config.recipe import Recipe
from darwinlm.data.corpus import Corpus, load_corpus, read_corpus, save_corpus
from darwinlm.evaluation.measure import parameters_of
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.heads import Head
from darwinlm.models.loading import fast_dtype, load_dense
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.smollm2 import resolve
from darwinlm.runtime.files import find_fault, new_folder, read_json, write_checksums, write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_SHAPE_TOKENS = 1_024
"""Tokens of the validation split that a peer's shape is chosen on."""
_TEXT_TOKENS = 1_048_576
"""Tokens of training text; longer training reads some of it twice."""
NAMES = {
    "ours": "ours",
    "even": "even widths, our solver",
    "masks": "learnt masks",
    "taylor": "Torch-Pruning, Taylor",
    "layers": "whole layers",
    "flap": "FLAP",
    "slicegpt": "SliceGPT",
    "wanda": "even widths, activations x weights",
}
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """Model, method, size and seed of a file of results."""

    model: str
    method: str
    target: float
    seed: int
    rate_factor: float = 1.0
    """Plots and tables only have rows with 1."""

    @property
    def name(self) -> str:
        """Name of its files."""
        rate = "" if self.rate_factor == 1 else f"-rate{self.rate_factor:g}"
        return f"{self.label}-{self.target:g}-{self.method}-s{self.seed}{rate}"

    @property
    def label(self) -> str:
        """Name of the model, without its path."""
        return Path(self.model).name


@dataclass(frozen=True)
class Options:
    """Options of all rows."""

    data: str
    evaluation: str
    work: Path
    results: Path
    tokens: int
    mask_tokens: int = 32_768
    judge_tokens: int = 8_192
    first: int = 8_192
    """Tokens of the first measurement after training begins; each next one is at twice as many."""
    changes: Mapping[str, Any] | None = None
    """Changes to the recipe `quick`."""
    training: Settings = field(default_factory=Settings)
    masks: learnt_masks.MaskSettings = field(default_factory=learnt_masks.MaskSettings)


class Setting:
    """Text, statistics and references of a model and a seed, created on first use and shared by all methods."""

    def __init__(self, model: str, seed: int, options: Options) -> None:
        self.model, self.seed, self.options = model, seed, options
        self.dense = load_dense(resolve(model), "kv_group", torch.device("cpu"))
        self.folder = options.work / f"{Path(model).name}-s{seed}"
        changes = {"data.train_tokens": _TEXT_TOKENS, **(options.changes or {})}
        known = {"model": model, "target": 0.5, "data.source": options.data, "seed": seed}
        self.recipe: Recipe = load_recipe("quick", known | changes)

    @cached_property
    def corpus(self) -> Corpus:
        """Text of all methods."""
        file = self.folder / "text.safetensors"
        if not file.exists():
            save_corpus(read_corpus(self.recipe.data, self.dense.tokenizer, self.seed), file)
        return load_corpus(file)

    @cached_property
    def calibrated(self) -> Calibrated:
        """Calibration statistics for the peers."""
        return Calibrated(self.dense, self.corpus.splits["calibration"].input_ids_BT)

    @cached_property
    def score(self) -> DenseReference:
        """Reference that shapes are chosen on."""
        return DenseReference(self.dense.model, self.corpus.splits["validation"].first(_SHAPE_TOKENS).input_ids_BT)

    @cached_property
    def states(self) -> DenseStates:
        """Hidden states of the dense model on the training text."""
        return DenseStates(self.dense, self.corpus.splits["train"].input_ids_BT, self.folder / "dense-states")

    @cached_property
    def judges(self) -> dict[str, DenseReference]:
        """References of the evaluation file and of the test split."""
        length = self.recipe.data.sequence_length
        file = judge_blocks(self.dense, self.options.evaluation, self.options.judge_tokens, length)
        held_out = self.corpus.splits["test"].first(self.options.judge_tokens).input_ids_BT
        texts = {"wikitext": file, "held_out": held_out}
        return {name: DenseReference(self.dense.model, blocks_BT) for name, blocks_BT in texts.items()}

    def measure(self, model: PrunedModel) -> dict[str, float | None]:
        """Return KL and perplexity of `model` on both texts; perplexity is None if it is infinite.

        Layers compute in the dtype of training, the head and the dense model in float32.
        """
        found: dict[str, float | None] = {}
        for name, judge in self.judges.items():
            fidelity = judge.compare_hidden((_hidden(model, ids_BT) for ids_BT in judge.batches()), Head.of(model))
            found[f"kl_{name}"] = fidelity.kl
            found[f"ppl_{name}"] = fidelity.perplexity if math.isfinite(fidelity.perplexity) else None
        return found


@torch.no_grad()
def _hidden(model: PrunedModel, ids_BT: Tensor) -> Tensor:
    with autocast(model.device):
        hidden_BTD: Tensor = model.model(ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD.float()


@dataclass(frozen=True)
class Start:
    """Model of the target size, before recovery."""

    shape: str
    model: PrunedModel
    text: Mapping[str, int]
    """Tokens read, by purpose; `masks` are those trained on."""


Maker = Callable[[Setting, int, float], Start]


def _peer(propose: Callable[[Calibrated, int], Any], *, choice: bool = True) -> Maker:
    """Create a method that proposes models of a size from calibration text and takes the best on the validation split;
    without `choice`, the first."""

    def make(setting: Setting, parameters: int, target: float) -> Start:
        candidates = propose(setting.calibrated, parameters)
        if choice:
            # Torch-Pruning silently leaves some shapes larger than requested.
            candidates = (one for one in candidates if parameters_of(one[1]) <= parameters)
        shape, model = best(candidates, setting.score) if choice else next(candidates)
        text = {"calibration": setting.calibrated.blocks_BT.numel()}
        return Start(shape, model, text | ({"selection": _SHAPE_TOKENS} if choice else {}))

    return make


def _ours(setting: Setting, parameters: int, target: float) -> Start:
    shape, model = ours(setting.dense, setting.corpus, setting.recipe, target, setting.folder)
    search, data = setting.recipe.search, setting.recipe.data
    sensitivities = search.descent_rounds * search.sensitivity_tokens
    splits = setting.corpus.splits
    text = {
        "calibration": splits["calibration"].input_ids_BT.numel(),
        "selection": splits["validation"].input_ids_BT.numel(),
        # Both read the training text from its beginning.
        "search": max(sensitivities, *search.trial_tokens) if data.train_tokens else 0,
    }
    return Start(shape, model, text)


def _masks(setting: Setting, parameters: int, target: float) -> Start:
    options, length = setting.options, setting.recipe.data.sequence_length
    blocks = options.mask_tokens // length
    model = learnt_masks.learn(
        setting.dense, setting.states, parameters, blocks, options.training, options.masks, setting.seed,
        lambda line: print(line, flush=True),
    )  # fmt: skip
    sizes = [layer.mlp.down_proj.in_features if hasattr(layer.mlp, "down_proj") else 0 for layer in model.model.layers]
    return Start(f"channels {min(sizes)} to {max(sizes)}", model, {"masks": blocks * length})


METHODS: dict[str, Maker] = {
    "ours": _ours,
    "even": _peer(by_second_order),
    "masks": _masks,
    "taylor": _peer(torch_pruner.by_taylor),
    "layers": _peer(by_influence, choice=False),
    "flap": _peer(flap.by_fluctuation, choice=False),
    "slicegpt": _peer(slicegpt.by_rotation, choice=False),
    "wanda": _peer(by_activations),
}
REIMPLEMENTED = {
    "masks": "LLM-Shearing, from the paper",
    "flap": "FLAP, from the paper",
    "slicegpt": "SliceGPT, from the paper",
    "layers": "ShortGPT, from the paper",
}


def hardware() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {names[0] if names else platform.processor()}"


def surroundings() -> dict[str, Any]:
    """Return versions, hardware and threads."""
    packages = ("torch", "transformers", "torch-pruning")
    return {
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }


def grid(first: int, begin: int, last: int) -> list[int]:
    """Return the training tokens to measure at: the start of recovery, powers of two times `first` after it, and the
    last."""
    between, at = [], first
    while at < last:
        between += [at] if at > begin else []
        at *= 2
    return [begin, *between, *([last] if last > begin else [])]


def _starting_model(setting: Setting, row: Row, place: Path) -> tuple[PrunedModel, dict[str, Any]]:
    """Return the pruned model before recovery, trainable, and its facts: made once, then read from `place`."""
    if not place.exists() or find_fault(place) is not None:
        begun, cpu = time.perf_counter(), time.process_time()
        parameters = int(setting.dense.parameters * row.target)
        start = METHODS[row.method](setting, parameters, row.target)
        facts = {
            "shape": start.shape,
            "parameters": parameters_of(start.model),
            "share": parameters_of(start.model) / setting.dense.parameters,
            "text": dict(start.text),
            "pruning_seconds": round(time.perf_counter() - begun),
            # Wall-clock time means little on a shared machine. Both exclude the work of an interrupted call.
            "pruning_cpu_seconds": round(time.process_time() - cpu),
        }
        with new_folder(place) as draft:
            tensors = {name: tensor.float().contiguous().clone() for name, tensor in tensors_of(start.model).items()}
            save_file(tensors, draft / "weights.safetensors")
            (draft / "facts.json").write_text(json.dumps({"row": facts, "form": facts_of(start.model)}))
            write_checksums(draft)
    known = json.loads((place / "facts.json").read_text())
    tensors = load_file(place / "weights.safetensors")
    return revive(setting.dense, known["form"], tensors, trainable=True), known["row"]


def run_row(
    row: Row,
    options: Options,
    settings: dict[tuple[str, int], Setting],
    after_step: Callable[[float], None] = lambda loss: None,
) -> dict[str, Any]:
    """Train and evaluate a row up to `options.tokens`; `settings` caches what other rows need too."""
    file = options.results / f"{row.name}.json"
    settled = options.training.facts() | {"judge_tokens": options.judge_tokens, "recipe": dict(options.changes or {})}
    if row.method == "masks":
        settled["masks"] = options.masks.facts() | {"tokens": options.mask_tokens}
    asked: dict[str, Any] = {"model": row.label, "method": row.method, "target": row.target, "seed": row.seed}
    asked["settings"] = settled
    found: dict[str, Any] = read_json(file) if file.exists() else {"points": [], "training_seconds": 0.0}
    for key in asked.keys() & found.keys():
        if found[key] != asked[key]:
            raise SystemExit(f"{file} was made with other {key}: {found[key]}; move it away to start again")
    if found["points"] and found["points"][-1]["tokens"] >= options.tokens:
        print(f"{row.name}: done", flush=True)
        return found
    if (row.model, row.seed) not in settings:
        settings[row.model, row.seed] = Setting(row.model, row.seed, options)
    setting, place = settings[row.model, row.seed], options.work / row.name
    print(f"{row.name}: {NAMES[row.method]}", flush=True)
    model, facts = _starting_model(setting, row, place / "start")
    length = setting.recipe.data.sequence_length
    passed = facts["text"].get("masks", 0) // length
    trainee = Trainee(model, setting.states, options.training, place, passed)
    found |= asked | facts | surroundings() | {"name": NAMES[row.method], "sequence_length": length}
    found["own_code"] = row.method not in REIMPLEMENTED and row.method != "taylor"
    found |= {"reimplemented": REIMPLEMENTED[row.method]} if row.method in REIMPLEMENTED else {}
    measured = {point["tokens"] for point in found["points"]}
    for tokens in grid(options.first, passed * length, options.tokens):
        begun, cpu = time.perf_counter(), time.process_time()
        trainee.train(-(-(tokens - passed * length) // length), after_step)
        found["training_seconds"] += time.perf_counter() - begun
        found["training_cpu_seconds"] = found.get("training_cpu_seconds", 0.0) + time.process_time() - cpu
        if tokens in measured:
            continue
        point = {"tokens": tokens, "recovery_tokens": tokens - passed * length, **setting.measure(trainee.model)}
        found["points"] = sorted([*found["points"], point], key=lambda one: one["tokens"])
        halves = {name: tensor.bfloat16().contiguous().clone() for name, tensor in tensors_of(trainee.model).items()}
        with new_folder(place / f"weights-{tokens}") as draft:
            save_file(halves, draft / "weights.safetensors")
        write_json(file, found)
        print(f"  {json.dumps(point)}", flush=True)
    return found


def run(arguments: argparse.Namespace) -> None:
    """Train and evaluate the requested rows one after another."""
    changes = dict(pair.split("=", 1) for pair in arguments.set)
    options = Options(
        data=arguments.data, evaluation=arguments.evaluation, work=arguments.work, results=arguments.results,
        tokens=arguments.tokens, mask_tokens=arguments.mask_tokens, judge_tokens=arguments.judge_tokens,
        first=arguments.first, changes=changes,
        training=Settings(batch_size=arguments.batch_size, rate_factor=arguments.rate_factor),
    )  # fmt: skip
    settings: dict[tuple[str, int], Setting] = {}
    for seed in arguments.seed:
        for target in arguments.target:
            for method in arguments.method:
                run_row(Row(arguments.model, method, target, seed, arguments.rate_factor), options, settings)


def zero_shot(arguments: argparse.Namespace) -> None:
    """Add zero-shot accuracies to the points of all rows of `--model` with stored weights, and to the dense row."""
    from darwinlm.evaluation.local_tasks import local_tasks
    from darwinlm.evaluation.zero_shot import choose_tasks, run_tasks

    tasks = choose_tasks((), local_tasks(arguments.tasks))
    dense = load_dense(resolve(arguments.model), "kv_group", torch.device("cpu"))
    label = Path(arguments.model).name

    def judge(model: PrunedModel) -> dict[str, Any]:
        answers = run_tasks(model.to(fast_dtype(model.device)).eval(), dense.tokenizer, tasks, arguments.limit)
        by_task = {name: sum(items["acc"]) / len(items["acc"]) for name, items in answers.items()}
        count = {name: len(items["acc"]) for name, items in answers.items()}
        return {"tasks": by_task, "items": count, "mean": sum(by_task.values()) / len(by_task)}

    file = arguments.results / f"{label}-{DENSE}.json"
    known: dict[str, Any] = read_json(file) if file.exists() else {"model": label, "method": DENSE, "points": []}
    if known.get("zero_shot", {}).get("limit") != arguments.limit:
        found = judge(dense.load(dense.device, torch.float32))
        known |= surroundings() | {"zero_shot": {"limit": arguments.limit, **found}}
        write_json(file, known)
    for file, row in read_rows(arguments.results).items():
        if row["model"] != label or row["method"] == DENSE:
            continue
        form = arguments.work / file.stem / "start" / "facts.json"
        for point in row["points"]:
            weights = arguments.work / file.stem / f"weights-{point['tokens']}" / "weights.safetensors"
            wanted = not arguments.tokens or point["tokens"] in arguments.tokens
            if not (wanted and weights.exists()) or point.get("zero_shot", {}).get("limit") == arguments.limit:
                continue
            tensors: dict[str, Tensor] = {name: tensor.float() for name, tensor in load_file(weights).items()}
            model = revive(dense, json.loads(form.read_text())["form"], tensors)
            point["zero_shot"] = {"limit": arguments.limit, **judge(model)}
            write_json(file, row)
            print(f"{file.stem}, {point['tokens']} tokens: {point['zero_shot']['mean']:.4f}", flush=True)


def parser(about: str) -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    whole = argparse.ArgumentParser(description=about.partition("\n")[0])
    commands = whole.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("run", help="train and evaluate rows")
    rows.add_argument("--model", default="smollm2", help="`smollm2`, or a folder")
    rows.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    rows.add_argument("--target", type=float, nargs="+", default=[0.6], help="fractions of all parameters")
    rows.add_argument("--seed", type=int, nargs="+", default=[0])
    rows.add_argument("--tokens", type=int, default=131_072, help="training tokens, including those of masks")
    rows.add_argument("--mask-tokens", type=int, default=32_768, help="tokens that masks are trained on")
    rows.add_argument("--first", type=int, default=GRID, help="tokens before the first measurement of a training")
    rows.add_argument("--judge-tokens", type=int, default=8_192, help="tokens of each evaluation text")
    rows.add_argument("--batch-size", type=int, default=2, help="blocks per optimizer step")
    rows.add_argument("--rate-factor", type=float, default=1.0, help="factor of the learning rate `auto`")
    rows.add_argument("--data", required=True, help="text for calibration, search and training")
    rows.add_argument(
        "--evaluation", default=os.environ.get("DARWINLM_DATA"), help="held-out text file, read by no method"
    )
    rows.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe `quick`")
    tasks = commands.add_parser("zero-shot", help="evaluate trained models on zero-shot tasks; needs lm-eval")
    tasks.add_argument("--model", default="smollm2")
    tasks.add_argument("--tasks", type=Path, required=True, help="a folder of JSON-lines files")
    tasks.add_argument("--limit", type=int, default=200, help="items of each task")
    tasks.add_argument("--tokens", type=int, nargs="*", default=[], help="only points at these tokens")
    for command in (rows, tasks):
        command.add_argument("--work", type=Path, required=True, help="folder for models and checkpoints")
    plot = commands.add_parser("plot", help="write the two plots")
    plot.add_argument("--images", type=Path, default=ROOT / "docs")
    table = commands.add_parser("table", help="print the tokens that rivals need for the same quality")
    for command in (plot, table):
        command.add_argument("--model", default="smollm2")
        command.add_argument("--target", type=float, default=0.6)
    for command in (rows, tasks, plot, table):
        command.add_argument("--results", type=Path, default=RESULTS)
    return whole


def main(about: str, given: Sequence[str] | None = None) -> None:
    """Run the command line, or `given`; `about` is the description in the help."""
    arguments = parser(about).parse_args(given)
    if arguments.command == "run":
        if not arguments.evaluation:
            raise SystemExit("give --evaluation FILE, or set DARWINLM_DATA")
        run(arguments)
    elif arguments.command == "zero-shot":
        zero_shot(arguments)
    else:
        rows = [row for row in read_rows(arguments.results).values() if row["model"] == Path(arguments.model).name]
        rows = [row for row in rows if row.get("target") == arguments.target]
        rows = [row for row in rows if row["settings"]["rate_factor"] == 1]
        if arguments.command == "plot":
            for file in write_plots(rows, arguments.images):
                print(file)
        else:
            print(write_table(rows))
