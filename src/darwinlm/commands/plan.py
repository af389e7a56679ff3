"""`darwinlm plan`: predicted time, memory and disk space of a run, from shapes only, and advice if it does not fit."""

from dataclasses import replace
from math import prod

from darwinlm.config.recipe import Recipe
from darwinlm.config.target import parse_target
from darwinlm.database.cost import predict_database
from darwinlm.errors import UserError
from darwinlm.estimate.rates import GPUS, Machine, Rates, machine_here, measure_rates, rates_of
from darwinlm.estimate.work import SLACK, Costs, StageCost, Work
from darwinlm.evaluation.cost import predict_evaluation
from darwinlm.models.config import load_sizes
from darwinlm.models.cutting import count_parameters
from darwinlm.models.families import dense_again
from darwinlm.models.loading import choose_device, expected_shapes
from darwinlm.models.modeling_darwinlm import PrunedConfig
from darwinlm.models.sites import Site, find_sites
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import check_target
from darwinlm.recovery.cost import predict_recovery
from darwinlm.search.cost import predict_search


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
    model = Work(
        config=config, sites=sites, recipe=recipe, machine=machine, rates=rates, before=1.0, left=1.0, number=None
    )
    dense, in_sites, fixed = model.dense, model.in_sites, model.fixed
    left = max(0.0, (fraction * dense - fixed) / in_sites)
    stages: list[StageCost] = []
    models = 0.0
    for number in range(1, recipe.steps + 1):
        work = replace(
            model,
            before=left ** ((number - 1) / recipe.steps),
            left=left ** (number / recipe.steps),
            number=number if number < recipe.steps else None,
        )
        stages += [predict_database(work), predict_search(work), predict_recovery(work)]
        models += 4 * (fixed + work.left * in_sites)
    stages = [stage.with_overhead() for stage in [*stages, predict_evaluation(work)]]
    stored, host = sum(stage.disk for stage in stages), max(stage.host_memory for stage in stages)
    # Weights and the two moments of AdamW; two checkpoints are kept.
    checkpoint = 2 * 12 * (fixed + left * in_sites) if recipe.recovery.tokens else 0
    read = recipe.data.train_tokens + recipe.data.validation_tokens
    predictions = 8 * recipe.recovery.teacher_top_k * read if recipe.recovery.distillation else 0
    files = 2 * dense + (stored if recipe.search.descent_rounds else 0)
    return Costs(
        dense_parameters=dense,
        target_parameters=round(fraction * dense),
        smallest_parameters=fixed,
        stages=tuple(stages),
        host_memory=SLACK * machine.devices * host + (files if host else 0),
        disk=stored + models + checkpoint + predictions + 4 * fraction * dense,
        advice=tuple(_advice(tuple(stages), machine, recipe)),
    )


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
        if recovery.distillation > 0 and recovery.teacher_top_k == 0 and recovery.text == "train":
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
