"""Run the stages of a pruning run on fake tensors, and count their peak memory (`live_bytes.py`)."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
from live_bytes import GPU, FakeCheckpoint, FakeDatabase, LiveBytes, as_on_a_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from darwinlm.config.recipe import Recipe
from darwinlm.data.corpus import Corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database import build, grams, solver
from darwinlm.evaluation import measure
from darwinlm.evaluation.stage import waiting_device
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.device_memory import kept_bytes
from darwinlm.models.families import LAYERS
from darwinlm.models.loading import DenseModel, expected_shapes
from darwinlm.models.modeling_darwinlm import PrunedConfig
from darwinlm.models.sites import find_sites
from darwinlm.plan import Budget, parameter_budget
from darwinlm.recovery import sharding
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.refit import refit
from darwinlm.recovery.training import _with_lora
from darwinlm.runtime.progress import Phases
from darwinlm.search.allocation import uniform_plan
from darwinlm.search.sensitivity import measure_sensitivity
from darwinlm.search.trials import TrialScorer

_LIBRARIES = 650_000_000


@dataclass(frozen=True)
class Peak:
    """Peak memory of a stage, in bytes."""

    device: int
    host: int
    """Peak in CPU memory, without the dense model's layers, which are memory-mapped."""


class _Dense(DenseModel):
    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of a GPU."""
        return self.dtype


class Trace:
    """A run of a recipe on fake tensors, on a device of `memory` bytes.

    Each stage is a method that returns its peak, and needs a fresh process: masks and other values that libraries
    cache have no content. Long loops over equal batches stop after two: the second shows whether memory is freed.
    """

    def __init__(
        self, config: PrunedConfig, recipe: Recipe, target: float | int, memory: float, ranks: int = 1
    ) -> None:
        """Prepare a run to `target`, a fraction or a number of parameters; only the training uses `ranks` devices."""
        torch._functorch.config.fake_tensor_allow_meta = True
        self.recipe, self.memory, self.ranks = recipe, memory, ranks
        self.length, search = recipe.data.sequence_length, recipe.search
        sites, shapes = find_sites(config, recipe.database.granularity), expected_shapes(config)
        dense = _Dense(
            source="", checkpoint=FakeCheckpoint(shapes), config=config, sites=sites,  # type: ignore[arg-type]
            tokenizer=None, generation_config=None, device=torch.device(GPU), dtype=torch.bfloat16,  # type: ignore[arg-type]
            fingerprint="",
        )  # fmt: skip
        kept = kept_bytes(config, self.length, self.length, torch.bfloat16)
        offload = search.offloads(2 * dense.parameters, kept, memory - _LIBRARIES, accelerator=True)
        self.dense = replace(dense, offload=offload)
        self.live = LiveBytes()
        self.database: Any = FakeDatabase(self.live, config, sites, shapes, recipe.database.levels)
        space = self.database.space(sites)
        budget = parameter_budget(target, space)
        plan = uniform_plan(space, Budget(limits=tuple(replace(limit, minimum=0) for limit in budget.limits)))
        assert plan is not None
        self.space, self.plan = space, plan

    def stages(self) -> dict[str, Callable[[], Peak]]:
        """Return the stages that the recipe runs, by name."""
        recovery = self.recipe.recovery
        wanted = {
            "database": True,
            "scores of the dense model": True,
            "sensitivities": self.recipe.search.descent_rounds > 0,
            "score, trial, score": True,
            "refit": recovery.refit_tokens > 0,
            "training": recovery.tokens > 0,
            "evaluation": True,
        }
        methods = self._database, self._scores, self._sensitivities, self._candidate, self._refit, self._train
        every = zip(wanted, (*methods, self._evaluate), strict=True)
        return {name: method for name, method in every if wanted[name]}

    def peak(self, stage: str) -> Peak:
        """Run `stage` and return its peak."""
        with FakeTensorMode(allow_non_fake_inputs=True), self.live, as_on_a_gpu(self.live, self.memory - _LIBRARIES):
            return self.stages()[stage]()

    def _found(self) -> Peak:
        layers = [shape for name, shape in self.dense.shapes.items() if name.startswith(LAYERS)]
        mapped = sum(2 * torch.Size(shape).numel() for shape in layers) if "loaded" in self.dense.__dict__ else 0
        return Peak(self.live.peak[GPU], self.live.peak["cpu"] - (mapped if self.dense.offload else 0))

    def _blocks(self, tokens: int) -> Tensor:
        return torch.zeros(max(1, tokens // self.length), self.length, dtype=torch.int32)

    def _cuts(self) -> dict[str, Any]:
        cuts: dict[str, Any] = self.database.cuts(self.dense.sites, self.plan.levels, self.dense.layers_device)
        return cuts

    def _database(self) -> Peak:
        """Walk the first layer, and prune its sites; the activations of all tokens are in CPU memory.

        The solver recomputes its inverse at every level, in float64, which a real run seldom needs.
        """
        recipe, dense = self.recipe.database, replace(self.dense, offload=False)
        with _content_free_solver(), build._Writer(_NoFiles(), Phases()) as writer:  # type: ignore[arg-type]
            walk = grams.walk_blocks(
                dense, self._blocks(self.recipe.data.calibration_tokens), batch_size=recipe.batch_size, scratch=Path()
            )
            for site, statistics in itertools.islice(walk, len([one for one in dense.sites if one.layer == 0])):
                build._solve(dense, [(site, statistics)], recipe, 1, writer, Phases())
        return self._found()

    def _scorer(self) -> TrialScorer:
        # Two steps of a trial; scores keep all their tokens.
        search, length = self.recipe.search, self.length
        trial_tokens = min(max(search.trial_tokens), 2 * search.batch_size * length)
        score_tokens = max(search.score_tokens)
        short = {"trial_tokens": (trial_tokens,), "score_tokens": (score_tokens,), "survivors": (1,)}
        splits = {"train": self._blocks(2 * trial_tokens), "validation": self._blocks(score_tokens)}
        corpus = Corpus({split: Tokens.unmasked(ids_BT) for split, ids_BT in splits.items()})
        scorer = TrialScorer(self.dense, self.database, corpus, search.model_copy(update=short))
        scorer.take_rates([{"tokens": trial_tokens, "rate": 2.0**-11}])
        return scorer

    def _scores(self) -> Peak:
        DenseReference(self.dense.model, self._blocks(max(self.recipe.search.score_tokens)))
        return self._found()

    def _sensitivities(self) -> Peak:
        dense = self.dense
        measure_sensitivity(
            dense, lambda index, level: self.database.cut(dense.sites[index], level, dense.layers_device), self.space,
            self.plan, self._blocks(2 * self.length), seed=0,
        )  # fmt: skip
        return self._found()

    def _candidate(self) -> Peak:
        self._scorer().score(self.plan, 0, self.plan)
        return self._found()

    def _refit(self) -> Peak:
        """Refit the first two layers; the others stay in memory."""
        model, dense = self.dense.cut(self._cuts(), trainable=True), self.dense.model
        with ExitStack() as stack:
            for one in (model.model, dense.model):
                stack.enter_context(patch.object(one, "layers", one.layers[:2]))
            refit(model, dense, self._blocks(self.recipe.recovery.refit_tokens))
        return self._found()

    def _train(self) -> Peak:
        """Take two optimizer steps of two micro-batches each. The accelerator is the fake CPU here, as FSDP demands.

        With offloaded shards, gradients are counted twice: on the device, where they are reduced, and on the host.
        """
        recipe, live, device = self.recipe.recovery, self.live, torch.device("cpu")
        dense = replace(self.dense, device=device, offload=False)
        model = dense.cut(self.database.cuts(dense.sites, self.plan.levels, device), trainable=True)
        dense.release()
        teacher = dense.load(device, torch.bfloat16) if recipe.distillation > 0 else None
        if recipe.lora_rank:
            if not sharding.is_sharded(recipe):
                model.to(torch.bfloat16)
            _with_lora(model, recipe.lora_rank)
        if recipe.activations == "recompute":
            model.activation_checkpointing_enable({"use_reentrant": False})
        objective = Objective(model.train(), teacher, recipe.distillation, recipe.temperature)
        offload = recipe.sharding == "fsdp_offload" and self.ranks > 1
        if sharding.is_sharded(recipe):
            sharding.shard(objective, teacher, device, torch.bfloat16, offload=offload)
        live.restart()
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        blocks = recipe.micro_batch_size or max(1, recipe.batch_size // self.ranks)
        ids_BT = self._blocks(blocks * self.length).long()
        parked = 0
        for _ in range(2):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective(ids_BT, ids_BT)["loss"]
                loss.backward()
            on_device = live.peak["cpu"] - parked - (_bytes_of(trained) if offload else 0)
            optimizer.step()
            optimizer.zero_grad()
            parked = _bytes_of(one for state in optimizer.state.values() for one in state.values()) if offload else 0
        if not offload:
            return Peak(live.peak["cpu"], 0)
        return Peak(on_device, 2 * _bytes_of(trained) + parked)

    def _evaluate(self) -> Peak:
        """Measure the quality of all models; the speed of one request is not measured."""
        dense = self.dense
        place = waiting_device(dense, self.space.parameters(self.plan.levels))
        models = {"dense": dense.model}
        for name in ("uniform", "found", "recovered"):
            models[name] = measure.moved_to(dense.cut(self._cuts()), place)
        with patch.object(measure, "speeds", lambda models, workload: {}):
            measure.measure(models, self._blocks(2 * self.length), self.recipe.workload, torch.bfloat16)
        return self._found()


class _NoFiles:
    """Fake database to write to."""

    def write_site(self, *arguments: Any, **facts: Any) -> dict[str, Any]:
        """Write nothing."""
        return {}


@contextmanager
def _content_free_solver() -> Iterator[None]:
    """Replace what depends on content: blocks are removed in full, and every snapshot finds rounding errors."""

    def choose(inverse_DD: Tensor, squares_DD: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen_B = torch.zeros(block, dtype=torch.long, device=inverse_DD.device)
        return chosen_B, inverse_DD.new_empty(block), inverse_DD.new_empty(block, block)

    @contextmanager
    def on_the_host(shape: Sequence[int], dtype: torch.dtype, *others: Any) -> Iterator[Tensor]:
        yield torch.empty(*shape, dtype=dtype)

    two = grams._slices
    patches: list[tuple[Any, str, Any]] = [
        (solver, "_chooser", lambda device, candidates: choose),
        (solver, "_sound_steps", lambda scores_B, factor_BB: len(scores_B)),
        (solver._Columns, "_steps_without_others", lambda state, u_Bn, v_BO, scores_B, *others: len(scores_B)),
        (solver._State, "_spoilt", lambda state: True),
        (Tensor, "tolist", lambda tensor: list(range(tensor.numel()))),
        (grams, "open_activations", on_the_host),
        (grams, "_slices", lambda blocks, size: itertools.islice(two(blocks, size), 2)),
    ]
    with ExitStack() as stack:
        for place, name, replacement in patches:
            stack.enter_context(patch.object(place, name, replacement))
        yield


def _bytes_of(tensors: Any) -> int:
    return sum((one._local_tensor if isinstance(one, DTensor) else one).untyped_storage().nbytes() for one in tensors)


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Pretend to be one of `ranks` processes; collective operations return at once."""
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = sharding.init_device_mesh("cpu", (ranks,))
    with patch.object(sharding, "init_device_mesh", lambda *arguments: mesh):
        yield
    torch.distributed.destroy_process_group()
