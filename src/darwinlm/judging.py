"""`darwinlm evaluate`: a run's models, or one model, on zero-shot tasks."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from darwinlm.errors import UserError
from darwinlm.evaluation.local_tasks import local_tasks
from darwinlm.evaluation.zero_shot import check_data, choose_tasks, compare, require_lm_eval, run_tasks, with_means
from darwinlm.files import read_json, write_json
from darwinlm.progress import task
from darwinlm.report.page import write_report
from darwinlm.subjects import models_of_run, one_model


def evaluate(
    source: str, tasks: Sequence[str] = (), *, tasks_dir: str | Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Run zero-shot tasks with the dense and the pruned model of a run, or with one model.

    Args:
        source: a finished run, a model's folder, or a Hub id.
        tasks: names of lm-eval's, or `paper`; with `tasks_dir`, of its files (all of them by default).
        tasks_dir: a folder of JSONL files (`evaluation.local_tasks`).
        limit: the first so many items of each task.

    Returns:
        What `report/tasks.json` holds of these tasks; of a run it is written there too, beside the tasks that were run
        before, and the report is written anew.

    Raises:
        UserError: if lm-eval is missing, a task or its data cannot be had, or `source` holds no model.
    """
    local = local_tasks(Path(tasks_dir)) if tasks_dir is not None else {}
    if not tasks and not local:
        raise UserError("name the tasks, --tasks piqa,arc_easy or --tasks paper, or a folder of them, --tasks-dir DIR")
    run = Path(source) if (Path(source) / "manifest.json").is_file() else None
    loaders = models_of_run(run) if run is not None else {"model": partial(one_model, source)}
    chosen = choose_tasks(tasks, local)
    require_lm_eval()
    check_data(chosen)
    answers = {}
    with task("evaluation (tasks)", len(loaders) * len(chosen)) as progress:
        for name, loader in loaders.items():
            # One model at a time is in memory.
            answers[name] = run_tasks(*loader(), chosen, limit, lambda done: progress.advance(note=done))
    results = compare(answers, chosen, limit)
    if run is not None:
        write_json(run / "report" / "tasks.json", _beside(run / "report" / "tasks.json", results))
        write_report(run)
    return results


def _beside(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """`results` and what `file` holds of other tasks."""
    if not file.exists():
        return results
    new = {(one["task"], one["metric"]) for one in results["tasks"]}
    older = [one for one in read_json(file)["tasks"] if (one["task"], one["metric"]) not in new]
    return with_means([*older, *results["tasks"]])
