"""Measure the stages of a run on a GPU, next to lower bounds from the arithmetic and memory traffic of each.

    python benchmarks/gpu.py [--sections solver database search candidate recovery] [--minutes 8] [--json FILE]
    python benchmarks/gpu.py --device cpu --tiny

No network or weights are needed: layers of the shapes of SmolLM2-135M (30 of them) and Llama-3.1-8B (8 of 32) have
random weights in bfloat16, which cost the same as real ones. Each row is printed as soon as it is measured, and all
rows again at the end. The bound is the time of the row's operations or bytes at the machine's peak rates, which are
measured too: matrix products in float32 and bfloat16, copies, a plain write of the same size. Sections that do not fit
into the remaining time are left out.

`solver`: one block chosen by one kernel launch and by single operations; all columns of an MLP but one removed; the
plain method (full matrices, one column at a time), whose time for the first removals is scaled to all of them, since
each costs the same. `database`: the stage by phases. `search`: a round of descent, the search for a learning rate, a
generation. `candidate`: ours against a deep copy of the dense model with zeros in it. `recovery`: an optimizer step
with distillation, tokens per second and MFU (6 operations per token and trained weight, 2 per weight of the teacher).
All but `solver` need a database, which is built first from less text if the section `database` is left out.

Sections import their dependencies when they begin, so that the others run if one is missing.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from removal import ours, plain, problem, wait
from torch import Tensor

from darwinlm.database import solver

LEVELS = 10
TARGET = 0.7
LEARNING_RATE = 1e-5
PLAIN_REMOVALS = 256
ONE_MULTIPROCESSOR = 64 * 1.7e9
"""Bytes per second from the L2 cache to one multiprocessor: 64 per clock at 1.7 GHz."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a model, and tokens per section."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    length: int
    """Tokens per block of text."""
    calibration: int
    trial: int
    score: int
    recovery: int
    """Tokens per optimizer step."""


SHAPES = (
    Shape("SmolLM2", 576, 1536, 30, 9, 3, 49_152, True, 512, 16_384, 512, 512, 8192),
    Shape("8B, 8 layers", 4096, 14_336, 8, 32, 8, 128_256, False, 2048, 131_072, 16_384, 16_384, 16_384),
)
TINY = (Shape("tiny", 32, 64, 2, 4, 2, 97, False, 16, 128, 32, 32, 32),)
SECTIONS = {
    "solver": (10, 30),
    "database": (30, 100),
    "search": (30, 90),
    "candidate": (10, 60),
    "recovery": (20, 60),
}
"""Maximum seconds of each section, by shape; it does not begin if less time remains."""


@dataclasses.dataclass
class Row:
    section: str
    shape: str
    work: str
    seconds: float | None
    bound: float | None = None
    bounded_by: str = ""
    note: str = ""

    def __str__(self) -> str:
        seconds = f"{self.seconds:10.4f}" if self.seconds is not None else " " * 10
        bound = f"{self.bound:10.4f}" if self.bound is not None else " " * 10
        ratio = f"{self.seconds / self.bound:8.1f}" if self.seconds is not None and self.bound else " " * 8
        head = f"{self.section:10} {self.shape:12} {self.work:44} {seconds} {bound} {ratio}"
        return "  ".join(part for part in (head, self.bounded_by, self.note) if part)


HEADER = f"{'section':10} {'shape':12} {'work':44} {'seconds':>10} {'bound':>10} {'ratio':>8}"


class Bench:
    """Measured rows, time limit and the machine's peak rates."""

    def __init__(self, device: torch.device, minutes: float, folder: Path, tiny: bool) -> None:
        self.device, self.folder, self.tiny = device, folder, tiny
        self.rows: list[Row] = []
        self._end = time.perf_counter() + 60 * minutes
        self.failed = False
        size = 256 if tiny else 8192
        self.float32 = 2 * (size // 2) ** 3 / self._product(size // 2, torch.float32)
        self.bfloat16 = 2 * size**3 / self._product(size, torch.bfloat16)
        block = torch.empty(2**20 if tiny else 2**30, dtype=torch.uint8, device=device)
        self.copies = 2 * len(block) / self.seconds(block.clone)
        for name, peak in (("float32", self.float32), ("bfloat16", self.bfloat16), ("copies", self.copies)):
            self.add("peaks", "", name, None, note=f"{peak / 1e12:.3f} T {'bytes' if name == 'copies' else 'FLOP'}/s")

    def _product(self, size: int, dtype: torch.dtype) -> float:
        matrix = torch.randn(size, size, device=self.device).to(dtype)
        return self.seconds(lambda: matrix @ matrix)

    def seconds(self, function: Callable[[], Any], repeats: int = 3) -> float:
        """Return the seconds of the fastest run after a warm-up."""
        found = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            function()
            wait(self.device)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def once(self, function: Callable[[], Any]) -> tuple[Any, float]:
        wait(self.device)
        start = time.perf_counter()
        result = function()
        wait(self.device)
        return result, time.perf_counter() - start

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()

    def add(self, section: str, shape: str, work: str, seconds: float | None, *bound: Any, note: str = "") -> None:
        self.rows.append(Row(section, shape, work, seconds, *bound, note=note))
        print(self.rows[-1], flush=True)


def solver_bound(bench: Bench, rows: int, columns: int, *, single: bool = True) -> float:
    """Return the minimum seconds to remove nearly all columns in blocks; `single` columns are chosen one by one.

    Operations and bytes as in docs/method.md, "What it costs".
    """
    d, B = columns, solver.BLOCK
    c = min(d, solver._CANDIDATES * B)
    operations = (7 / 6 + 3 / 8) * d**3 + 2 * rows * d**2 + 4 * B * d**2 + 2 * rows * c**2 * d / B
    traffic = 4 * d**3 / B + 8 * rows * d**2 / B + 24 * d**2
    choices = 4 * B * c * d / ONE_MULTIPROCESSOR if single else 0
    return operations / bench.float32 + traffic / bench.copies + choices


def run_solver(bench: Bench, shape: Shape, folder: Path) -> None:
    rows, columns = shape.hidden, shape.intermediate
    weight, gram = problem(rows, columns, 0, bench.device)
    ours(weight[:, :256].clone(), gram[:256, :256].clone(), [128 if columns > 128 else 8])  # the first call is slow
    B = solver.BLOCK if columns > 2 * solver.BLOCK else columns // 4
    D = min(columns, max(solver._FEWEST, round(solver._CANDIDATES * B)))
    inverse = torch.linalg.inv(gram[:D, :D] + 0.01 * torch.eye(D, device=bench.device))
    squares = weight[:, :D].T @ weight[:, :D]
    ways = {"single operations": solver.choose_without_waiting}
    if bench.device.type == "cpu":
        ways["NumPy"] = solver.choose
    elif (chooser := solver._chooser(bench.device, D)) is not solver.choose_without_waiting:
        ways["one launch"] = chooser
    orders = []
    bound = 4 * B**2 * D / ONE_MULTIPROCESSOR, "cache of one multiprocessor"
    for name, way in ways.items():
        seconds = bench.seconds(functools.partial(way, inverse, squares, B), 2)
        orders.append(way(inverse, squares, B)[0].tolist())
        same = f"same order: {orders[0] == orders[-1]}" if len(orders) > 1 else ""
        bench.add("solver", shape.name, f"a block of {B} from {D}: {name}", seconds, *bound, note=same)
    sizes = sorted({max(1, round(columns * (1 - i / LEVELS))) for i in range(1, LEVELS + 1)}, reverse=True)
    best = min((ours(weight, gram, sizes) for _ in range(2)), key=lambda result: result.seconds)
    bound = solver_bound(bench, rows, columns), "float32 products, traffic, choices"
    bench.add("solver", shape.name, f"ours, d = {columns}, {columns - 1} removals", best.seconds, *bound)
    removals = min(PLAIN_REMOVALS, columns // 2)
    plain(weight, gram, [columns - 2])  # the first call is slow
    some, reference = (plain(weight, gram, [columns - count]) for count in (removals // 2, removals))
    check = ours(weight, gram, [columns - removals])
    each = (reference.seconds - some.seconds) / (removals - removals // 2)
    scaled = reference.seconds + each * (columns - 1 - removals)
    same = set(check.snapshots[columns - removals][0]) == set(reference.snapshots[columns - removals][0])
    note = f"{scaled / best.seconds:.1f} times ours; kept columns equal: {same}"
    bench.add("solver", shape.name, f"plain, scaled from {removals} removals", scaled, note=note)


class RandomCheckpoint:
    """Fake `Checkpoint`: each tensor is drawn when it is read, on one device, and is always the same."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self._dtype, self._device = shapes, dtype, device

    def read(self, names: Iterable[str], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        found = {}
        for name in names:
            generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
            tensor = torch.empty(self.shapes[name], dtype=self._dtype, device=self._device)
            tensor = tensor.fill_(1) if tensor.ndim == 1 else tensor.normal_(0, 0.02, generator=generator)
            found[name] = tensor.to(device, dtype or self._dtype)
        return found


@functools.cache
def dense_model(shape: Shape, device: torch.device) -> Any:
    from transformers import AutoConfig

    from darwinlm.models.families import dense_config
    from darwinlm.models.loading import DenseModel, expected_shapes
    from darwinlm.models.sites import find_sites

    config = dense_config(
        AutoConfig.for_model(
            "llama", hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
            tie_word_embeddings=shape.tied, max_position_embeddings=shape.length, dtype="bfloat16",
        )
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return DenseModel(
        source=shape.name, checkpoint=RandomCheckpoint(expected_shapes(config), torch.bfloat16, device),
        config=config, sites=find_sites(config, "kv_group"), tokenizer=None, generation_config=None, device=device,
        dtype=torch.bfloat16, fingerprint="",
    )  # fmt: skip


def text(shape: Shape, tokens: int, seed: int) -> Tensor:
    """Return random token ids (blocks * tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape.vocabulary, (-(-tokens // shape.length), shape.length), generator=generator)


def built(shape: Shape, device: torch.device, folder: Path, tokens: int, phases: Any = None) -> Any:
    """Return the database in `folder`; build it if it does not exist."""
    from darwinlm.config.recipe import DatabaseRecipe
    from darwinlm.database.build import build_database
    from darwinlm.database.store import Database

    if (folder / "index.json").exists():
        return Database(folder)
    return build_database(
        dense_model(shape, device), text(shape, tokens, 0), DatabaseRecipe(levels=LEVELS), folder, phases
    )


def weights_per_token(dense: Any, parameters: int) -> int:
    """Return the weights used per token of a model with `parameters`: all but an untied embedding table."""
    tied = dense.config.tie_word_embeddings
    return parameters - (0 if tied else dense.config.vocab_size * dense.config.hidden_size)


def run_database(bench: Bench, shape: Shape, folder: Path) -> None:
    from darwinlm.runtime.progress import Phases

    dense = dense_model(shape, bench.device)
    phases = Phases(lambda: wait(bench.device))
    _, seconds = bench.once(lambda: built(shape, bench.device, folder, shape.calibration, phases))
    in_layers = sum(torch.Size(size).numel() for name, size in dense.shapes.items() if ".layers." in name)
    attention = 2 * shape.length * shape.hidden * shape.layers
    peak = bench.bfloat16 if dense.compute_dtype == torch.bfloat16 else bench.float32
    columns = [site.num_units * site.columns_per_unit for site in dense.sites]
    solve = sum(
        solver_bound(bench, shape.hidden, count, single=site.columns_per_unit == 1)
        for site, count in zip(dense.sites, columns, strict=True)
    )
    written = sum(file.stat().st_size for file in folder.iterdir())
    bounds = {
        "forward": (shape.calibration * (2 * in_layers + attention) / peak, "products"),
        "Gram": (sum(shape.calibration * count**2 for count in columns) / bench.float32, "float32 products"),
        "solve": (solve, "float32 products, traffic, choices"),
        "write": (plain_write(folder, written), f"a plain write of {written / 1e9:.2f} GB"),
    }
    for name, spent in phases.seconds.items():
        bench.add("database", shape.name, name, spent, *bounds.get(name, ()))
    work = f"all, {len(dense.sites)} sites, {shape.calibration} tokens"
    note = "" if bench.device.type == "cpu" else f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    computed = bounds["forward"][0] + bounds["Gram"][0] + bounds["solve"][0]
    bench.add("database", shape.name, work, seconds, max(computed, bounds["write"][0]), "compute or write", note=note)


def plain_write(folder: Path, size: int) -> float:
    """Return the seconds to write a plain file of `size` bytes to the disk of `folder`."""
    block = bytearray(os.urandom(2**20)) * min(64, 1 + size // 2**20)
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for first in range(0, size, len(block)):
            file.write(memoryview(block)[: size - first])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


@dataclasses.dataclass
class Prepared:
    """Inputs shared by the sections after the database."""

    dense: Any
    database: Any
    corpus: Any
    budget: Any
    plan: Any
    weights: int
    """Weights used per token in the plan's model."""
    peak: float


def prepare(bench: Bench, shape: Shape, folder: Path) -> Prepared:
    from darwinlm.data.corpus import Corpus
    from darwinlm.data.tokens import Tokens
    from darwinlm.models.loading import fast_dtype
    from darwinlm.plan import parameter_budget
    from darwinlm.search.allocation import uniform_plan

    dense = dense_model(shape, bench.device)
    database = built(shape, bench.device, folder, min(shape.calibration, 16_384))
    trial, score = (
        Tokens.unmasked(text(shape, tokens, seed)) for tokens, seed in ((4 * shape.trial, 1), (2 * shape.score, 2))
    )
    space = database.space(dense.sites)
    budget = parameter_budget(TARGET, space)
    plan = uniform_plan(space, budget)
    assert plan is not None
    peak = bench.bfloat16 if fast_dtype(bench.device) == torch.bfloat16 else bench.float32
    corpus = Corpus({"calibration": trial, "train": trial, "validation": score})
    weights = weights_per_token(dense, space.parameters(plan.levels))
    return Prepared(dense, database, corpus, budget, plan, weights, peak)


def search_recipe(shape: Shape, **settings: Any) -> Any:
    from darwinlm.config.recipe import SearchRecipe

    common = {"trial_tokens": (shape.trial,), "survivors": (1,), "offspring": 4, "generations": 1, "descent_rounds": 1}
    return SearchRecipe(**(common | {"score_tokens": (2 * shape.score,), "sensitivity_tokens": shape.trial} | settings))


def run_search(bench: Bench, shape: Shape, folder: Path) -> None:
    from darwinlm.search.stage import search_plan
    from darwinlm.search.trials import TrialScorer

    given = prepare(bench, shape, folder)
    weights, peak, count = given.weights, given.peak, 4
    trained, scored = 6 * weights * shape.trial, 2 * weights * 2 * shape.score
    _, seconds = bench.once(lambda: given.dense.model)
    bench.add("search", shape.name, "reading the dense model", seconds)
    with tempfile.TemporaryDirectory() as place:
        settings = search_recipe(shape, generations=0)
        arguments = given.dense, given.database, given.corpus, given.budget
        _, seconds = bench.once(lambda: search_plan(*arguments, settings, 0, Path(place)))
        judged = sum(len(one["scores"]) for one in json.loads((Path(place) / "descent.json").read_text())["rounds"])
        # One forward pass, two backward passes through activations and weights, and the scored plans.
        bound = (10 * weights * shape.trial + judged * scored) / peak, "products"
        bench.add("search", shape.name, f"a round of descent, {judged} plans scored", seconds, *bound)
    scorer = TrialScorer(given.dense, given.database, given.corpus, search_recipe(shape))
    found, seconds = bench.once(lambda: scorer.find_rates(given.plan))
    tried = len(found[0]["tried"])
    bound = (tried - 1) * (trained + scored) / peak, "products"
    bench.add("search", shape.name, f"learning rate search, {tried} tried", seconds, *bound)
    with tempfile.TemporaryDirectory() as place:
        settings = search_recipe(shape, descent_rounds=0, learning_rate=LEARNING_RATE)
        _, seconds = bench.once(lambda: search_plan(*arguments, settings, 0, Path(place)))
        # The starting plan and each offspring, before and after a trial.
        bound = (count + 1) * (trained + 2 * scored) / peak, "products"
        work = f"a generation of {count}, {shape.trial} + {2 * shape.score} tokens"
        bench.add("search", shape.name, work, seconds, *bound)


def run_candidate(bench: Bench, shape: Shape, folder: Path) -> None:
    from search import deep_copy_trial

    from darwinlm.search.trials import TrialScorer

    given = prepare(bench, shape, folder)
    settings = search_recipe(shape, score_tokens=(shape.score,), learning_rate=LEARNING_RATE)
    scorer = TrialScorer(given.dense, given.database, given.corpus, settings)
    trial, score = (
        given.corpus.splits[split].first(tokens).input_ids_BT
        for split, tokens in (("train", shape.trial), ("validation", shape.score))
    )
    seconds = bench.seconds(lambda: scorer.score(given.plan, 0, given.plan), 2)
    operations = given.weights * (6 * shape.trial + 2 * shape.score)
    work = f"ours, {shape.trial} + {shape.score} tokens"
    bench.add("candidate", shape.name, work, seconds, operations / given.peak, "products")
    half = given.dense.load(bench.device, torch.bfloat16)
    with torch.no_grad():
        expected = [half(block[None].to(bench.device)).logits for block in score]
    copied = bench.seconds(
        lambda: deep_copy_trial(
            half, given.dense, given.database, given.plan, trial, score, expected, LEARNING_RATE
        ), 2
    )  # fmt: skip
    operations = weights_per_token(given.dense, given.dense.parameters) * (6 * shape.trial + 2 * shape.score)
    note = f"{copied / seconds:.2f} times ours"
    bench.add("candidate", shape.name, "deep copy", copied, operations / bench.bfloat16, "products", note=note)


def run_recovery(bench: Bench, shape: Shape, folder: Path) -> None:
    from darwinlm.config.recipe import RecoveryRecipe
    from darwinlm.data.tokens import Tokens
    from darwinlm.models.cutting import build_model
    from darwinlm.models.loading import fast_dtype
    from darwinlm.recovery import trainer, training

    given = prepare(bench, shape, folder)
    cuts = given.database.cuts(given.dense.sites, given.plan.levels, bench.device)
    model = build_model(given.dense.config, given.dense.sites, given.dense.weights, cuts, trainable=True)
    given.dense.release()
    teacher = given.dense.load(bench.device, fast_dtype(bench.device))
    blocks = shape.recovery // shape.length
    steps, warm = (4, 1) if bench.tiny else (12, 4)
    recipe = RecoveryRecipe(tokens=steps * shape.recovery, batch_size=blocks, evaluations=0)
    ends = []

    class Timed(trainer.Follow):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            wait(bench.device)
            ends.append(time.perf_counter())

    # The checkpoint at the end is not needed.
    with (
        patch.object(training, "Follow", Timed),
        patch.object(trainer, "save_checkpoint", lambda *arguments: None),
        tempfile.TemporaryDirectory() as place,
    ):
        train, score = (
            Tokens.unmasked(text(shape, tokens, seed))
            for tokens, seed in ((steps * shape.recovery, 3), (shape.length, 4))
        )
        training.recover(model, teacher, train, score, recipe, seed=0, folder=Path(place), device=bench.device)
    seconds = statistics.median(b - a for a, b in zip(ends[warm - 1 :], ends[warm:], strict=False))
    trained, taught = given.weights, weights_per_token(given.dense, given.dense.parameters)
    bound = shape.recovery * (6 * trained + 2 * taught) / given.peak
    note = f"{shape.recovery / seconds:,.0f} tokens/s, {bound / seconds:.1%} of the peak"
    bench.add("recovery", shape.name, f"a step of {shape.recovery} tokens", seconds, bound, "products", note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="model of two small layers, to test the script")
    parser.add_argument("--minutes", type=float, default=8, help="time limit; sections that do not fit are left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    machine = {"device": name, "machine": platform.machine(), "torch": torch.__version__}
    start = time.perf_counter()
    print(json.dumps(machine), flush=True)
    print(HEADER, flush=True)
    runs = {"solver": run_solver, "database": run_database, "search": run_search}
    runs |= {"candidate": run_candidate, "recovery": run_recovery}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(device, arguments.minutes, Path(place), arguments.tiny)
        for number, shape in enumerate(TINY if arguments.tiny else SHAPES):
            for section in (one for one in SECTIONS if one in arguments.sections):
                needed = 0 if arguments.tiny else SECTIONS[section][number]
                if bench.left < needed:
                    bench.add(section, shape.name, f"left out: {bench.left:.0f} s left, {needed} s needed", None)
                    continue
                try:
                    runs[section](bench, shape, Path(place) / str(number))
                except Exception as error:  # the other sections still run
                    traceback.print_exc()
                    bench.failed = True
                    reason = " ".join(str(error).split())[:200]
                    bench.add(section, shape.name, f"failed: {type(error).__name__}: {reason}", None)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            dense_model.cache_clear()
    print(f"\n{HEADER}", *bench.rows, sep="\n")
    print(f"{time.perf_counter() - start:.0f} s in total")
    if arguments.json is not None:
        rows = [dataclasses.asdict(row) for row in bench.rows]
        arguments.json.write_text(json.dumps(machine | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if bench.failed else 0)


if __name__ == "__main__":
    main()
