"""Predicted cost of a run, from shapes only: seconds and memory per stage, disk space, and advice if it does not fit.

Work is counted in tokens through a layer and through the head, forward or with gradients, and in matrix products of the
database; `rates` gives the cost of each. For the accuracy of past predictions see docs/lab-log.md.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from darwinlm.config.recipe import Recipe
from darwinlm.config.stage import Stage
from darwinlm.config.target import parse_target
from darwinlm.errors import UserError
from darwinlm.estimate.rates import GPUS, Machine, Rates, machine_here, measure_rates, rates_of
from darwinlm.models.config import load_sizes
from darwinlm.models.cutting import count_parameters
from darwinlm.models.device_memory import SPARE, TRIAL_BYTES, kept_bytes
from darwinlm.models.experts import OUTPUTS, PRODUCTS
from darwinlm.models.families import dense_again
from darwinlm.models.heads import chunk_tokens
from darwinlm.models.loading import choose_device, expected_shapes
from darwinlm.models.modeling_darwinlm import PrunedConfig
from darwinlm.models.sites import Site, find_sites
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import check_target

_SOLVER_UTILISATION = 0.45
"""Fraction of the speed of large matrix products that the solver reaches."""
_OVERHEAD = 1.25
"""Overhead factor of database, search and recovery beyond layers and head: optimizer, I/O, Python."""
_SAMPLE_TOKENS = 40
"""Tokens that the dense and the last model each generate during evaluation."""
_SLACK = 1.15
"""Memory overhead factor beyond tensors: buffers, fragmentation."""
_DISK = 3e8
"""Disk bandwidth in bytes per second, flushed."""
_EXPERT_BYTES = 4 * (2 * PRODUCTS + OUTPUTS)
"""Bytes for the products of all experts' outputs on a sample of tokens, and for those changed by a removal."""
_LIBRARIES = 650_000_000
"""Bytes of memory in use before any model is loaded."""
_LINK = 1e10
"""Bandwidth from CPU memory to a device, in bytes per second."""
_TEMPORARY = 24 * 2**24
"""Bytes that a step of `SignSGD` needs in addition to gradients."""
_EVALUATED_PLANS = 4.75
"""Plan evaluations on the whole score text per descent round: eight plans start, most are stopped early."""
_GRADIENT_PASSES = 1.7
"""Cost of measuring sensitivities, relative to a forward and backward pass of training: two backward passes without
weight gradients, and the columns of all levels in addition to the dense ones."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Predicted cost of one stage."""

    stage: Stage
    seconds: float
    memory: float
    """Peak memory in bytes, on each device."""

    @property
    def name(self) -> str:
        """Name of the stage, as in the manifest of a run."""
        return str(self.stage)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Predicted cost of a whole run."""

    dense_parameters: int
    target_parameters: int
    smallest_parameters: int
    stages: tuple[StageCost, ...]
    host_memory: float
    """CPU memory in bytes for layers that are streamed through the devices (each process has its own candidates; the
    dense model's files and the database's are cached once) or for offloaded sharded training; 0 if there are none."""
    disk: float
    """Disk space in bytes at the end, including checkpoints."""
    advice: tuple[str, ...]
    """Settings to change if there is not enough memory."""


def plan_run(
    recipe: Recipe, gpus: int = 1, gpu: str | None = None, gpu_memory: str | None = None
) -> tuple[Machine, Costs]:
    """Estimate the cost of a run of `recipe`, from the model's config only.

    Args:
        recipe: recipe whose target is a number of parameters.
        gpus: number of devices.
        gpu: device name, a key of `GPUS`; by default this machine is measured for some seconds.
        gpu_memory: memory per device, such as `40GB`.

    Returns:
        The machine that was assumed, and the time and memory of each stage on it.

    Raises:
        UserError: if the target is not a number of parameters or cannot be reached, or the device is unknown.
    """
    if len(recipe.sizes) > 1 or set(recipe.sizes[0].limits) != {"params"}:
        raise UserError(f"plan: target {recipe.target!r}: expected one number of parameters, such as 0.5 or 2.7B")
    config = load_sizes(resolve(recipe.model))
    sites = find_sites(config, recipe.database.granularity, recipe.database.experts)
    size, shapes = recipe.sizes[0].limits["params"], expected_shapes(config)
    dense = sum(prod(shape) for shape in shapes.values())
    fixed = dense - sum(count_parameters(site, shapes, range(site.num_units)) for site in sites)
    # A mixture keeps at least as many experts as each token is routed to, or some channels of each expert.
    least = [site.routed if site.of_experts else min(1, site.experts) for site in sites]
    smallest = fixed + sum(count_parameters(site, shapes, range(n)) for site, n in zip(sites, least, strict=True))
    check_target("params", size, dense=dense, smallest=smallest)
    fraction = size if isinstance(size, float) else size / dense
    if gpu is None:
        device = choose_device(recipe.device)
        machine = machine_here(device)
        rates = measure_rates(dense_again(config), device, recipe.data.sequence_length)
    elif gpu in GPUS:
        there = GPUS[gpu]
        machine = Machine(name=f"{gpus} x {gpu}", devices=gpus, memory=there.memory, accelerator=True)
        rates = rates_of(dense_again(config), there, recipe.data.sequence_length)
    else:
        raise UserError(f"plan: unknown --gpu {gpu!r}; choose one of {', '.join(GPUS)}")
    if gpu_memory is not None:
        try:
            machine = replace(machine, memory=float(parse_target(f"memory={gpu_memory}")["memory"]))
        except ValueError:
            raise UserError(f"plan: --gpu-memory {gpu_memory!r} is not a size; write it as 80GB") from None
    return machine, predict(config, sites, recipe, fraction, machine, rates)


def predict(
    config: PrunedConfig, sites: tuple[Site, ...], recipe: Recipe, fraction: float, machine: Machine, rates: Rates
) -> Costs:
    """Predict the cost of a run.

    Args:
        config: config of the model, dense or already pruned.
        sites: the model's sites.
        recipe: settings of the run.
        fraction: fraction of the model's parameters to keep.
        machine: machine to run on.
        rates: rates of one of its devices, for layers that were never pruned.
    """
    shapes = expected_shapes(config)
    dense = sum(prod(shape) for shape in shapes.values())
    in_sites = sum(count_parameters(site, shapes, range(site.num_units)) for site in sites)
    fixed = dense - in_sites
    left = max(0.0, (fraction * dense - fixed) / in_sites)
    stages: list[StageCost] = []
    stored, models, host = 0.0, 0.0, 0.0
    for number in range(1, recipe.steps + 1):
        step = _Step(
            before=left ** ((number - 1) / recipe.steps),
            left=left ** (number / recipe.steps),
            tokens=recipe.recovery.tokens // recipe.steps,
            number=number if number < recipe.steps else None,
        )
        found, columns, waiting = _predict_step(config, sites, recipe, machine, rates, step)
        host = max(host, waiting)
        stages += [_with_overhead(stage) for stage in found]
        stored += columns
        models += 4 * (fixed + step.left * in_sites)
    # Weights and the two moments of AdamW; two checkpoints are kept.
    checkpoint = 2 * 12 * (fixed + left * in_sites) if recipe.recovery.tokens else 0
    read = recipe.data.trial_tokens + recipe.data.score_tokens
    predictions = 8 * recipe.recovery.teacher_top_k * read if recipe.recovery.distillation else 0
    files = 2 * dense + (stored if recipe.search.descent_rounds else 0)
    return Costs(
        dense_parameters=dense,
        target_parameters=round(fraction * dense),
        smallest_parameters=fixed,
        stages=tuple(stages),
        host_memory=_SLACK * machine.devices * host + (files if host else 0),
        disk=stored + models + checkpoint + predictions + 4 * fraction * dense,
        advice=tuple(_advice(tuple(stages), machine, recipe)),
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One step of a gradual run, or the only step of any other run."""

    before: float
    """Fraction of the dense model's layer parameters present at the beginning of the step."""
    left: float
    """Fraction of the dense model's layer parameters present at the end of the step."""
    tokens: int
    """Recovery tokens of this step."""
    number: int | None
    """Its number, in all steps except the last."""


def _predict_step(
    config: PrunedConfig, sites: tuple[Site, ...], recipe: Recipe, machine: Machine, rates: Rates, step: _Step
) -> tuple[list[StageCost], float, float]:
    """Return a step's stages without overhead, the bytes of its database, and the bytes of CPU memory for streamed
    layers."""
    shapes, again = expected_shapes(config), expected_shapes(dense_again(config))
    dense = sum(prod(shape) for shape in shapes.values())
    in_sites = sum(count_parameters(site, shapes, range(site.num_units)) for site in sites)
    fixed, before, left = dense - in_sites, step.before, step.left
    # Number of equivalent unpruned layers, to which the rates refer.
    layers = config.num_hidden_layers * in_sites / (sum(map(prod, again.values())) - fixed)
    devices = machine.devices
    data, search, recovery = recipe.data, recipe.search, recipe.recovery
    uniform = recipe.wants_uniform(experts=any(site.routed for site in sites))
    if uniform:
        search = search.model_copy(update={"descent_rounds": 0, "generations": 0})

    # On an accelerator the dense model is kept and run in the checkpoint's dtype, elsewhere in float32.
    item, exact = (2, rates.layer_fast) if machine.accelerator else (4, rates.layer_float32)

    columns = [before * site.columns(site.num_units) for site in sites if not site.routed]
    mixtures = [site for site in sites if site.routed]
    rows = config.hidden_size
    gram = sum(d**2 for d in columns) * data.calibration_tokens
    # The inverse is computed in float64, at half the speed.
    solving = sum((8 / 3 + 2 / 3) * d**3 + 2.5 * rows * d**2 for d in columns)
    stored = sum(rows * d for d in columns) * (recipe.database.levels - 1) / 2 * 2
    of_experts = before * sum(site.columns(site.num_units) for site in mixtures)
    stored += of_experts * rows * (recipe.database.levels - 1) / 2 * 2
    solving += sum(_expert_work(site, rows, data.calibration_tokens, recipe.database.levels) for site in mixtures)
    database = (
        before * layers * data.calibration_tokens * exact
        + (gram + solving / _SOLVER_UTILISATION) * rates.product
        + stored / _DISK
    ) / devices

    # Search. `small` and `trained`: seconds per token through the layers of a candidate.
    per_block = kept_bytes(config, data.sequence_length, data.sequence_length, torch.bfloat16)
    offload = search.offloads(item * dense, per_block, machine.memory, accelerator=machine.accelerator)
    small, trained = left * layers * rates.layer_fast, left * layers * rates.layer_training
    recovering = small, trained
    scored_together, trained_together = 4096, search.batch_size * data.sequence_length
    if offload:
        # Each layer is copied once per scoring pass; for training, twice and back.
        small += 2 * left * in_sites / (_LINK * scored_together)
        trained += 6 * left * in_sites / (_LINK * trained_together)
    sensitivities = search.sensitivity_tokens * (
        before * layers * rates.layer_training * _GRADIENT_PASSES + 3 * rates.head_float32
    )
    comparing = _EVALUATED_PLANS * data.score_tokens * (small + 2 * rates.head_float32)
    candidates = [search.offspring, *search.survivors[:-1]]
    # A candidate is scored after its trial; the score before the trial skips the layers shared with its parent.
    scored = small + 2 * rates.head_float32
    tried = [
        trial * (trained + rates.head_training) + score * (scored + (scored - small / 2 if trial > 0 else 0))
        for trial, score in zip(search.trial_tokens, search.score_tokens, strict=True)
    ]
    generation = sum(count * seconds for count, seconds in zip(candidates, tried, strict=True))
    # Generation 0: the uniform, least-error and descent plans; or uniform-size plans, about one per level.
    starts = 3 if search.descent_rounds else 2
    if uniform:
        starts = min(search.offspring, recipe.database.levels)
    beginning = starts * tried[-1] + (comparing if uniform else 0.0)
    if search.learning_rate == "auto":
        # Usually three learning rates are tried for each number of tokens.
        for tokens in {trial for trial in search.trial_tokens if trial > 0}:
            beginning += 3 * (tokens * (trained + rates.head_training) + max(search.score_tokens) * scored)
    reference = data.score_tokens * layers * exact
    # The starting plan is evaluated like a round.
    descending = search.descent_rounds * sensitivities + (search.descent_rounds + 1) * comparing
    shared_out = (descending if search.descent_rounds else 0.0) + beginning + search.generations * generation
    searching = 2 * reference + shared_out / devices

    # Recovery, which does not stream layers.
    small, trained = recovering
    teacher = layers * rates.layer_fast + rates.head_training / 4 if recovery.distillation > 0 else 0.0
    before_training = 0.0
    if recovery.teacher_top_k:
        before_training, teacher = (data.trial_tokens + data.score_tokens) * teacher / devices, 0.0
    token = trained * (4 / 3 if recovery.activations == "recompute" else 1) + rates.head_training + teacher
    evaluated = (recovery.evaluations + 1) * data.score_tokens * (small + teacher + rates.head_float32)
    refit = recovery.refit_tokens * (exact + left * rates.layer_float32) * layers
    if recovery.refit_tokens:
        # Evaluation of the refit: the dense model once, the pruned model before and after.
        refit += data.score_tokens * (layers * (exact + 2 * left * rates.layer_float32) + 4 * rates.head_float32)
    refit += recovery.refit_tokens * 2 * left / before * sum(d**2 + rows * d for d in columns) * rates.product
    training = step.tokens * token / devices + (before_training + evaluated if step.tokens else 0) + refit

    base, whole = _LIBRARIES, float(item * dense)
    # Later steps keep the model that they prune in addition to the dense one.
    whole += item * (fixed + before * in_sites) if before < 1 else 0.0
    candidate = left * in_sites
    # Experts are stored whole at every level: their inputs are not shared with other sites.
    outputs = sum(rows * d for d in columns) + 3 * rows * of_experts
    levels = 2 * outputs * recipe.database.levels / 2
    width = max(columns, default=0.0)
    activations = data.calibration_tokens / devices * rows * (2 if machine.accelerator else 4)
    layer = per_block / config.num_hidden_layers
    place = torch.device("cuda" if machine.accelerator else "cpu")
    chunk = 3 * 4 * config.vocab_size * chunk_tokens(config.vocab_size, place)
    trained_for = search.trial_tokens if search.generations else search.trial_tokens[-1:]
    # The inputs of all layers of a parent are kept, for all of the score text.
    states = max(search.score_tokens) * rows * (config.num_hidden_layers + 1) * (2 if machine.accelerator else 4)
    chunk += states
    # Trials recompute activations that do not fit; sensitivities cannot.
    trials = whole + TRIAL_BYTES[search.optimizer] * candidate + search.batch_size * layer
    if machine.accelerator:
        if base + chunk + trials > machine.memory:
            trials -= whole - item * fixed
        descent = whole + 2 * outputs + per_block
        if _SLACK * (base + whole + SPARE * (levels + 2 * outputs + per_block)) < machine.memory:
            descent += levels
    else:
        descent = whole + levels + 2 * before * in_sites + whole / 2 + per_block
    host = 0.0
    if offload:
        # Embeddings and head; one layer with its gradients, dense or at all levels; the layers' inputs.
        one = 2 * in_sites / config.num_hidden_layers
        reads = max(trained_together, data.sequence_length) * rows * 2 * (config.num_hidden_layers + 1)
        passing = item * fixed + 2 * one + _TEMPORARY + reads + search.batch_size * layer
        host = 2 * candidate
        whole = trials = passing
        descent = passing + (levels + 2 * outputs) / config.num_hidden_layers
    sharded = devices if recovery.sharding != "none" else 1
    blocks = recovery.micro_batch_size or max(1, recovery.batch_size // devices)
    kept = blocks * (
        left * per_block
        if recovery.activations == "keep"
        else layer + 2 * rows * config.num_hidden_layers * data.sequence_length
    )
    teacher_bytes = 0.0
    if recovery.distillation > 0:
        teacher_bytes = 2 * dense - (in_sites if recovery.teacher_dtype == "int8" else 0)
    predicting = base + (teacher_bytes if recovery.teacher_top_k else 0)
    teacher_bytes = 0 if recovery.teacher_top_k else teacher_bytes
    # Weights, gradients and two moments; with LoRA the weights and their copies in the compute dtype.
    trained_bytes = 6 if recovery.lora_rank else 16
    logits = 1024 * config.vocab_size * 4 * (4 if recovery.temperature == 1 else 5)
    training_bytes = (trained_bytes * (fixed + candidate) + teacher_bytes) / sharded + kept + logits
    if sharded > 1:
        # Gathered: embeddings and head with their gradients, those of the teacher, and two layers at a time.
        training_bytes += 8 * fixed + (2 * fixed if teacher_bytes else 0) + 4 * in_sites / config.num_hidden_layers
    if sharded > 1 and recovery.sharding == "fsdp_offload":
        training_bytes -= trained_bytes * (fixed + candidate) / sharded
        host = max(host, trained_bytes * (fixed + candidate) / sharded)
    stages = [
        StageCost(
            stage=Stage("database", step.number), seconds=database,
            memory=base + 4 * before * in_sites / config.num_hidden_layers
            + (activations if not machine.accelerator else 0) + 7 * 4 * width**2
            + (_EXPERT_BYTES + 12 * data.calibration_tokens * rows if mixtures else 0),
        ),
        StageCost(
            stage=Stage("search", step.number), seconds=searching,
            memory=base + chunk + max(
                trials if any(trained_for) else 0.0, descent if search.descent_rounds else 0.0, whole
            ),
        ),
        StageCost(
            stage=Stage("recovery", step.number), seconds=training,
            memory=max(predicting, base + max(
                whole + (4 * (fixed + candidate) / (config.num_hidden_layers if offload else 1))
                if recovery.refit_tokens else 0.0,
                training_bytes if recovery.tokens else 0.0,
            )),
        ),
    ]  # fmt: skip
    if step.number is None:
        # The dense model, the uniform plan, the model pruned in this step, the plan found, and the recovered model;
        # then a few requests in the model's own dtype.
        models = [1.0, left, *([before] if before < 1 else []), left, *([left] if recovery.wanted else [])]
        held_out = data.held_out_tokens * (
            layers * exact + sum(share * layers * exact + 2 * rates.head_float32 for share in models)
        )
        wanted = recipe.evaluation
        request = layers * (wanted.prefill_tokens * rates.layer_fast + wanted.decode_tokens * rates.layer_alone)
        held_out += (wanted.repeats + 1) * sum(
            share * request + wanted.decode_tokens * rates.head_alone for share in models
        )
        if offload:
            held_out -= (wanted.repeats + 1) * sum(
                share * request + wanted.decode_tokens * rates.head_alone for share in models
            )
            passes = sum(models) * data.held_out_tokens / scored_together + _SAMPLE_TOKENS * (1 + left)
            held_out += 2 * in_sites / _LINK * passes
        # Sample text generated by the dense and the last model.
        held_out += _SAMPLE_TOKENS * ((1 + left) * layers * rates.layer_alone + 2 * rates.head_alone)
        others = item * (fixed + candidate)
        if offload:
            memory = base + whole
        elif machine.accelerator:
            # Models are moved to the device one at a time if they do not all fit.
            memory = base + whole + (3 * others if base + whole + 4 * others < machine.memory else others)
        else:
            memory = base + whole + 3 * others + 2 * dense
        stages.append(StageCost(stage=Stage("evaluation"), seconds=held_out, memory=memory))
    return stages, stored, host


def _expert_work(site: Site, rows: int, tokens: int, levels: int) -> float:
    """Operations to prune a layer's experts: all of them on the sample, or each as a site of its own; plus, at each
    level, twice the forward passes of routed tokens, their Gram matrices and the eigenvalues of these."""
    experts = site.experts or site.num_units
    width = site.columns(site.num_units) // experts
    one = 6 * rows * width
    choosing = (
        tokens * site.routed * (one + 2 * width**2) + experts * (10 / 3 * width**3 + 2.5 * rows * width**2)
        if site.experts
        else min(tokens, PRODUCTS // experts**2) * (experts * one + 2 * experts**2 * rows)
    )
    refits = levels * tokens * site.routed * (2 * one + 4 * width**2 + 6 * width * rows)
    return float(choosing + refits + levels / 2 * experts * 25 * width**3)


def _with_overhead(stage: StageCost) -> StageCost:
    seconds = stage.seconds * (1 if stage.stage.kind == "evaluation" else _OVERHEAD)
    return replace(stage, seconds=seconds, memory=_LIBRARIES + _SLACK * (stage.memory - _LIBRARIES))


def _advice(stages: tuple[StageCost, ...], machine: Machine, recipe: Recipe) -> list[str]:
    """Return the settings to change for stages that do not fit, the cheapest first."""
    full = {stage.stage.kind for stage in stages if stage.memory > machine.memory}
    recovery, found = recipe.recovery, []
    if "recovery" in full:
        if recovery.activations == "keep":
            found.append("recovery.activations=recompute")
        if recovery.sharding == "none" and machine.devices > 1:
            found.append("recovery.sharding=fsdp")
        if recovery.sharding == "fsdp" and machine.devices > 1:
            found.append("recovery.sharding=fsdp_offload")
        if (recovery.micro_batch_size or recovery.batch_size // machine.devices) > 1:
            found.append("recovery.micro_batch_size=1")
        if recovery.distillation > 0 and recovery.teacher_top_k == 0 and recovery.text == "trial":
            found.append("recovery.teacher_top_k=64")
        elif recovery.distillation > 0 and recovery.teacher_dtype != "int8" and recovery.sharding == "none":
            found.append("recovery.teacher_dtype=int8")
        if recovery.lora_rank == 0:
            found.append("recovery.lora_rank=64")
    if "search" in full and recipe.search.optimizer == "adamw" and any(recipe.search.trial_tokens):
        found.append("search.trial_optimizer=sign")
    elif "search" in full and recipe.search.offload != "cpu":
        found.append("search.offload=cpu")
    elif "search" in full:
        none = ",".join("0" for _ in recipe.search.trial_tokens)
        untried = f"search.trial_tokens=[{none}] (no trials), " if any(recipe.search.trial_tokens) else ""
        found.append(f"{untried}a lower data.sequence_length, or a device with more memory")
    if "database" in full:
        found.append("database.offload=cpu, or disk")
    return found
