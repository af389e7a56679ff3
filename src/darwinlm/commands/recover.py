"""`darwinlm recover`: the recovery of a run again, with other settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darwinlm.config.loading import change_recipe, differences
from darwinlm.errors import UserError
from darwinlm.export.targets import TARGETS
from darwinlm.pipeline import run_recipe
from darwinlm.recovery.stage import forget_recovery
from darwinlm.run.directory import RunDirectory
from darwinlm.run.finished import Run
from darwinlm.run.lock import RunLock
from darwinlm.runtime import dist


@dist.naming_lost_ranks()
def recover_again(run: str | Path, settings: Mapping[str, Any] | None = None) -> Run:
    """Repeat the recovery of a run with other `recovery` settings, or resume it if nothing changes.

    Args:
        run: run directory.
        settings: changes to the run's recipe, such as `{"recovery.tokens": "1B"}`; only `recovery` can change.

    Returns:
        The finished run.

    Raises:
        UserError: if the input is not valid; the message is one line with what is wrong and what to do.
    """
    dist.start()
    out = Path(run)
    before = RunDirectory.recipe_of(out)
    after = change_recipe(before, dict(settings or {}))
    changed = differences(before, after)
    others = [line for line in changed if not line.startswith("recovery.")]
    if others:
        raise UserError(f"{out}: recover cannot change {'; '.join(others)}; start a new run with `darwinlm prune`")
    dist.barrier()
    if changed and dist.rank() == 0:
        with RunLock(out) as lock:
            lock.take()
            for folder in (out / "recovery", *out.glob("sizes/*/recovery")):
                forget_recovery(folder)
            RunDirectory.change_recipe(out, after, ("recovery", "evaluation", "export", *TARGETS))
    dist.barrier()
    return run_recipe(after, out)
