"""`darwinlm evaluate`: zero-shot tasks with the models of a run, or with one model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from darwinlm.errors import UserError
from darwinlm.evaluation.local_tasks import local_tasks
from darwinlm.evaluation.zero_shot import check_data, choose_tasks, compare, require_lm_eval, run_tasks, with_means
from darwinlm.report.page import write_report
from darwinlm.run.directory import is_run
from darwinlm.run.models import models_of_run, one_model
from darwinlm.runtime.files import read_json, write_json
from darwinlm.runtime.progress import task


def evaluate(
    source: str, tasks: Sequence[str] = (), *, tasks_dir: str | Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Run zero-shot tasks with the dense and the pruned model of a run, or with one model.

    Args:
        source: finished run, model folder, or Hub model id.
        tasks: names of lm-eval tasks, or `paper`; with `tasks_dir`, names of its files (default: all).
        tasks_dir: folder of JSONL files (`evaluation.local_tasks`).
        limit: use only the first `limit` items of each task.

    Returns:
        The results of these tasks, as in `report/tasks.json`. For a run they are merged into that file, and the report
        is updated.

    Raises:
        UserError: if lm-eval is missing, a task or its data is not available, or `source` contains no model.
    """
    local = local_tasks(Path(tasks_dir)) if tasks_dir is not None else {}
    if not tasks and not local:
        raise UserError(
            "no tasks given; use --tasks piqa,arc_easy, --tasks paper, or a folder of tasks, --tasks-dir DIR"
        )
    run = Path(source) if is_run(Path(source)) else None
    loaders = models_of_run(run) if run is not None else {"model": partial(one_model, source)}
    chosen = choose_tasks(tasks, local)
    require_lm_eval()
    check_data(chosen)
    answers = {}
    with task("evaluation (tasks)", len(loaders) * len(chosen)) as progress:
        for name, loader in loaders.items():
            # Only one model is in memory at a time.
            answers[name] = run_tasks(*loader(), chosen, limit, lambda done: progress.advance(note=done))
    results = compare(answers, chosen, limit)
    if run is not None:
        write_json(run / "report" / "tasks.json", _beside(run / "report" / "tasks.json", results))
        write_report(run)
    return results


def _beside(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Merge `results` with the results of other tasks in `file`."""
    if not file.exists():
        return results
    new = {(one["task"], one["metric"]) for one in results["tasks"]}
    older = [one for one in read_json(file)["tasks"] if (one["task"], one["metric"]) not in new]
    return with_means([*older, *results["tasks"]])
