"""State of a run directory as one JSON object (`metrics.json`). The page only shows what is in it."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from darwinlm.config.recipe import Recipe, SearchRecipe
from darwinlm.config.stage import Stage
from darwinlm.database.store import read_space
from darwinlm.errors import UserError
from darwinlm.plan import Plan, Space
from darwinlm.run.directory import Size, Step, read_manifest, run_steps
from darwinlm.runtime.files import read_json
from darwinlm.search.history import kl_of, trials_of

_MEASURED = (
    *("parameters", "kv_cache_bytes_per_token"),
    *("prefill_tokens_per_second", "decode_tokens_per_second", "perplexity"),
)
"""Values of a row that are also given relative to the dense model."""
_POINTS = 200
"""Maximum number of points of a curve; longer ones are averaged over equal intervals."""


def collect(run: Path) -> dict[str, Any]:
    """Collect everything known about the run in the folder `run`, finished or not.

    Returns:
        For a single size: the requested size, stages and their costs, and the result of `_size_facts`. For a family:
        the dense model's row and the last row of each size, with the result of `_size_facts` per size under `sizes`.

    Raises:
        UserError: if `run` is not a run, or a file in it is damaged.
    """
    recipe, manifest = read_manifest(run)
    stages = manifest["stages"]
    steps = run_steps(recipe, run)
    sizes = steps[-1].sizes
    wanted = _stages(recipe, steps)
    pending = [name for name in wanted if not stages.get(name, {}).get("done")]
    # For a gradual run, use the last step that has a database.
    spaces = [(step, read_space(step.folder / "database")) for step in steps]
    step, space = next((pair for pair in reversed(spaces) if pair[1] is not None), (steps[-1], None))
    facts: dict[str, Any] = {
        "model": recipe.model,
        "target": ", ".join(size.name for size in sizes),
        "seed": recipe.seed,
        "finished": not pending,
        "pending": pending,
        "stages": stages,
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 3),
        "peak_memory_bytes": max((stage["peak_memory_bytes"] for stage in stages.values()), default=0),
        "attention_unit": {"kv_group": "KV groups", "query_head": "query heads"}[recipe.database.granularity],
        "recipe": recipe.model_dump(mode="json"),
    }
    each = {size.name: _size_facts(recipe, space, size) for size in step.sizes}
    if len(each) == 1:
        (own,) = each.values()
        facts |= own
    else:
        facts |= _family(each) | {"sizes": each}
    tasks_file = run / "report" / "tasks.json"
    if tasks_file.exists():
        with _reading(tasks_file):
            tasks = read_json(tasks_file)
            facts["tasks"] = {key: tasks[key] for key in ("tasks", "mean")}
    return facts


def _stages(recipe: Recipe, steps: Sequence[Step]) -> list[str]:
    kinds = ["search", *(["recovery"] if recipe.recovery.wanted else []), "evaluation", "export"]
    found = [Stage("corpus")]
    for step in steps:
        found.append(step.stage("database"))
        found += [size.stage(kind) for size in step.sizes for kind in kinds if step.last or kind != "evaluation"]
    return [str(stage) for stage in found]


def _size_facts(recipe: Recipe, space: Space | None, size: Size) -> dict[str, Any]:
    """Return what is known of one size: measurements (`rows`, `limits`, `sample`), `layers`, `search`, `recovery`."""
    facts: dict[str, Any] = {}
    measured_file = size.folder / "evaluation" / "measured.json"
    if measured_file.exists():
        with _reading(measured_file):
            measured = read_json(measured_file)
            facts |= {key: measured[key] for key in ("sample", "environment")}
            # Runs of earlier versions do not record it.
            if "request" in measured:
                facts["request"] = measured["request"]
            facts["rows"] = compared(measured["rows"])
            facts["limits"] = [_with_shares(limit) for limit in measured["limits"]]
    if space is None:
        return facts
    with _reading(size.folder / "search"):
        facts["search"], plan = _search(recipe, space, size.folder / "search")
        if plan is not None:
            facts["layers"] = layers(space, plan)
            facts["parameters"] = space.parameters(plan.levels)
            facts["dense_parameters"] = space.dense_parameters
            facts["share"] = facts["parameters"] / facts["dense_parameters"]
    with _reading(size.folder / "recovery"):
        losses, evaluations = _training(size.folder / "recovery")
    if losses:
        facts["recovery"] = {"steps": len(losses), "curve": thinned(losses), "evaluations": evaluations}
    return facts


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report JSON files of `path` with unexpected content as damaged, in one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({reason}); start the run again in a new folder") from None


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add to each of `rows` its values relative to the dense model, and its KL relative to the uniform plan's."""
    dense = next(row for row in rows if row["name"] == "dense")
    uniform = next((row for row in rows if row["name"] == "uniform"), None)
    more = []
    for row in rows:
        shares = {name: row[name] / dense[name] for name in _MEASURED if dense[name]}
        if uniform is not None and uniform["kl"] > 0:
            shares["kl_of_uniform"] = row["kl"] / uniform["kl"]
        more.append({**row, "of_dense": shares})
    return more


def _with_shares(limit: Mapping[str, Any]) -> dict[str, Any]:
    """Add to `limit` the cost of the plan found relative to the dense model, predicted and, if available, measured."""
    more = {**limit, "share": limit["found"] / limit["dense"]}
    if "measured" in limit:
        more["measured_share"] = limit["measured"]["found"] / limit["measured"]["dense"]
    return more


def _family(each: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    measured = {name: facts for name, facts in each.items() if "rows" in facts}
    if not measured:
        return {}
    last = list(measured.values())[-1]
    rows = [{**facts["rows"][-1], "name": name} for name, facts in measured.items()]
    shared = {key: last[key] for key in ("sample", "environment", "request") if key in last}
    return {"rows": [last["rows"][0], *rows], **shared}


def layers(space: Space, plan: Plan) -> list[dict[str, Any]]:
    """Return what `plan` keeps of attention and MLP in each layer: units and parameters, and those of the original
    model.

    For parts that cannot be pruned, such as linear attention, all are 0. Units of an MLP are `channels` or `experts`.
    """
    mixtures = {site.name for site in space.sites if site.experts}
    kept = {
        site.name: (site.units[level], site.parameters[level])
        for site, level in zip(space.sites, plan.levels, strict=True)
    }
    found: dict[int, dict[str, Any]] = {}
    for site in space.first_sites:
        units, parameters = kept.get(site.name, (0, 0))
        nothing = {"kept": 0, "dense": 0, "share": 0.0, "parameters": 0, "dense_parameters": 0}
        layer = found.setdefault(
            site.layer, {"layer": site.layer, "attention": nothing, "mlp": {**nothing, "unit": "channels"}}
        )
        layer[site.kind] = {
            "kept": units,
            "dense": site.units,
            "share": units / site.units,
            "parameters": parameters,
            "dense_parameters": site.parameters,
        }
        if site.kind == "mlp":
            layer["mlp"]["unit"] = "experts" if site.name in mixtures else "channels"
    return [found[number] for number in sorted(found)]


def _search(recipe: Recipe, space: Space, folder: Path) -> tuple[dict[str, Any], Plan | None]:
    """Return the progress of the search in `folder`, and the plan found or the best so far."""
    state = read_json(folder / "state.json") if (folder / "state.json").exists() else None
    rounds = read_json(folder / "descent.json")["rounds"] if (folder / "descent.json").exists() else []
    plan = Plan(levels=tuple(rounds[-1]["levels"])) if rounds else None
    if state is not None:
        plan = Plan(levels=tuple(state["parent"]))
    if (folder / "best_plan.json").exists():
        plan = Plan.from_dict(read_json(folder / "best_plan.json"), space)
    history = state["history"] if state is not None else []
    asked = (state or {}).get("generations", recipe.search.generations)
    if (folder / "best_plan.json").exists():
        asked = len(history) - 1
    facts = _steps(asked, space, history, rounds)
    # Runs of earlier versions do not record trial statistics.
    if history and all("trials" in entry for entry in history):
        rates = read_json(folder / "trials.json")["rates"] if (folder / "trials.json").exists() else []
        facts["trials"] = _trials(recipe.search, history, {one["tokens"]: one["rate"] for one in rates})
    if (folder / "forecast.json").exists():
        facts["forecast"] = _forecast(read_json(folder / "forecast.json"))
    return facts, plan


def _steps(
    generations_asked: int, space: Space, history: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    descent = [
        {
            "round": number,
            "kl": kl_of(one["scores"][one["best"]]),
            "before": kl_of(one["scores"][0]),
            "compared": _finite(one["scores"]),
            "plans": len(one["scores"]),
            "worst": max(_finite(one["scores"]), default=None),
            "improved": one["improved"],
            "changed": _changed(space, one["base"], one["levels"]),
        }
        for number, one in enumerate(rounds, 1)
    ]
    generations = []
    for before, entry in pairwise([None, *history]):
        assert entry is not None
        finite, gain = _finite(entry["scores"]), entry.get("gain")
        generations.append(
            {
                "generation": entry["generation"],
                "kl": min(finite, default=None),
                "compared": finite,
                "plans": len(entry["scores"]),
                "worst": max(finite, default=None),
                "diverged": len(entry["scores"]) - len(finite),
                "improved": entry["improved"],
                "gain": gain if gain is not None and kl_of(gain["mean"]) is not None else None,
                "changed": _changed(space, (before or entry)["levels"], entry["levels"]),
            }
        )
    accepted = {"attention": 0, "mlp": 0, "both": 0}
    for one in generations[1:]:
        kinds = [kind for kind in ("attention", "mlp") if one["changed"][kind]]
        if kinds:
            accepted["both" if len(kinds) == 2 else kinds[0]] += 1
    return {
        "descent": descent,
        "generations": generations,
        "generations_asked": generations_asked,
        "accepted": accepted,
    }


def _trials(
    recipe: SearchRecipe, history: Sequence[Mapping[str, Any]], rates: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Return the learning rate, number of candidates and number of improved candidates of each step with trials."""
    return [
        {
            "step": number,
            "tokens": tokens,
            "learning_rate": rates.get(tokens) if recipe.learning_rate == "auto" else recipe.learning_rate,
            "relative": recipe.learning_rate == "auto",
            **step,
        }
        for number, (tokens, step) in enumerate(zip(recipe.trial_tokens, trials_of(history), strict=False), 1)
        if tokens > 0
    ]


def _finite(scores: Sequence[float | None]) -> list[float]:
    return [kl for kl in map(kl_of, scores) if kl is not None]


def _changed(space: Space, before: Sequence[int], after: Sequence[int]) -> dict[str, int]:
    """Return how many sites of each kind have changed their level."""
    counts = {"attention": 0, "mlp": 0}
    for site, old, new in zip(space.sites, before, after, strict=True):
        counts[site.kind] += old != new
    return counts


def _forecast(forecast: Mapping[str, Any]) -> dict[str, Any]:
    steps = [
        {"step": one["step"] + 1, **{key: one[key] for key in ("rho", "low", "high")}} for one in forecast["steps"]
    ]
    return {"training_tokens": forecast["training_tokens"], "plans": len(forecast["scores"]), "steps": steps}


def _training(folder: Path) -> tuple[list[float], list[dict[str, float]]]:
    """Return the loss of every recovery step, and the evaluations; during a recovery, up to its last checkpoint."""
    if (folder / "losses.json").exists():
        history = read_json(folder / "losses.json")
        return list(history["loss"]), [_evaluation(one, "") for one in history["evaluations"]]
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(steps, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        file = checkpoint / "trainer_state.json"
        if file.exists():
            log = read_json(file)["log_history"]
            losses = [float(entry["loss"]) for entry in log if "loss" in entry]
            return losses, [_evaluation(entry, "eval_") for entry in log if "eval_loss" in entry]
    return [], []


def _evaluation(entry: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return `step`, `loss`, `next_token` and, with distillation, `kl`."""
    names = [name for name in ("loss", "next_token", "kl") if prefix + name in entry]
    return {"step": int(entry["step"]), **{name: float(entry[prefix + name]) for name in names}}


def thinned(values: Sequence[float], points: int = _POINTS) -> list[dict[str, Any]]:
    """Average over at most `points` equal intervals of steps, counted from 1, with minimum and maximum."""
    length = -(-len(values) // points)
    stretches = [(start, values[start : start + length]) for start in range(0, len(values), length)]
    return [
        {
            "first": start + 1,
            "last": start + len(part),
            "loss": statistics.fmean(part),
            "low": min(part),
            "high": max(part),
        }
        for start, part in stretches
    ]
