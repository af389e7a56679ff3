"""Zero-shot tasks of EleutherAI's lm-eval (the `eval` extra), item by item."""

import difflib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from darwinlm.errors import UserError
from darwinlm.evaluation.paired import accuracy, mean_of_tasks, paired
from darwinlm.models.modeling_darwinlm import PrunedModel

PAPER = (
    *(("sciq", 0), ("piqa", 0), ("winogrande", 0), ("arc_easy", 0), ("arc_challenge", 0)),
    *(("hellaswag", 0), ("logiqa", 0), ("boolq", 0), ("mmlu", 5)),
)
"""Tasks of arXiv 2502.07780, by lm-eval's names, with the number of few-shot examples."""
_METRICS = ("acc", "acc_norm", "exact_match")
_BATCH = 8
_FEWSHOT_SEED = 1234
"""Few-shot seed, the default of lm-eval."""

Items = dict[str, list[float]]
"""Results by metric: 1 (correct) or 0 (wrong) for every item."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task to run: an lm-eval task name, or a local config."""

    name: str
    spec: str | Mapping[str, Any]
    shots: int | None
    """Number of few-shot examples; None uses the task's default."""


def choose_tasks(names: Sequence[str], local: Mapping[str, Mapping[str, Any]]) -> list[Task]:
    """Return the tasks called `names`, each once: from `local`, from lm-eval, or `paper` for all of `PAPER`.

    Without names, returns all of `local`; with local tasks, lm-eval's tasks are not available.

    Raises:
        UserError: if a name is unknown, or lm-eval is not installed.
    """
    if local:
        for name in names:
            if name not in local:
                raise UserError(f"--tasks {name}: no {name}.jsonl in --tasks-dir, which contains {', '.join(local)}")
        return [Task(name=name, spec=local[name], shots=0) for name in dict.fromkeys(names or local)]
    require_lm_eval()
    chosen: dict[str, Task] = {}
    for name in names:
        several = PAPER if name == "paper" else ((name, None),)
        chosen |= {task: Task(name=task, spec=task, shots=shots) for task, shots in several}
    known = set(_manager(True).all_tasks)
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise UserError(f"--tasks {name}: unknown lm-eval task; similar tasks are {', '.join(near)}")
    return list(chosen.values())


def require_lm_eval() -> None:
    """Raise UserError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-eval; run: pip install 'lm-eval>=0.4.13' (the `eval` extra)")


def check_data(tasks: Sequence[Task]) -> None:
    """Load the data of all `tasks`, before any model. Raises UserError that names the first task without data."""
    for task in tasks:
        _load(task)


def run_tasks(
    model: PrunedModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    limit: int | None,
    after_task: Callable[[str], None] = lambda name: None,
) -> dict[str, Items]:
    """Run `tasks` with `model`, on its device and in its dtype.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: tasks to run.
        limit: use only the first items of each task (of each subtask, if there are any); None uses all.
        after_task: called with the name of each finished task.

    Returns:
        By task, each available metric of `_METRICS` for every item, in the same order for all models.

    Raises:
        UserError: if a task's data cannot be loaded, or it has none of these metrics.
    """
    require_lm_eval()
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    engine = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
    for method in ("loglikelihood", "generate_until"):
        setattr(engine, method, partial(getattr(engine, method), disable_tqdm=True))
    found = {}
    for task in tasks:
        # No bootstrap: standard errors are computed from the items.
        results = evaluate(engine, _load(task), limit=limit, bootstrap_iters=0, log_samples=True)
        found[task.name] = _items(task.name, results["samples"])
        after_task(task.name)
    return found


def _items(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Items:
    ordered = [one for part in sorted(samples) for one in sorted(samples[part], key=lambda one: int(one["doc_id"]))]
    # A task may score the same answers with several filters; the first is its default.
    ordered = [one for one in ordered if one["filter"] == ordered[0]["filter"]]
    metrics = [metric for metric in _METRICS if all(metric in one for one in ordered)]
    if not metrics:
        raise UserError(f"--tasks {name}: it reports none of the supported metrics ({', '.join(_METRICS)}); remove it")
    return {metric: [float(one[metric]) for one in ordered] for metric in metrics}


@cache
def _manager(with_tasks: bool) -> Any:
    """Return lm-eval's task manager; reading all of its task files takes seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_tasks)


def _load(task: Task) -> Any:
    """Load a task for `lm_eval.evaluate`; always a new one, because it stores a model's answers."""
    spec = task.spec if isinstance(task.spec, str) else dict(task.spec)
    try:
        loaded = _manager(isinstance(spec, str)).load([spec])
        for one in loaded["tasks"].values():
            if one.get_config("num_fewshot") is None or task.shots is not None:
                one.set_config(key="num_fewshot", value=task.shots or 0)
            one.set_fewshot_seed(seed=_FEWSHOT_SEED)
    except Exception as error:  # Datasets, the Hub client and task files raise many kinds of errors.
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(
            f"--tasks {task.name}: its data cannot be loaded ({reason}); without the Hub, use --tasks-dir"
        ) from None
    return loaded


def compare(answers: Mapping[str, Mapping[str, Items]], tasks: Sequence[Task], limit: int | None) -> dict[str, Any]:
    """Return the accuracies side by side, for `tasks.json`.

    Args:
        answers: results of `run_tasks` by model; if `dense` is among them, the others are compared with it.
        tasks: tasks that were run.
        limit: limit with which they were run.

    Returns:
        `tasks`: one entry per task and metric, with `models` by name; `mean`: by metric, over all tasks, if there are
        several.
    """
    entries = []
    for task in tasks:
        for metric in next(iter(answers.values()))[task.name]:
            models = {}
            for name, found in answers.items():
                items = found[task.name][metric]
                models[name] = accuracy(items)
                if name != "dense" and "dense" in answers:
                    models[name] |= paired(items, answers["dense"][task.name][metric])
            facts = {"task": task.name, "metric": metric, "shots": task.shots, "items": len(items), "limit": limit}
            entries.append(facts | {"models": models})
    return with_means(entries)


def with_means(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `tasks.json` for `entries`."""
    means = {}
    for metric in dict.fromkeys(entry["metric"] for entry in entries):
        same = [entry for entry in entries if entry["metric"] == metric]
        if len(same) > 1:
            means[metric] = {"tasks": len(same), "models": mean_of_tasks(same)}
    return {"tasks": list(entries), "mean": means}
